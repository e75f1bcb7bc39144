//! Names: each is asked of its own resolver through the tailnet, and each failure has its own answer.

use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::process::{output, until};
use crate::sidecar::Launch;

/// Split DNS through the router: addresses of one family and of both, aliases, too much for a datagram, a spare resolver.
pub(crate) fn split_dns_names_lead_to_the_lan(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let asked = bed.corp.questions("web.corp.test");
    for name in [
        "web.corp.test",
        "WEB.Corp.TEST",
        "web.corp.test.",
        "v4.corp.test",
        "v6.corp.test",
        "alias.corp.test",
        "alias6.corp.test",
        "many.corp.test",
        "web.spare.test",
    ] {
        sidecar.page(name, "corp")?;
        let page = sidecar.get_absolute(name, "/")?;
        if page.text() != "tailcar site corp\n" {
            return Err(format!("{name} as a plain request: {} {:?}", page.status, page.text()).into());
        }
    }
    match bed.corp.questions("web.corp.test") > asked {
        true => Ok(()),
        false => Err("the LAN's resolver was never asked".into()),
    }
}

/// MagicDNS: short and full, with a trailing dot, in any case, extra records, and the search domain.
pub(crate) fn magic_dns_names_lead_to_peers(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for name in ["web", "WEB", "web.", "web.tb.example", "Web.TB.Example", "web.tb.example."] {
        sidecar.page(name, "web")?;
    }
    for name in ["extra.tb.example", "extra6.tb.example", "v4", "v6", "alias"] {
        sidecar.page(name, "corp")?;
    }
    Ok(())
}

/// A renamed peer answers to its new name, and no longer to the old one.
pub(crate) fn a_renamed_peer_is_found_by_its_new_name(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page("web", "web")?;
    let id = bed.headscale().id("web")?;
    bed.headscale().cli(&["nodes", "rename", "-i", &id, "renamed"])?;
    let found = until(Duration::from_secs(10), "the new name", || Ok(sidecar.page("renamed", "web").ok()));
    let old = sidecar.socks("web.tb.example", 80).map(|(code, _)| code);
    bed.headscale().cli(&["nodes", "rename", "-i", &id, "web"])?;
    found?;
    match old? {
        4 => Ok(()),
        other => Err(format!("the old name gave SOCKS {other:02}").into()),
    }
}

/// NXDOMAIN, SERVFAIL, silence and an answer that no route covers, each told apart and none asked elsewhere.
pub(crate) fn each_failure_to_resolve_has_its_own_answer(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for (name, socks, http, error) in [
        ("absent.corp.test", 4, 502, "dns_error"),
        ("absent.tb.example", 4, 502, "dns_error"),
        ("any.failing.test", 4, 502, "dns_error"),
        ("any.silent.test", 4, 504, "dns_timeout"),
    ] {
        let start = Instant::now();
        let (code, response) = thread::scope(|scope| {
            let code = scope.spawn(|| sidecar.socks(name, 80));
            let (response, _) = sidecar.tunnel(&format!("{name}:80"))?;
            let (code, _) = code.join().map_err(|_| "a thread panicked")??;
            Ok::<_, Failed>((code, response))
        })?;
        response.expect(http, "TC-14").map_err(|why| format!("{name}: {}", why.message().unwrap_or("")))?;
        let status = response.header("proxy-status").unwrap_or("");
        if code != socks || !status.contains(error) {
            return Err(format!("{name}: SOCKS {code:02}, Proxy-Status {status}").into());
        }
        if start.elapsed() > Duration::from_secs(40) {
            return Err(format!("{name} took {:?}", start.elapsed()).into());
        }
    }
    for name in ["unrouted.corp.test", "leak.corp.test", "outside.corp.test", "any.away.test", "public.example"] {
        let (code, _) = sidecar.socks(name, 80)?;
        if !matches!(code, 2..=4) {
            return Err(format!("{name}: SOCKS {code:02}").into());
        }
    }
    Ok(())
}

/// An answer is asked for again when its TTL is over, and not before.
pub(crate) fn an_answer_is_remembered_for_its_time(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let asked = |name: &str| -> Result<usize, Failed> {
        let before = bed.corp.questions(name);
        sidecar.page(name, "corp")?;
        Ok(bed.corp.questions(name) - before)
    };
    // Its TTL is a minute, that of the other 0: one question in each family.
    let counts = [asked("kept.corp.test")?, asked("kept.corp.test")?, asked("v4.corp.test")?, asked("v4.corp.test")?];
    match counts {
        [2, 0, 2, 2] => Ok(()),
        other => Err(format!("the LAN's resolver was asked {other:?} times").into()),
    }
}

/// However many want a name at once, it is asked for once in each family.
pub(crate) fn many_dials_of_one_name_ask_once(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let before = bed.corp.questions("burst.corp.test");
    thread::scope(|scope| {
        let dials: Vec<_> = (0..20).map(|_| scope.spawn(|| sidecar.page("burst.corp.test", "corp"))).collect();
        for dial in dials {
            dial.join().map_err(|_| "a thread panicked")??;
        }
        Ok::<_, Failed>(())
    })?;
    match bed.corp.questions("burst.corp.test") - before {
        2 => Ok(()),
        other => Err(format!("the LAN's resolver was asked {other} times").into()),
    }
}

/// Underscores, the longest label, the longest name, and letters beyond ASCII.
pub(crate) fn odd_names_are_names(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let long = "l".repeat(63);
    let longest = format!("{long}.{long}.{long}.{}.corp.test", "m".repeat(51));
    for name in ["_under_score.corp.test", &format!("{long}.corp.test"), &longest, "b\u{fc}cher.corp.test"] {
        let (code, _) = sidecar.socks(name, 80)?;
        if code != 0 {
            return Err(format!("{name}: SOCKS {code:02}").into());
        }
    }
    for name in [&format!("l{long}.corp.test"), &format!("m{longest}")] {
        let (code, _) = sidecar.socks(name, 80)?;
        if code == 0 {
            return Err(format!("{name} was reached").into());
        }
    }
    Ok(())
}

/// Whatever its own resolver does, a name under a split suffix is never asked of another.
pub(crate) fn a_name_under_a_split_suffix_is_asked_nowhere_else(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let names = ["nowhere.corp.test", "nowhere.failing.test", "nowhere.silent.test", "nowhere.away.test"];
    thread::scope(|scope| {
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(|| sidecar.socks(name, 80))).collect();
        for (name, asked) in names.iter().zip(asked) {
            let (code, _) = asked.join().map_err(|_| "a thread panicked")??;
            if code == 0 {
                return Err(Failed::from(format!("{name} was reached")));
            }
        }
        Ok(())
    })?;
    // The trap's log is not blind: a count of none means something.
    let mut lookup = bed.hosts.web.command("getent");
    lookup.args(["ahostsv4", "nowhere.example"]);
    output(lookup)?;
    until(Duration::from_secs(5), "the trap to say what it was asked", || {
        Ok((bed.strayed("nowhere.example") > 0).then_some(()))
    })?;
    if bed.corp.questions("nowhere.corp.test") == 0 {
        return Err("the LAN's resolver was not asked for its own name".into());
    }
    for name in names {
        let elsewhere = if name.ends_with(".corp.test") { 0 } else { bed.corp.questions(name) };
        if bed.strayed(name) + elsewhere > 0 {
            return Err(
                format!("{name} was asked {} times of the trap, {elsewhere} of the LAN", bed.strayed(name)).into()
            );
        }
    }
    Ok(())
}
