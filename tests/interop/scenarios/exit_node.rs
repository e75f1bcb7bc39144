//! An exit node: what is public goes through the one that was named, and through nothing else.
//!
//! The internet is one host of it: an address of each family that only the exit node has.

use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::{Bed, site};
use crate::corp::stay;
use crate::headscale::{BROWSER, KeyKind, POLICY};
use crate::hosts::EXIT;
use crate::process::{Process, output, queries, until};
use crate::sidecar::{Launch, Sidecar};
use crate::tailscaled::{Role, Tailscaled};

/// What only the exit node has.
const PUBLIC: [&str; 2] = ["203.0.113.80", "2001:db8:113::80"];

/// Its name, which only the exit node's resolver knows.
const NAME: &str = "site.public.example";

/// What is nobody's, or somebody's whom an exit node must not be asked for.
const PRIVATE: [&str; 6] = ["10.99.0.31", "10.9.9.9", "192.168.7.7", "169.254.169.254", "fd99::80", "fec0::1"];

/// The usual policy, with an exit node whose routes need nobody's approval.
fn policy() -> String {
    POLICY
        .replace(r#""tagOwners": {"#, r#""tagOwners": {"tag:exit": ["dev@"], "#)
        .replace(
            r#""grants": ["#,
            r#""grants": [{"src": ["tag:browser"], "dst": ["autogroup:internet"], "ip": ["*"]},"#,
        )
        .replace(r#""autoApprovers": {"#, r#""autoApprovers": {"exitNode": ["tag:exit"], "#)
}

/// The internet's resolver, as the exit node sees it.
fn resolver(bed: &Bed) -> Result<Process, Failed> {
    let [v4, v6] = PUBLIC;
    let mut command = bed.hosts.exit.command("dnsmasq");
    command.args(stay()?).args(["--no-resolv", "--no-hosts", "--log-queries", "--log-facility=-", "--bind-interfaces"]);
    command.arg(format!("--listen-address={EXIT}")).arg(format!("--host-record={NAME},{v4},{v6}"));
    command.args(["--host-record=inside.public.example,10.9.9.9", "--local=/example/"]);
    let mut resolver = Process::start(command, "exit-dnsmasq", &bed.folder, false)?;
    resolver.says("started", Duration::from_secs(5))?;
    Ok(resolver)
}

/// Does `work` while there is an exit node, `exit`, with the internet behind it.
fn with_exit(bed: &Bed, work: impl FnOnce(&Tailscaled) -> Result<(), Failed>) -> Result<(), Failed> {
    let [v4, v6] = PUBLIC;
    bed.hosts.exit.ip(&format!("addr replace {v4}/32 dev lo\naddr replace {v6}/128 dev lo nodad"))?;
    let _site = site(&bed.peers, &bed.hosts.exit, "exit", &bed.folder)?;
    bed.headscale().set_policy(&policy())?;
    let key = bed.headscale().mint(KeyKind { tag: "tag:exit", ..BROWSER })?;
    let role = Role { hostname: "exit", tun: "ts0", daemon: &[], up: &["--advertise-exit-node"] };
    let done = Tailscaled::join(&bed.places(), &bed.hosts.exit, &role, &key.secret).and_then(|exit| {
        let done = work(&exit);
        let mut logout = exit.command();
        logout.arg("logout");
        done.and(output(logout).map(drop))
    });
    bed.headscale().set_policy(POLICY)?;
    done
}

/// Holds a refusal to a code.
fn refused(sidecar: &Sidecar<'_>, host: &str, status: u16, code: &str) -> Result<(), Failed> {
    let authority = if host.contains(':') { format!("[{host}]:80") } else { format!("{host}:80") };
    let (response, _) = sidecar.tunnel(&authority)?;
    response.expect(status, code).map_err(|why| format!("{host}: {}", why.message().unwrap_or("")).into())
}

/// Public addresses and names go through it where it was named, private ones nowhere; without the flag all are refused.
pub(crate) fn what_is_public_goes_by_the_exit_node_that_was_named(bed: &Bed) -> Result<(), Failed> {
    let resolver = resolver(bed)?;
    with_exit(bed, |_| {
        let plain = Launch::new(bed).ready()?;
        for host in PUBLIC.into_iter().chain([NAME]) {
            refused(&plain, host, 403, "TC-1901").map_err(|why| format!("without the flag: {why:?}"))?;
        }
        drop(plain);
        let sidecar = Launch::new(bed).args(&["--exit-node", "exit"]).ready()?;
        for host in PUBLIC.into_iter().chain([NAME]) {
            sidecar.page(host, "exit")?;
        }
        refused(&sidecar, "inside.public.example", 403, "TC-1901")?;
        match (queries(&resolver, NAME), bed.strayed(NAME)) {
            (1.., 0) => {}
            other => return Err(format!("{NAME} was asked of (the exit node, the trap): {other:?}").into()),
        }
        sidecar.page("10.20.0.80", "corp")?;
        for host in PRIVATE {
            refused(&sidecar, host, 403, "TC-1901")?;
        }
        refused(&sidecar, "100.64.99.99", 502, "TC-1501")
    })
}

/// An exit node that is not there ends the run, and says which are.
pub(crate) fn an_exit_node_that_is_not_there_ends_the_run(bed: &Bed) -> Result<(), Failed> {
    let limit = Duration::from_secs(20);
    let outcome = Launch::new(bed).args(&["--exit-node", "router"]).outcome(limit)?;
    outcome.expect(78, "TC-1507")?;
    with_exit(bed, |_| {
        let outcome = Launch::new(bed).env("TS_EXTRA_ARGS", "--exit-node=exile").outcome(limit)?;
        outcome.expect(78, "TC-1507")?;
        match outcome.object["cause"].as_str() {
            Some(cause) if cause.contains("exile") && cause.contains("exit.tb.example") => Ok(()),
            other => Err(format!("the cause names neither: {other:?}").into()),
        }
    })
}

/// One that goes in mid-run takes the public targets with it, and leaves the others.
pub(crate) fn without_its_exit_node_nothing_public_is_reached(bed: &Bed) -> Result<(), Failed> {
    with_exit(bed, |exit| {
        let [public, _] = PUBLIC;
        let sidecar = Launch::new(bed).args(&["--exit-node", "exit", "--dial-timeout", "3s"]).ready()?;
        until(Duration::from_secs(10), "the exit node to know the node", || Ok(sidecar.page(public, "exit").ok()))?;
        exit.down()?;
        let gone = || {
            let (response, _) = sidecar.tunnel(&format!("{public}:80"))?;
            let code = response.header("x-tailcar-error").unwrap_or("").to_owned();
            match (response.status, code.as_str()) {
                (502, "TC-1502" | "TC-1503") => Ok(Some(())),
                // Until control has said that it is gone.
                (504, _) => Ok(None),
                other => Err(format!("without its exit node: {other:?}").into()),
            }
        };
        until(Duration::from_secs(30), "the exit node to be known as gone", gone)?;
        sidecar.page("10.20.0.80", "corp")?;
        exit.up_again()?;
        until(Duration::from_secs(20), "the exit node to be used again", || Ok(sidecar.page(public, "exit").ok()))
    })
}
