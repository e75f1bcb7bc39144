//! App connectors: names that only a connector resolves, at addresses that become routes by being asked for.

use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::apps::{Apps, Which};
use crate::bed::Bed;
use crate::process::tail;
use crate::sidecar::Sidecar;
use crate::tailscaled::{Role, Tailscaled};
use crate::testcontrol::KEY;

/// How much longer than what it waits for a first request may take on a loaded machine.
pub(super) const SLACK: Duration = Duration::from_millis(2500);
/// How long a request may take that waits for nothing.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Runs a scenario with the connectors, and holds that no name of theirs was asked elsewhere.
pub(super) fn with_apps(bed: &Bed, scenario: impl FnOnce(&Apps) -> Result<(), Failed>) -> Result<(), Failed> {
    let apps = bed.apps()?;
    scenario(apps)?;
    apps.kept_to_themselves(bed)
}

/// Which addresses a request to `host` came from and arrived at, as its site saw them, without ports.
pub(super) fn served(sidecar: &Sidecar<'_>, host: &str) -> Result<(String, String), Failed> {
    let told = |why: Failed| format!("{host}: {}\n{}", why.message().unwrap_or(""), tail(&sidecar.process.log()));
    let answer = sidecar.get(host, "/headers").map_err(told)?;
    let seen: Value = serde_json::from_slice(&answer.body)?;
    let side = |name: &str| {
        let address = seen[name].as_str().and_then(|address| address.rsplit_once(':')).map_or("", |(ip, _)| ip);
        address.trim_matches(['[', ']']).to_owned()
    };
    Ok((side("remote"), side("local")))
}

/// Holds that `host` fails by one of these codes, within `limit`; the text of the failure.
pub(super) fn fails(sidecar: &Sidecar<'_>, host: &str, codes: &[&str], limit: Duration) -> Result<String, Failed> {
    let start = Instant::now();
    let (response, _) = sidecar.tunnel(&format!("{host}:80"))?;
    let found = response.header("x-tailcar-error").unwrap_or("");
    let code = codes.iter().find(|code| found.starts_with(**code)).or(codes.first()).copied().unwrap_or("");
    let status = if matches!(code, "TC-1404" | "TC-1405") { 504 } else { 502 };
    response.expect(status, code).map_err(|why| format!("{host}: {}", why.message().unwrap_or("")))?;
    match start.elapsed() {
        taken if taken > limit => Err(format!("{host} took {taken:?} to fail by {code}").into()),
        _ => Ok(response.text()),
    }
}

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

/// A page of a name that nobody has asked for comes at the first try, however long its route's approval takes; the
/// next pages ask and wait for nothing. IPv4 alone, IPv6 alone, and both.
pub(crate) fn the_first_request_of_a_new_name_gets_its_page(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).ready()?;
        for delay in [0, 300, 2000] {
            apps.ask("auto_approve", json!({ "on": true, "delay_ms": delay }))?;
            let approval = Duration::from_millis(delay);
            let one = |kind| first_and_next(apps, &sidecar, kind, approval);
            thread::scope(|scope| {
                let pages = ['n', 's', 'd'].map(|kind| scope.spawn(move || one(kind)));
                pages.into_iter().try_for_each(|page| page.join().map_err(|_| "a thread panicked")?)
            })?;
        }
        Ok(())
    })
}

fn first_and_next(apps: &Apps, sidecar: &Sidecar<'_>, kind: char, approval: Duration) -> Result<(), Failed> {
    let (name, number) = apps.fresh(kind, "app.test");
    let wanted = [format!("10.30.1.{number}"), format!("fdaa:2:1::{number}")];
    let timed = || {
        let start = Instant::now();
        let (by, at) = served(sidecar, &name)?;
        match wanted.contains(&at) {
            true => Ok(start.elapsed()),
            false => Err(Failed::from(format!("{name} at {at} by {by}"))),
        }
    };
    let first = timed()?;
    // The machine may stop for a moment in one of two requests. What waits does so in both.
    let next = timed()?.min(timed()?);
    let asked = apps.asked(&name, Which::First);
    match first <= approval + SLACK && next <= AT_ONCE && (1..=4).contains(&asked) {
        true => Ok(()),
        false => Err(format!("{name} took {first:?}, then {next:?}, after {asked} questions").into()),
    }
}

/// Whatever a connector's answer looks like, its address is reached at the first try, by that connector, and again.
pub(crate) fn answers_of_every_shape_lead_to_their_site(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).ready()?;
        for (name, addresses) in [
            // The suffix itself, and names below it.
            ("app.test", "10.30.0.81"),
            ("web.app.test", "10.30.0.80"),
            ("WEB.App.test.", "10.30.0.80"),
            // Within a network that the connector routes anyway.
            ("v6.app.test", "fdaa:1:ffff::80"),
            ("lone6.app.test", "fdaa:2::81"),
            ("pair.app.test", "10.30.0.82 fdaa:2::82"),
            // By two aliases, and by one outside the suffix.
            ("alias.app.test", "10.30.0.83"),
            ("far.app.test", "10.30.0.84"),
            // Not to be remembered.
            ("zero.app.test", "10.30.0.85"),
        ] {
            for _ in 0..2 {
                let (by, at) = served(&sidecar, name)?;
                if !addresses.split(' ').any(|address| address == at) || !by.ends_with(".0.1") && !by.ends_with("::1") {
                    return Err(format!("{name} was {at}, served by {by}").into());
                }
            }
        }
        for _ in 0..2 {
            let (_, at) = served(&sidecar, "many.app.test")?;
            if !(128..=160).any(|last| at == format!("10.30.0.{last}")) {
                return Err(format!("one of many was {at}").into());
            }
        }
        match (apps.asked("zero.app.test", Which::First), apps.asked("alias.app.test", Which::First)) {
            (5.., 1..=4) => Ok(()),
            other => Err(format!("asked for what has no time to live, and for what has: {other:?}").into()),
        }
    })
}

/// An address that moves is followed once the old answer's time is over.
pub(crate) fn an_address_that_moves_is_followed_after_its_time(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        apps.move_to(bed, "10.30.0.91")?;
        let sidecar = apps.launch(bed).ready()?;
        let (_, first) = served(&sidecar, "moving.app.test")?;
        apps.move_to(bed, "10.30.0.92")?;
        // Its time to live is one second.
        thread::sleep(Duration::from_millis(1200));
        let (_, second) = served(&sidecar, "moving.app.test")?;
        match (first.as_str(), second.as_str()) {
            ("10.30.0.91", "10.30.0.92") => Ok(()),
            other => Err(format!("served at {other:?}").into()),
        }
    })
}

/// What a connector says that it does not know, or will not tell, is its last word.
pub(crate) fn a_connectors_no_is_told_and_nobody_else_is_asked(bed: &Bed) -> Result<(), Failed> {
    with_apps(bed, |apps| {
        let sidecar = apps.launch(bed).ready()?;
        let limit = Duration::from_secs(5);
        fails(&sidecar, "absent.app.test", &["TC-1401"], limit)?;
        fails(&sidecar, "any.refused.test", &["TC-1403"], limit)?;
        // A filter that lets no one ask: port 53 of 0.0.0.0 is what a connector looks at.
        let within =
            json!({ "SrcIPs": ["*"], "DstPorts": [{ "IP": "100.64.0.0/10", "Ports": { "First": 0, "Last": 65535 } }] });
        apps.ask("alter", json!({ "node": "conn", "filter": [within] }))?;
        let told = until_told(&sidecar, "TC-1407")?;
        if !told.contains("conn") {
            return Err(format!("it does not name the connector: {told}").into());
        }
        // Another connector for the same suffix may still answer.
        let (name, _) = apps.fresh('n', "both.test");
        served(&sidecar, &name)?;
        match (apps.asked(&name, Which::First), apps.asked(&name, Which::Second)) {
            (0, 1..) => Ok(()),
            other => Err(format!("{name} reached resolvers by {other:?}").into()),
        }
    })
}

/// Asks for names that do not exist until the answer is another one than that.
fn until_told(sidecar: &Sidecar<'_>, code: &str) -> Result<String, Failed> {
    let start = Instant::now();
    for turn in 0.. {
        let name = format!("forbidden{turn}.app.test");
        match fails(sidecar, &name, &[code], Duration::from_secs(5)) {
            Ok(told) => return Ok(told),
            Err(why) if start.elapsed() > Duration::from_secs(5) => return Err(why),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
    Err("it never ended".into())
}
