//! The routes of app connectors: awaited, withheld, withdrawn, doubled, and overlapped by another peer's.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::json;

use super::app_connectors::{fails, served, with_apps};
use crate::apps::{Apps, WIDE, Which};
use crate::bed::Bed;
use crate::process::{tail, until};
use crate::sidecar::Sidecar;
use crate::tailscaled::{Role, Tailscaled};
use crate::testcontrol::KEY;

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A route that is never approved ends the request within `--dial-timeout`, by a code that says who and what to check.
pub(crate) fn a_route_that_is_never_approved_has_its_code(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        apps.ask("auto_approve", json!({ "on": true, "withhold": ["10.30.0.86/32"] }))?;
        let sidecar = apps.launch(bed).args(&["--dial-timeout", "2s"]).ready()?;
        // What is timed is the wait for a route, and not the way to the connector.
        until(PATIENCE, "the way to the connector", || Ok(served(&sidecar, "web.app.test").ok()))?;
        let start = Instant::now();
        let told = fails(&sidecar, "never.app.test", &["TC-1506"], Duration::from_secs(4))?;
        // A quarter of the dial is kept for connecting.
        if start.elapsed() < Duration::from_millis(1400) {
            return Err(format!("given up after {:?}", start.elapsed()).into());
        }
        match ["conn.tb.example", "never.app.test", "10.30.0.86", "autoApprovers"]
            .iter()
            .find(|it| !told.contains(**it))
        {
            None => Ok(()),
            Some(missing) => Err(format!("{missing} is not in {told}").into()),
        }
    })
}

/// A route that is withdrawn while it is in use is asked for anew: new connections wait for it, end by their code, and
/// get through once it is back.
pub(crate) fn a_route_that_is_withdrawn_is_asked_for_anew(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).args(&["--dial-timeout", "4s"]).ready()?;
        served(&sidecar, "withdrawn.app.test")?;
        let asked = || apps.asked("withdrawn.app.test", Which::First);
        let at_first = asked();
        apps.ask("auto_approve", json!({ "on": true, "withhold": ["10.30.0.87/32"] }))?;
        until(PATIENCE, "the route to be gone", || {
            Ok(fails(&sidecar, "withdrawn.app.test", &["TC-1506"], PATIENCE).ok())
        })?;
        let in_vain = asked();
        if in_vain == at_first {
            return Err("the connector was not asked again".into());
        }
        let waiting = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| served(&sidecar, "withdrawn.app.test"));
            // It is asked for when the wait has begun.
            until(PATIENCE, "a request that waits", || Ok((asked() > in_vain).then_some(())))?;
            apps.ask("auto_approve", json!({ "on": true }))?;
            waiting.join().map_err(|_| Failed::from("a thread panicked"))?
        });
        waiting.map(drop)
    })
}

/// Two connectors that advertise the same address: either serves it, and the other at once when control says that one
/// is offline.
pub(crate) fn an_address_of_two_connectors_is_served_by_either(bed: &Bed) -> Result<(), Failed> {
    const SHARED: &str = "shared.both.test";
    with_apps(bed, |apps| {
        // Each learns the address by being asked for it while the other is said to be offline.
        for (asked, other) in [(Which::First, Which::Second), (Which::Second, Which::First)] {
            online(apps, asked, true)?;
            online(apps, other, false)?;
            served(&apps.launch(bed).ready()?, SHARED)?;
        }
        for which in [Which::First, Which::Second] {
            online(apps, which, true)?;
            until(PATIENCE, "both to have the route", || {
                Ok(apps.routes(which)?.contains(&"10.30.0.90/32".to_owned()).then_some(()))
            })?;
        }
        let sidecar = apps.launch(bed).ready()?;
        served(&sidecar, SHARED)?;
        for (offline, other) in [(Which::First, Which::Second), (Which::Second, Which::First)] {
            if other == Which::First {
                told(&sidecar, || online(apps, other, true))?;
            }
            told(&sidecar, || online(apps, offline, false))?;
            let elsewhere = || {
                let (by, at) = served(&sidecar, SHARED)?;
                Ok::<_, Failed>(by == other.address() && at == "10.30.0.90")
            };
            // A connection that is being made while the route moves may break, as those that were made before.
            until(Duration::from_secs(2), "the other one to serve", || Ok(elsewhere().unwrap_or(false).then_some(())))?;
            for _ in 0..5 {
                if !elsewhere()? {
                    return Err(format!("{} does not go on serving", other.name()).into());
                }
            }
        }
        Ok(())
    })
}

/// Changes what control says, and waits until the sidecar has heard something: a connection that was made just before goes
/// on by the other connector, where nobody knows it, and hangs.
fn told(sidecar: &Sidecar<'_>, change: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    let heard = || sidecar.process.log().matches("netmap changes=").count();
    let before = heard();
    change()?;
    until(Duration::from_secs(2), "the sidecar to hear of it", || Ok((heard() > before).then_some(())))
}

/// What control says of a connector, which goes on as it is.
pub(super) fn online(apps: &Apps, which: Which, online: bool) -> Result<(), Failed> {
    apps.ask("alter", json!({ "node": which.name(), "online": online })).map(drop)
}

/// Another peer's wider route covers the address: the connector's own is waited for and used; where that one does not
/// come, the other serves, and the log says so.
pub(crate) fn another_peers_wider_route_stands_in_and_the_log_says_so(bed: &Bed) -> Result<(), Failed> {
    const SAYS: &str = "an app connector's name goes by another peer's wider route";
    with_apps(bed, |apps| {
        let advertise = format!("--advertise-routes={WIDE}");
        let role = Role {
            hostname: "wide",
            tun: "userspace-networking",
            // After the bed's own, which the second connector on this host has.
            daemon: &["--port=41642"],
            up: &[&advertise],
        };
        let _wide = Tailscaled::join(&apps.places(), &bed.hosts.conn2, &role, KEY)?;
        until(PATIENCE, "the wider route", || {
            let routes = apps.ask("approved", json!({ "node": "wide" }))?;
            Ok(routes.as_array().is_some_and(|routes| routes.iter().any(|route| route == WIDE)).then_some(()))
        })?;
        apps.ask("auto_approve", json!({ "on": true, "withhold": ["10.30.2.80/32"] }))?;
        let sidecar = apps.launch(bed).ready()?;
        let (by, at) = served(&sidecar, "wide.app.test")?;
        let log = sidecar.process.log();
        if by != Which::Second.address() || at != "10.30.2.80" || !log.contains(SAYS) || !log.contains("wide") {
            return Err(format!("at {at} by {by}\n{}", tail(&log)).into());
        }
        apps.ask("auto_approve", json!({ "on": true }))?;
        until(PATIENCE, "the connector's own route", || {
            Ok(apps.routes(Which::First)?.contains(&"10.30.2.80/32".to_owned()).then_some(()))
        })?;
        let fresh = apps.launch(bed).ready()?;
        let (by, _) = served(&fresh, "wide.app.test")?;
        if by != Which::First.address() || fresh.process.log().contains(SAYS) {
            return Err(
                format!("by {by}, though the connector's own route is there\n{}", tail(&fresh.process.log())).into()
            );
        }
        Ok(())
    })
}
