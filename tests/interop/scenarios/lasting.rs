//! One connection that lives long: WireGuard's keys change under it, twice and by either side.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::bed::Bed;
use crate::nat_nodes::{local_status, peers_of};
use crate::say;
use crate::sidecar::Launch;

/// Past the second rekey (120 s each) and past what a key may live (180 s). Source: the WireGuard paper, 6.1.
const LIFE: Duration = Duration::from_secs(265);
/// The pause between two blocks.
const PAUSE: Duration = Duration::from_millis(100);
/// How often the peer is asked when its last handshake was: it makes one each two minutes.
const LOOK: Duration = Duration::from_secs(5);
/// By now the first handshake is done, however often it was repeated.
const BEGUN: Duration = Duration::from_secs(60);
/// The longest that a block may take: a control outage of another scenario must not show, a loaded machine may.
const STALL: Duration = Duration::from_secs(5);

/// A connection to a real tailscaled carries every byte for longer than any of its keys lives.
pub(crate) fn a_connection_outlives_its_keys(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).on(&bed.hosts.lasting).ready()?;
    let (address, socket) = (&sidecar.ready["node"]["addresses"][0], bed.web().socket().to_owned());
    let mut stream = sidecar.dial("web", 7)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (start, mut count, mut longest) = (Instant::now(), 0_u64, Duration::ZERO);
    let (mut handshakes, mut look_at) = (BTreeSet::new(), start + BEGUN);
    while start.elapsed() < LIFE {
        let block: Vec<u8> = (0..512_u64).flat_map(|at| (count * 512 + at).to_le_bytes()).collect();
        let sent = Instant::now();
        stream.write_all(&block)?;
        let mut back = vec![0; block.len()];
        stream.read_exact(&mut back)?;
        if back != block {
            return Err(format!("block {count} came back otherwise").into());
        }
        longest = longest.max(sent.elapsed());
        count += 1;
        if Instant::now() >= look_at {
            handshakes.insert(last_handshake(&socket, address)?);
            look_at += LOOK;
        }
        thread::sleep(PAUSE);
    }
    handshakes.insert(last_handshake(&socket, address)?);
    say(&format!(
        "         {count} blocks of 4 KiB in {} s, longest {} ms, handshakes at {handshakes:?}",
        LIFE.as_secs(),
        longest.as_millis()
    ));
    // The first session's, and two that were made under the connection.
    if handshakes.len() < 3 || longest > STALL {
        return Err(format!("handshakes at {handshakes:?}, longest pause {longest:?}").into());
    }
    Ok(())
}

/// When the peer completed its last handshake with the node of an address, by what it says itself.
fn last_handshake(socket: &Path, address: &Value) -> Result<String, Failed> {
    let status = local_status(socket)?;
    let ours = |peer: &&Value| peer["TailscaleIPs"].as_array().is_some_and(|ips| ips.contains(address));
    let at = peers_of(&status).find(ours).and_then(|peer| peer["LastHandshake"].as_str());
    Ok(at.ok_or("the peer knows of no handshake")?.to_owned())
}
