//! The apps' resolver: a dnsmasq with names that nobody has asked for, and some of every shape.

use std::fs;
use std::path::Path;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::apps::SUFFIXES;
use crate::bed::Bed;
use crate::corp::stay;
use crate::hosts::APP_DNS;
use crate::process::{Process, until};

/// Where the resolver is within [`STATIC`](crate::apps::STATIC), and a suffix that no connector serves: `n1.split.test` and on are there too.
pub(crate) const SPLIT_DNS: &str = "fdaa:1:ffff::80";
pub(crate) const SPLIT: &str = "split.test";

/// How many names there are of each kind that nobody has asked for.
pub(crate) const FRESH: usize = 200;

/// Names that only connectors with transit addresses serve, at addresses that no other name has.
const TRANSIT: &str = "local=/transit.test/\n\
    host-record=transit.test,10.30.0.170,300\n\
    host-record=web.transit.test,10.30.0.171,300\n\
    host-record=v6.transit.test,fdaa:2::97,300\n\
    host-record=pair.transit.test,10.30.0.172,fdaa:2::98,300\n\
    host-record=target.transit.test,10.30.0.173,300\n\
    cname=alias.transit.test,target.transit.test,300\n";

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The resolver of the apps' network. It refuses what it has no zone for.
pub(crate) fn resolver(bed: &Bed, zone: &Path) -> Result<Process, Failed> {
    let mut command = bed.hosts.app.command("dnsmasq");
    command.args(stay()?).args(["--no-resolv", "--no-hosts", "--log-queries", "--log-facility=-"]);
    command
        .arg(format!("--listen-address={APP_DNS},{SPLIT_DNS}"))
        .arg("--bind-interfaces")
        .arg(format!("--conf-file={}", zone.display()));
    let started = |log: &str| log.lines().filter(|line| line.contains("started, version")).count();
    let before = started(&fs::read_to_string(bed.folder.join("app-dnsmasq.log")).unwrap_or_default());
    let mut process = Process::start(command, "app-dnsmasq", &bed.folder, false)?;
    until(PATIENCE, "the apps' resolver", || match process.ended()? {
        Some(status) => Err(format!("dnsmasq ended with {status}: {}", process.log()).into()),
        None => Ok((started(&process.log()) > before).then_some(())),
    })?;
    Ok(process)
}

/// The zones. The last number of each line is the TTL in seconds.
pub(crate) fn records(moving: &str) -> String {
    let mut lines = String::from(
        "host-record=web.app.test,10.30.0.80,300\n\
         host-record=app.test,10.30.0.81,300\n\
         host-record=v6.app.test,fdaa:1:ffff::80,300\n\
         host-record=lone6.app.test,fdaa:2::81,300\n\
         host-record=pair.app.test,10.30.0.82,fdaa:2::82,300\n\
         host-record=target.app.test,10.30.0.83,300\n\
         cname=alias.app.test,second.app.test,300\n\
         cname=second.app.test,target.app.test,300\n\
         host-record=cdn.elsewhere.test,10.30.0.84,300\n\
         cname=far.app.test,cdn.elsewhere.test,300\n\
         host-record=zero.app.test,10.30.0.85,0\n\
         host-record=never.app.test,10.30.0.86,300\n\
         host-record=withdrawn.app.test,10.30.0.87,300\n\
         host-record=forbidden.app.test,10.30.0.88,300\n\
         host-record=shared.both.test,10.30.0.90,300\n\
         host-record=wide.app.test,10.30.2.80,300\n",
    );
    lines.push_str(&format!("host-record=moving.app.test,{moving},1\n"));
    for last in 128..=160 {
        lines.push_str(&format!("host-record=many.app.test,10.30.0.{last},300\n"));
    }
    let mut suffixes: Vec<_> = SUFFIXES.iter().flat_map(|(_, suffixes)| *suffixes).collect();
    suffixes.sort_unstable();
    suffixes.dedup();
    for suffix in suffixes.iter().filter(|suffix| ***suffix != "refused.test") {
        lines.push_str(&format!("local=/{suffix}/\n"));
        for n in 1..=FRESH {
            let (v4, v6) = (format!("10.30.1.{n}"), format!("fdaa:2:1::{n}"));
            lines.push_str(&format!("host-record=n{n}.{suffix},{v4},60\nhost-record=s{n}.{suffix},{v6},60\n"));
            lines.push_str(&format!("host-record=d{n}.{suffix},{v4},{v6},60\n"));
        }
    }
    for n in 1..=FRESH {
        lines.push_str(&format!("host-record=n{n}.{SPLIT},fdaa:1:ffff::81,60\n"));
    }
    lines.push_str("local=/elsewhere.test/\nlocal=/split.test/\n");
    lines.push_str(TRANSIT);
    lines
}
