//! Two routers of one network: which of them is used, and how soon the other when one goes.

use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::headscale::{BROWSER, KeyKind};
use crate::nat_nodes::knows;
use crate::process::{output, until};
use crate::say;
use crate::sidecar::{Launch, Sidecar};
use crate::tailscaled::{Places, Role, Tailscaled};
use crate::testcontrol::{KEY, TestControl};

/// After control or silence said that a router is gone, a new connection takes no longer.
const BOUND: Duration = Duration::from_secs(2);

/// Silence says so after that: see the constants of `engine::standing`, and a look at peers each quarter second.
const SILENCE: Duration = Duration::from_millis(2_000);

/// The same for a router that a sidecar has had no session with: the router may not have learned of it yet, so it is
/// given three seconds before its silence means anything. The bound counts from then.
const SILENCE_UNMET: Duration = Duration::from_millis(3_500);

/// The host on the LAN that all of this is about.
const HOST: &str = "10.20.0.80";

/// Whom the LAN's site sees: the router that forwarded the connection.
fn router_of(sidecar: &Sidecar<'_>, host: &str) -> Result<String, Failed> {
    let answer = sidecar.get(host, "/headers")?;
    let seen: Value = serde_json::from_slice(&answer.body)?;
    let remote = seen["remote"].as_str().unwrap_or("").to_owned();
    Ok(remote.rsplit_once(':').map_or("", |(address, _)| address).to_owned())
}

/// Fails unless a new connection to the host goes through this router, within `limit`.
fn goes_by(sidecar: &Sidecar<'_>, host: &str, router: &str, limit: Duration) -> Result<(), Failed> {
    let start = Instant::now();
    let by = router_of(sidecar, host)?;
    let took = start.elapsed();
    say(&format!("         {host} by {by} in {} ms", took.as_millis()));
    if by != router || took > limit {
        return Err(format!("{host} was reached by {by} in {took:?}, not by {router} within {limit:?}").into());
    }
    Ok(())
}

/// Waits until the routers have heard of the sidecar: those that have not answer nobody, whichever is used.
fn known<const N: usize>(sidecar: &Sidecar<'_>, routers: [&Tailscaled; N]) -> Result<(), Failed> {
    let address = &sidecar.ready["node"]["addresses"][0];
    routers.into_iter().try_for_each(|router| knows(router, "a router", address))
}

/// headscale notices a dead primary by its probes; from then on the other one is used.
pub(crate) fn the_router_that_control_names_next_is_used_at_once(bed: &Bed) -> Result<(), Failed> {
    let key = bed.headscale().mint(KeyKind { tag: "tag:router", ..BROWSER })?;
    let role = Role { hostname: "router2", tun: "ts0", daemon: &[], up: &["--advertise-routes=10.20.0.0/24"] };
    let second = Tailscaled::join(&bed.places(), &bed.hosts.router2, &role, &key.secret)?;
    let result = moves(bed, &second);
    // The bed's router serves alone again, for whoever comes next. headscale probes only rivals: one whose last rival
    // leaves while it counts as unwell stays without the route until it comes anew.
    let mut logout = second.command();
    logout.arg("logout");
    output(logout)?;
    bed.router().down()?;
    bed.router().up_again()?;
    primary(bed, "router")?;
    result
}

/// The bed's router stops, and the second one is used.
fn moves(bed: &Bed, second: &Tailscaled) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    known(&sidecar, [&*bed.router(), second])?;
    goes_by(&sidecar, HOST, "10.20.0.1", BOUND)?;
    bed.router().process.signal(Signal::STOP);
    let moved = primary(bed, "router2").and_then(|()| goes_by(&sidecar, HOST, "10.20.0.2", BOUND));
    bed.router().process.signal(Signal::CONT);
    moved
}

/// Waits until headscale gives the LAN's route to this node.
fn primary(bed: &Bed, router: &str) -> Result<(), Failed> {
    until(Duration::from_secs(20), &format!("headscale to give {router} the route"), || {
        let node = bed.headscale().node(router)?.unwrap_or_default();
        let routes = node["subnet_routes"].as_array().cloned().unwrap_or_default();
        Ok(routes.iter().any(|route| route == "10.20.0.0/24").then_some(()))
    })
}

/// Two routers that a tbcontrol lets serve the LAN: its own control knows nothing of their health.
struct Routers {
    control: TestControl,
    first: Tailscaled,
    second: Tailscaled,
}

impl Routers {
    /// Joins both, each with its routes.
    fn join(bed: &Bed, first: &[&str], second: &[&str]) -> Result<Self, Failed> {
        let mut control = TestControl::start(bed)?;
        let (authority, url) = (control.authority.clone(), control.url.clone());
        let places = Places { peers: &bed.peers, authority: &authority, folder: &bed.folder, control: &url };
        // On the host of the bed's own router, whose port is taken.
        bed.hosts.client.nft("insert rule inet leak out ip daddr 10.99.0.13 udp dport 41642 accept")?;
        bed.hosts.client.nft("insert rule inet leak out ip daddr 10.20.0.1 udp dport 41642 accept")?;
        let advertise =
            [format!("--advertise-routes={}", first.join(",")), format!("--advertise-routes={}", second.join(","))];
        let join = |hostname, tun, daemon, host, up: &String| {
            Tailscaled::join(&places, host, &Role { hostname, tun, daemon, up: &[up.as_str()] }, KEY)
        };
        let one = join("tb-one", "userspace-networking", &["--port=41642"], &bed.hosts.router, &advertise[0])?;
        control.node("tb-one")?;
        let two = join("tb-two", "ts0", &[], &bed.hosts.router2, &advertise[1])?;
        control.node("tb-two")?;
        for (name, routes) in [("tb-one", first), ("tb-two", second)] {
            control.ask("routes", json!({ "node": name, "prefixes": routes }))?;
        }
        Ok(Self { control, first: one, second: two })
    }
}

/// A router whose host is gone and of which control says nothing: its silence is enough, with a session and without.
pub(crate) fn a_silent_router_is_left_although_control_calls_it_online(bed: &Bed) -> Result<(), Failed> {
    let mut routers = Routers::join(bed, &["10.20.0.0/24"], &["10.20.0.0/24"])?;
    // Control prefers the first: of two equal ones the nearer would be used, whichever that is at the moment.
    routers.control.ask("alter", json!({ "node": "tb-two", "primary": [] }))?;
    let sidecar = routers.control.launch(bed).ready()?;
    known(&sidecar, [&routers.first, &routers.second])?;
    goes_by(&sidecar, HOST, "10.20.0.1", BOUND)?;
    routers.first.process.signal(Signal::STOP);
    let mut result = goes_by(&sidecar, HOST, "10.20.0.2", SILENCE + BOUND);
    result = result.and_then(|()| goes_by(&sidecar, HOST, "10.20.0.2", SILENCE / 2));
    // One that knows neither of them yet.
    let other = routers.control.launch(bed).ready()?;
    result = result.and_then(|()| known(&other, [&routers.second]));
    result = result.and_then(|()| goes_by(&other, HOST, "10.20.0.2", SILENCE_UNMET + BOUND));
    routers.first.process.signal(Signal::CONT);
    result?;
    // It has to answer for half a minute first, and each time within 0.4 s: where the machine stands still for longer, the
    // half minute begins anew.
    until(Duration::from_secs(150), "the router to be used again when it has been heard for a while", || {
        // What is open by the other one when the route moves back is reset by the site.
        Ok(router_of(&sidecar, HOST).is_ok_and(|by| by == "10.20.0.1").then_some(()))
    })
}

/// A part of a network that another router serves goes by that one.
pub(crate) fn the_longest_prefix_decides_between_two_routers(bed: &Bed) -> Result<(), Failed> {
    let routers = Routers::join(bed, &["10.20.0.0/24"], &["10.20.0.128/25"])?;
    let sidecar = routers.control.launch(bed).ready()?;
    known(&sidecar, [&routers.first, &routers.second])?;
    goes_by(&sidecar, HOST, "10.20.0.1", BOUND)?;
    goes_by(&sidecar, "10.20.0.200", "10.20.0.2", BOUND)
}
