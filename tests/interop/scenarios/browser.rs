//! A real browser: one page, thirty subresources and a WebSocket, by each scheme and each kind of name.

use libtest_mimic::Failed;

use crate::apps::Which;
use crate::bed::Bed;
use crate::chromium;
use crate::process::tail;
use crate::sidecar::Launch;

/// Chromium by `http://` and `socks5://`, to a split-DNS name and to a MagicDNS name.
pub(crate) fn chromium_loads_a_page_with_everything_on_it(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let listener = sidecar.listener()?;
    for scheme in ["socks5", "http"] {
        for host in ["web.corp.test", "web.tb.example"] {
            let proxy = format!("{scheme}://{listener}");
            let dom = chromium::dom(bed, &bed.hosts.client, &proxy, &format!("http://{host}/page"))?;
            if !dom.contains("<p id=\"result\">resources=30 ws=ok</p>") {
                return Err(format!("{host} by {scheme}:\n{dom}").into());
            }
        }
    }
    Ok(())
}

/// A page that is not in the tailnet is asked of the sidecar, which refuses it as public: an error, or our page.
pub(crate) fn chromium_gets_no_page_that_is_public(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let listener = sidecar.listener()?;
    let refusals = || {
        let log = sidecar.process.log();
        log.lines().filter(|line| line.contains("code=1901") && line.contains("public.example")).count()
    };
    for (scheme, expected) in [("socks5", "ERR_SOCKS_CONNECTION_FAILED"), ("http", "TC-1901")] {
        let before = refusals();
        let dom = chromium::dom(bed, &bed.hosts.client, &format!("{scheme}://{listener}"), "http://public.example/")?;
        if !dom.contains(expected) {
            return Err(format!("by {scheme} came {dom}").into());
        }
        if refusals() == before {
            return Err(format!("by {scheme} the sidecar was not asked: {dom}").into());
        }
    }
    Ok(())
}

/// A page whose thirty subresources are on five names of two connectors, that nobody has asked for before: all of it
/// is there at the first try. By each scheme.
pub(crate) fn chromium_loads_a_page_of_connector_names_that_nobody_knows(bed: &Bed) -> Result<(), Failed> {
    let apps = bed.apps()?;
    let sidecar = apps.launch(bed).ready()?;
    let listener = sidecar.listener()?;
    for scheme in ["socks5", "http"] {
        let hosts = ["one.test", "two.test", "three.test", "four.test", "five.test"];
        let hosts = hosts.map(|suffix| apps.fresh('d', suffix).0);
        let query = hosts.each_ref().map(|host| format!("host={host}")).join("&");
        let url = format!("http://{}/page?{query}", hosts[0]);
        let dom = chromium::dom(bed, &bed.hosts.apps, &format!("{scheme}://{listener}"), &url)?;
        if !dom.contains("<p id=\"result\">resources=30 ws=ok</p>") {
            return Err(format!("by {scheme}:\n{dom}\n{}", tail(&sidecar.process.log())).into());
        }
        for (host, by) in hosts.iter().zip([Which::First, Which::First, Which::First, Which::Second, Which::Second]) {
            if apps.asked(host, by) == 0 {
                return Err(format!("{host} was not asked of its connector").into());
            }
        }
    }
    apps.kept_to_themselves(bed)
}
