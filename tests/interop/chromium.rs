//! Debian's Chromium, headless, with nothing of its own on the network.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::namespace::Namespace;
use crate::process::{Process, tail};

/// How long a page may take to settle: four browsers start on a machine with two cores.
const LIMIT: Duration = Duration::from_secs(45);

/// What keeps a browser to the page: no updates, no sync, no probes, no QUIC, no names resolved by itself.
const FLAGS: [&str; 16] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--disable-features=MediaRouter,OptimizationHints,DialMediaRouteProvider,Translate,NetworkTimeServiceQuerying",
    "--proxy-bypass-list=<-loopback>",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
];

/// Loads `url` on `host` through `proxy` in a fresh profile; the document as it is once everything has loaded, or
/// Chromium's own name for why it has none (`ERR_…`).
///
/// # Errors
/// When the browser fails, is not there, or does not end by itself in time.
pub(crate) fn dom(bed: &Bed, host: &Namespace, proxy: &str, url: &str) -> Result<String, Failed> {
    static COUNT: AtomicUsize = AtomicUsize::new(1);
    let name = format!("chromium-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let profile = bed.folder.join(&name);
    fs::create_dir_all(&profile)?;
    let page = bed.folder.join(format!("{name}.html"));
    let script = "exec chromium \"$@\" >\"$PAGE\"";
    let mut command = host.command("sh");
    command.env("HOME", &profile).env("PAGE", &page).args(["-c", script, "chromium"]).args(FLAGS);
    command.arg(format!("--user-data-dir={}", profile.display())).arg(format!("--proxy-server={proxy}"));
    command.args(["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--virtual-time-budget=15000"]);
    command.args(["--dump-dom", url]);
    let mut browser = Process::start(command, &name, &bed.folder, false)?.transient(host);
    let ended = browser.wait(LIMIT);
    let log = browser.log();
    drop(browser);
    let status = ended.map_err(|why| format!("{}\n{}", why.message().unwrap_or(""), tail(&log)))?;
    let document = fs::read_to_string(page)?;
    if status.success() && document.contains("</html>") {
        return Ok(document);
    }
    if let Some((_, why)) = log.split_once("Page load failed: net::") {
        return Ok(why.lines().next().unwrap_or(why).to_owned());
    }
    Err(format!("chromium ended with {status} and {} bytes\n{}", document.len(), tail(&log)).into())
}
