//! Subnet routes: used when approved, refused when withdrawn, never replaced by the public path.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;

use crate::bed::Bed;
use crate::process::until;
use crate::sidecar::Launch;

/// How long a router may take to hear of a node.
const KNOWN: Duration = Duration::from_secs(10);

/// Hosts behind the router, by address of both families, over every way in.
pub(crate) fn a_lan_behind_the_router_is_reached_by_address(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for host in ["10.20.0.80", "fd20::80"] {
        sidecar.page(host, "corp")?;
    }
    for authority in ["10.20.0.80:80", "[fd20::80]:80"] {
        let (response, _) = sidecar.tunnel(authority)?;
        if response.status != 200 {
            return Err(format!("CONNECT {authority}: {} {}", response.status, response.text()).into());
        }
    }
    Ok(())
}

/// A route begins to work when it is approved; withdrawn, new connections end with a code and go nowhere.
pub(crate) fn a_withdrawn_route_ends_new_connections_with_its_code(bed: &Bed) -> Result<(), Failed> {
    let usual = ["10.20.0.0/24", "fd20::/64"];
    let sidecar = Launch::new(bed).args(&["--dial-timeout", "2s"]).ready()?;
    let (response, _) = sidecar.tunnel("10.21.0.80:80")?;
    response.expect(403, "TC-1901").map_err(|why| format!("not yet approved: {}", why.message().unwrap_or("")))?;
    bed.headscale().approve("router", &["10.20.0.0/24", "fd20::/64", "10.21.0.0/24"])?;
    let reached = until(Duration::from_secs(10), "the approved route to work", || {
        Ok((sidecar.socks("10.21.0.80", 80)?.0 == 0).then_some(()))
    });
    let page = reached.and_then(|()| sidecar.page("10.21.0.80", "corp"));
    bed.headscale().approve("router", &usual)?;
    page?;
    let response = until(Duration::from_secs(10), "the withdrawn route to be refused", || {
        let (response, _) = sidecar.tunnel("10.21.0.80:80")?;
        // The router may know before the sidecar does: what is dialled then it rejects by its filter, or is silent about.
        let told = !matches!(response.header("x-tailcar-error"), Some("TC-1602" | "TC-1604"));
        Ok((told && response.status != 200).then_some(response))
    })?;
    response.expect(502, "TC-1502")?;
    let status = response.header("proxy-status").unwrap_or("none");
    let (code, _) = sidecar.socks("10.21.0.80", 80)?;
    if code != 3 || !status.contains("error=destination_ip_unroutable") {
        return Err(format!("a withdrawn route gave SOCKS {code:02}, Proxy-Status {status}").into());
    }
    sidecar.page("10.20.0.80", "corp")
}

/// A router that is down: its route has no router, which is not the same as no answer.
pub(crate) fn a_route_whose_router_is_offline_says_so(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).args(&["--dial-timeout", "3s"]).ready()?;
    until(KNOWN, "the router to know the node", || Ok(sidecar.page("10.20.0.80", "corp").ok()))?;
    bed.router().down()?;
    let result = until(Duration::from_secs(25), "headscale to tell that the router is offline", || {
        let (response, _) = sidecar.tunnel("10.20.0.80:80")?;
        let code = response.header("x-tailcar-error").unwrap_or("").to_owned();
        Ok((response.status == 502 && code.starts_with("TC-15")).then_some(()))
    });
    bed.router().up_again()?;
    result?;
    until(Duration::from_secs(20), "the route to work again", || Ok(sidecar.page("10.20.0.80", "corp").ok()))?;
    // Its packets pass before headscale calls it online, and the next scenario's first netmap says what headscale does.
    bed.headscale().online("router", Duration::from_secs(20)).map(drop)
}

/// A peer that does not answer handshakes: bounded by the dial timeout, told as such.
pub(crate) fn a_peer_that_never_handshakes_is_told_from_a_silent_host(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).args(&["--dial-timeout", "3s"]).ready()?;
    bed.router().process.signal(Signal::STOP);
    let start = Instant::now();
    let asleep = sidecar.tunnel("10.20.0.80:80").and_then(|(response, _)| response.expect(504, "TC-16"));
    let took = start.elapsed();
    bed.router().process.signal(Signal::CONT);
    asleep?;
    if took > Duration::from_secs(8) {
        return Err(format!("a dial timeout of 3 s took {took:?}").into());
    }
    until(Duration::from_secs(20), "the router to be back", || Ok(sidecar.page("10.20.0.80", "corp").ok()))?;
    let (response, _) = sidecar.tunnel("10.20.0.99:80")?;
    let code = response.header("x-tailcar-error").unwrap_or("");
    if response.status != 504 || !(code.starts_with("TC-16") || code.starts_with("TC-17")) {
        return Err(format!("a silent host gave {} {code}", response.status).into());
    }
    match sidecar.socks("10.20.0.99", 80)?.0 {
        6 => Ok(()),
        other => Err(format!("a silent host gave SOCKS {other:02}").into()),
    }
}
