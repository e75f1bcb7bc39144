//! App connectors: names that only a connector resolves, at addresses that become routes by being asked for.

use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::apps::Which;
use crate::bed::Bed;
use crate::tailscaled::{Role, Tailscaled};
use crate::testcontrol::KEY;

/// The bed without us: tailscaled as a client that accepts routes and DNS gets there, but not at its first try.
pub(crate) fn a_real_client_gets_the_page_when_it_tries_again(bed: &Bed) -> Result<(), Failed> {
    let apps = bed.apps()?;
    let role = Role { hostname: "reference", tun: "ts0", daemon: &[], up: &["--accept-routes", "--accept-dns"] };
    let client = Tailscaled::join_with_dns(&apps.places(), &bed.hosts.apps, &role, KEY)?;
    for kind in ['n', 'd'] {
        let (name, _) = apps.fresh(kind, "app.test");
        let start = Instant::now();
        loop {
            let mut curl = client.beside("curl");
            curl.args(["-sS", "--max-time", "2"]).arg(format!("http://{name}/"));
            let answer = curl.output()?;
            let page = String::from_utf8_lossy(&answer.stdout).into_owned();
            if page == "tailcar site app\n" {
                break;
            }
            if start.elapsed() > Duration::from_secs(10) {
                return Err(format!("{name}: {answer:?}").into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        if apps.asked(&name, Which::First) == 0 {
            return Err(format!("{name} was not asked of its connector").into());
        }
    }
    Ok(())
}

/// A page of a name that nobody has asked for comes at the first try, and only its connector was asked for it.
pub(crate) fn the_first_request_of_a_new_name_gets_its_page(bed: &Bed) -> Result<(), Failed> {
    let apps = bed.apps()?;
    let sidecar = apps.launch(bed).ready()?;
    let (name, _) = apps.fresh('n', "app.test");
    sidecar.page(&name, "app")?;
    let strayed = bed.strayed_under("app.test");
    match (apps.asked(&name, Which::First), apps.asked(&name, Which::Second), strayed) {
        (1.., 0, 0) => Ok(()),
        other => Err(format!("{name} was asked of (its connector, the other, elsewhere): {other:?}").into()),
    }
}

/// An address that moves is followed once the old answer's time is over.
pub(crate) fn an_address_that_moves_is_followed_after_its_time(bed: &Bed) -> Result<(), Failed> {
    let apps = bed.apps()?;
    let sidecar = apps.launch(bed).ready()?;
    let serving = || {
        let answer = sidecar.get("moving.app.test", "/headers")?;
        let text: Value = serde_json::from_slice(&answer.body)?;
        Ok::<_, Failed>(text["local"].as_str().unwrap_or("").to_owned())
    };
    let first = serving()?;
    apps.move_to(bed, "10.30.0.92")?;
    // Its time to live is one second.
    thread::sleep(Duration::from_millis(1200));
    let second = serving()?;
    match (first.as_str(), second.as_str()) {
        ("10.30.0.91:80", "10.30.0.92:80") => Ok(()),
        other => Err(format!("served by {other:?}").into()),
    }
}
