//! `tests/run measure`: tailcar beside a kernel-TUN tailscaled that accepts routes and DNS, in one bed.
//!
//! Both join one tailnet from hosts of their own and take turns, with curl on both sides: through the proxy, and
//! straight. Nothing is asserted; the table is for whoever wants figures of the machine at hand.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::json;

use crate::apps::Apps;
use crate::bed::Bed;
use crate::sidecar::Sidecar;
use crate::tailscaled::{Role, Tailscaled};
use crate::testcontrol::KEY;
use crate::zone::{SPLIT, SPLIT_DNS};
use crate::{leak, say, words};

/// How often each is measured.
const ROUNDS: usize = 8;
/// The pause before a page that has failed is asked for again.
const AGAIN: Duration = Duration::from_millis(20);
/// When a page is given up.
const LIMIT: Duration = Duration::from_secs(20);

/// What is measured, in the table's order.
const ROWS: [&str; 4] = ["first page, new name", "tenth page of it", "split-DNS name, cold", "split-DNS name, warm"];

/// One of the two.
enum Client<'a> {
    Tailscaled(Tailscaled),
    Tailcar(&'a Bed, Sidecar<'a>),
}

/// A page: how long it took, failures before it included, and how many of those there were.
#[derive(Debug, Clone, Copy)]
struct Page {
    taken: Duration,
    failures: u32,
}

impl Client<'_> {
    fn curl(&self) -> Result<Command, Failed> {
        Ok(match self {
            Self::Tailscaled(daemon) => daemon.beside("curl"),
            Self::Tailcar(bed, sidecar) => {
                let mut command = bed.hosts.apps.command("curl");
                command.arg("--proxy").arg(format!("socks5h://{}", sidecar.listener()?));
                command
            }
        })
    }

    /// Loads the page at `host` until it comes. The start of the last curl does not count.
    fn page(&self, host: &str) -> Result<Page, Failed> {
        let (start, mut failures) = (Instant::now(), 0);
        loop {
            let before = start.elapsed();
            let mut curl = self.curl()?;
            curl.args(["-sS", "--max-time", "10", "--write-out", "%{time_total}"]).arg(format!("http://{host}/"));
            let output = curl.output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if let Some(seconds) = text.strip_prefix("tailcar site app\n") {
                return Ok(Page { taken: before + Duration::from_secs_f64(seconds.parse()?), failures });
            }
            if start.elapsed() > LIMIT {
                return Err(format!("{host}: {output:?}").into());
            }
            failures += 1;
            thread::sleep(AGAIN);
        }
    }

    /// One round: a page for each of [`ROWS`].
    fn round(&self, apps: &Apps) -> Result<[Page; 4], Failed> {
        let (name, _) = apps.fresh('n', "app.test");
        let first = self.page(&name)?;
        for _ in 2..10 {
            self.page(&name)?;
        }
        let tenth = self.page(&name)?;
        let (name, _) = apps.fresh('n', SPLIT);
        Ok([first, tenth, self.page(&name)?, self.page(&name)?])
    }
}

/// Brings the bed up, measures, prints the table and takes the bed down.
pub(crate) fn run(peers: &Path) -> ExitCode {
    let result = Bed::up(peers).and_then(|bed| table(&bed));
    crate::take_down(result.is_err());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("measure: {}", words(&error)));
            ExitCode::FAILURE
        }
    }
}

fn table(bed: &Bed) -> Result<(), Failed> {
    // Nothing leaks here that counts, but the bed's own rules add to these.
    leak::reset(&bed.hosts.apps)?;
    let apps = bed.apps()?;
    apps.offer(&[(SPLIT, json!([{ "Addr": SPLIT_DNS }]))])?;
    let role = Role { hostname: "reference", tun: "ts0", daemon: &[], up: &["--accept-routes", "--accept-dns"] };
    let reference = Tailscaled::join_with_dns(&apps.places(), &bed.hosts.client, &role, KEY)?;
    // As on a machine that has no other way there: what has no route yet fails at once. With the bed's default route a
    // first connection would go out there and hang until curl gives up.
    bed.hosts.client.ip("route del default")?;
    let clients = [Client::Tailscaled(reference), Client::Tailcar(bed, apps.launch(bed).ready()?)];
    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (client, rounds) in clients.iter().zip(&mut rounds) {
            rounds.push(client.round(apps)?);
        }
    }
    let mut out = std::io::stdout().lock();
    let what = "ms: median (range), tries that failed, in how many rounds";
    writeln!(out, "{ROUNDS} rounds, routes approved 300 ms after they are advertised; {what}")?;
    writeln!(out, "{:<24}{:<36}tailcar", "", "tailscaled, kernel TUN")?;
    for (row, title) in ROWS.iter().enumerate() {
        let [theirs, ours] = rounds.each_ref().map(|rounds| summary(rounds.iter().map(|round| round[row])));
        writeln!(out, "{title:<24}{theirs:<36}{ours}")?;
    }
    Ok(())
}

/// Median and range in milliseconds, and how many tries failed in how many rounds.
fn summary(pages: impl Iterator<Item = Page>) -> String {
    let mut pages: Vec<Page> = pages.collect();
    pages.sort_by_key(|page| page.taken);
    let ms = |page: &Page| page.taken.as_secs_f64() * 1000.0;
    let middle = f64::midpoint(ms(&pages[(pages.len() - 1) / 2]), ms(&pages[pages.len() / 2]));
    let (tries, rounds) =
        (pages.iter().map(|page| page.failures).sum::<u32>(), pages.iter().filter(|page| page.failures > 0));
    format!("{middle:.1} ({:.1}-{:.1}), {tries} in {}", ms(&pages[0]), ms(&pages[pages.len() - 1]), rounds.count())
}
