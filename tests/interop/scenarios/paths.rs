//! Paths to a peer: direct on one LAN, by DERP when UDP is blocked, and from one to the other in mid-stream.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::leak;
use crate::process::{output, until};
use crate::sidecar::Launch;

/// No UDP leaves the host or reaches it.
const BLOCKED: &str = "table inet blocked { chain in { type filter hook input priority 0; meta l4proto udp iifname eth0 drop; }\n\
     chain out { type filter hook output priority 0; meta l4proto udp oifname eth0 drop; }\n }";

/// How much is sent to see where it goes.
const LOAD: usize = 4 << 20;

/// Sends and gets back [`LOAD`] on an open echo; bytes that left by UDP to peers, and by TCP to DERP.
fn weigh(bed: &Bed, stream: &mut TcpStream) -> Result<(u64, u64), Failed> {
    let before = leak::reading(&bed.hosts.client)?;
    let mut writer = stream.try_clone()?;
    let sent: Vec<u8> = (0..LOAD).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    let mut back = vec![0; LOAD];
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| writer.write_all(&sent));
        stream.read_exact(&mut back)?;
        sender.join().map_err(|_| "the sender panicked")??;
        Ok::<(), Failed>(())
    })?;
    if back != sent {
        return Err("the echo differs from what was sent".into());
    }
    let after = leak::reading(&bed.hosts.client)?;
    let grown = |class: &str| after.bytes(class) - before.bytes(class);
    Ok((grown("peers"), grown("control") + grown("derp")))
}

/// On one LAN the bytes go by UDP from peer to peer, and DERP sees none of them.
pub(crate) fn on_one_lan_bytes_go_directly(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page("web", "web")?;
    let mut stream = sidecar.dial("web", 7)?;
    until(Duration::from_secs(15), "a direct path", || {
        let (direct, relayed) = weigh(bed, &mut stream)?;
        Ok((direct > LOAD as u64 && relayed < LOAD as u64 / 20).then_some(()))
    })
}

/// With UDP blocked the page comes by DERP; unblocked, the same connection goes on directly.
pub(crate) fn a_relayed_connection_becomes_direct_without_breaking(bed: &Bed) -> Result<(), Failed> {
    let client = &bed.hosts.client;
    client.nft(BLOCKED)?;
    let relayed = Launch::new(bed).ready().and_then(|sidecar| {
        sidecar.page("web", "web")?;
        sidecar.page("web.corp.test", "corp")?;
        let mut stream = sidecar.dial("web", 7)?;
        let (_, relayed) = weigh(bed, &mut stream)?;
        match relayed > LOAD as u64 {
            true => Ok((sidecar, stream)),
            false => Err(format!("only {relayed} bytes went by DERP").into()),
        }
    });
    client.nft("delete table inet blocked")?;
    let (_sidecar, mut stream) = relayed?;
    until(Duration::from_secs(45), "the upgrade to a direct path", || {
        let (direct, relayed) = weigh(bed, &mut stream)?;
        Ok((direct > LOAD as u64 && relayed < LOAD as u64 / 20).then_some(()))
    })
}

/// A direct path that stops working falls back to DERP, and the connection lives on.
pub(crate) fn a_direct_connection_survives_the_loss_of_udp(bed: &Bed) -> Result<(), Failed> {
    let client = &bed.hosts.client;
    let sidecar = Launch::new(bed).ready()?;
    let mut stream = sidecar.dial("web", 7)?;
    until(Duration::from_secs(15), "a direct path", || {
        let (direct, relayed) = weigh(bed, &mut stream)?;
        Ok((direct > LOAD as u64 && relayed < LOAD as u64 / 20).then_some(()))
    })?;
    client.nft(BLOCKED)?;
    let survived = weigh(bed, &mut stream);
    let said = until(Duration::from_secs(15), "the log to tell both paths", || {
        let log = sidecar.process.log();
        let lines = ["INFO tailcar::node::core::paths: peer is reached directly", "peer is reached by a relay"];
        Ok(lines.iter().all(|line| log.contains(line)).then_some(()))
    });
    client.nft("delete table inet blocked")?;
    match survived? {
        (_, relayed) if relayed > LOAD as u64 / 2 => said,
        (direct, relayed) => Err(format!("{direct} bytes directly, {relayed} by DERP").into()),
    }
}

/// Without relays, a peer whose direct path has died is said to be out of reach, and why: its session outlives the path.
pub(crate) fn without_relays_the_end_of_udp_is_told_as_what_it_is(bed: &Bed) -> Result<(), Failed> {
    let client = &bed.hosts.client;
    let mut sidecar = Launch::new(bed).args(&["--transport", "direct", "--dial-timeout", "12s"]).ready()?;
    sidecar.page("web", "web")?;
    client.nft(BLOCKED)?;
    let refused = sidecar.get_absolute("web", "/");
    let unresolved = sidecar.get_absolute("any.corp.test", "/");
    // What was said of a peer a moment ago has the next line wait for ten seconds.
    let said = sidecar.process.says("paths: peer cannot be reached", Duration::from_secs(15));
    client.nft("delete table inet blocked")?;
    let (refused, _) = (refused?, said?);
    refused.expect(504, "TC-1605")?;
    let text = refused.text();
    if !text.contains("--transport direct allows no relay") {
        return Err(text.into());
    }
    // The resolver behind another such peer is not to blame.
    let unresolved = unresolved?;
    unresolved.expect(504, "TC-1405")?;
    let text = unresolved.text();
    if !text.contains("router.tb.example, which leads there, did not answer in") {
        return Err(text.into());
    }
    // And its end as loudly.
    until(Duration::from_secs(20), "the peer to be reached", || Ok(sidecar.page("web", "web").ok()))?;
    sidecar
        .process
        .says("WARN tailcar::node::core::paths: peer can be reached again", Duration::from_secs(15))
        .map(drop)
}

/// Without relays, a network that lets no UDP pass is told as soon as that is known, with what to do; not by each dial.
pub(crate) fn without_relays_a_network_without_udp_is_told_at_once(bed: &Bed) -> Result<(), Failed> {
    let client = &bed.hosts.client;
    client.nft(BLOCKED)?;
    let said = Launch::new(bed).args(&["--transport", "direct"]).ready().and_then(|mut sidecar| {
        // Servers are waited for, for three seconds.
        sidecar.process.says("TC-1304: no UDP comes back", Duration::from_secs(6))?;
        sidecar.process.says("try  let a firewall pass UDP", Duration::from_secs(1))
    });
    client.nft("delete table inet blocked")?;
    said?;
    let silent = Launch::new(bed).args(&["--transport", "direct"]).ready()?;
    silent.page("web", "web")?;
    match silent.process.log().contains("TC-1304") {
        false => Ok(()),
        true => Err("UDP passes, and is said not to".into()),
    }
}

/// `--transport derp` sends nothing to peers; a peer in another region, known by its pin, is reached there.
///
/// Only the way there is the peer's home: it answers by ours, and from then on both may stay in that one.
pub(crate) fn a_peer_homed_in_another_region_is_reached_there(bed: &Bed) -> Result<(), Failed> {
    let result = [("998", "second"), ("999", "tb")].into_iter().try_for_each(|(region, code)| {
        prefer(bed, region, code)?;
        // A netmap may still have the home of before.
        until(Duration::from_secs(15), &format!("bytes by region {region}"), || by_region(bed, region))
    });
    prefer_none(bed)?;
    result
}

/// A run of its own that is relayed; something when it went to `region`, which it would else have no reason to.
fn by_region(bed: &Bed, region: &str) -> Result<Option<()>, Failed> {
    let sidecar = Launch::new(bed).args(&["--transport", "derp"]).ready()?;
    let before = leak::reading(&bed.hosts.client)?.packets("peers");
    let (_, relayed) = weigh(bed, &mut sidecar.dial("web", 7)?)?;
    if relayed < LOAD as u64 {
        return Err(format!("only {relayed} bytes went by DERP").into());
    }
    if leak::reading(&bed.hosts.client)?.packets("peers") != before {
        return Err("datagrams went to a peer in spite of --transport derp".into());
    }
    Ok(sidecar.process.log().contains(&format!("derp connected region={region} ")).then_some(()))
}

/// Makes the web peer choose its home region, and waits until it has.
pub(crate) fn prefer(bed: &Bed, region: &str, code: &str) -> Result<(), Failed> {
    debug(bed, &["force-prefer-derp", region])?;
    debug(bed, &["restun"])?;
    until(Duration::from_secs(20), "the web peer's home region", || {
        Ok((bed.web().status()?["Self"]["Relay"] == code).then_some(()))
    })
}

/// The opposite of [`prefer`].
pub(crate) fn prefer_none(bed: &Bed) -> Result<(), Failed> {
    debug(bed, &["force-prefer-derp", "0"])
}

fn debug(bed: &Bed, args: &[&str]) -> Result<(), Failed> {
    let mut command: Command = bed.web().command();
    command.arg("debug").args(args);
    output(command).map(drop)
}
