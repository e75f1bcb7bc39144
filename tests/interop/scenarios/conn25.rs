//! App connectors of the newer kind: each address of an app's name has a transit address, which a client agrees upon
//! with the connector and sends to it alone. No route needs to be advertised or approved.

use std::cell::Cell;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::apps::{Apps, Which, caps};
use crate::bed::Bed;
use crate::process::{output, until};
use crate::sidecar::Sidecar;
use crate::tailscaled::{Role, Tailscaled};
use crate::testcontrol::KEY;

/// The app.
const APP: &str = "transit";

/// Under what a node's capabilities have the apps of this kind. Source: Tailscale, feature/conn25,
/// `AppConnectorsExperimentalAttrName`.
const APPS: &str = "tailscale.com/app-connectors-experimental";

/// The tag of those who serve it.
const TAG: &str = "tag:transit";

/// What every node is told of the app. Transit addresses are link-local for IPv4, as they may be.
fn attributes() -> Value {
    json!({
        APPS: [
            { "name": APP, "domains": ["transit.test", "*.transit.test"], "connectors": [TAG] },
        ],
        "tailscale.com/app-connectors-experimental-ippools": [{
            "v4MagicIPPool": ["100.99.0.1-100.99.0.200"],
            "v4TransitIPPool": ["169.254.77.1-169.254.77.200"],
            "v6MagicIPPool": ["fd7a:115c:a1e0:a99a:100::-fd7a:115c:a1e0:a99a:100::ffff"],
            "v6TransitIPPool": ["fd7a:115c:a1e0:a99a:200::-fd7a:115c:a1e0:a99a:200::ffff"],
        }],
    })
}

/// The app, served for as long as this lives.
struct App<'a> {
    bed: &'a Bed,
    apps: &'a Apps,
    by: &'a [Which],
    /// How often its names had been asked elsewhere when the last client had come to know it.
    strayed: Cell<usize>,
}

impl<'a> App<'a> {
    fn serve(bed: &'a Bed, by: &'a [Which]) -> Result<Self, Failed> {
        let app = Self { bed, apps: bed.apps()?, by, strayed: Cell::new(0) };
        for which in by {
            let mut node = app.apps.node(which.name())?;
            node["Tags"] = json!([TAG]);
            app.apps.ask("update_node", json!({ "value": node }))?;
            app.configure(*which, &attributes())?;
        }
        Ok(app)
    }

    /// Tells a connector of apps, besides what it always serves.
    fn tell(&self, which: Which, attributes: &Value) -> Result<(), Failed> {
        let mut known = caps(which);
        known.as_object_mut().ok_or("no map")?.extend(attributes.as_object().cloned().unwrap_or_default());
        self.apps.ask("cap_map", json!({ "node": which.name(), "caps": known })).map(drop)
    }

    /// The same, and waits until it has heard.
    fn configure(&self, which: Which, attributes: &Value) -> Result<(), Failed> {
        self.tell(which, attributes)?;
        until(Duration::from_secs(10), "the connector to hear of its apps", || {
            let netmap = self.apps.connector(which).netmap()?;
            Ok((netmap["SelfNode"]["CapMap"][APPS] == attributes[APPS]).then_some(()))
        })
    }

    /// Tells a client of it.
    fn offer(&self, node: &str) -> Result<(), Failed> {
        self.apps.ask("cap_map", json!({ "node": node, "caps": attributes() })).map(drop)
    }

    /// A sidecar that knows of it, and has been there once.
    fn client(&self) -> Result<Sidecar<'a>, Failed> {
        let sidecar = self.apps.launch(self.bed).ready()?;
        self.offer(&sidecar.hostname)?;
        until(Duration::from_secs(10), "the app to be known", || {
            Ok((sidecar.get_absolute("transit.test", "/")?.status == 200).then_some(()))
        })?;
        // Until control told it of the app, its name was one like any other.
        self.strayed.set(self.bed.strayed_under("transit.test"));
        Ok(sidecar)
    }

    /// Holds that a client which knew of it asked for its names nowhere else.
    fn kept_to_itself(&self) -> Result<(), Failed> {
        match self.bed.strayed_under("transit.test") - self.strayed.get() {
            0 => Ok(()),
            times => Err(format!("names of the app were asked elsewhere {times} times").into()),
        }
    }
}

impl Drop for App<'_> {
    fn drop(&mut self) {
        for which in self.by {
            if let Ok(mut node) = self.apps.node(which.name()) {
                node["Tags"] = Value::Null;
                drop(self.apps.ask("update_node", json!({ "value": node })));
            }
            drop(self.tell(*which, &json!({})));
        }
    }
}

/// The address at which the site was asked.
fn served_at(sidecar: &Sidecar<'_>, name: &str) -> Result<String, Failed> {
    let answer = sidecar.get(name, "/headers")?;
    let text: Value = serde_json::from_slice(&answer.body).map_err(|_| format!("{name}: {}", answer.text()))?;
    Ok(text["local"].as_str().unwrap_or("").to_owned())
}

/// The bed without us: tailscaled with its unfinished code switched on gets the page, and what a connector answers to
/// a request of its PeerAPI is what we take it to be.
pub(crate) fn a_real_client_and_a_plain_request_reach_an_app_by_transit_addresses(bed: &Bed) -> Result<(), Failed> {
    let app = App::serve(bed, &[Which::First])?;
    let role = Role { hostname: "reference25", tun: "ts0", daemon: &[], up: &["--accept-dns"] };
    let client = Tailscaled::join_with_dns(&app.apps.places(), &bed.hosts.apps, &role, KEY)?;
    app.offer("reference25")?;
    until(Duration::from_secs(15), "the page", || {
        let mut curl = client.beside("curl");
        curl.args(["-sS", "--max-time", "2", "http://web.transit.test/"]);
        Ok((curl.output()?.stdout == b"tailcar site app\n").then_some(()))
    })?;
    let base = app.apps.peerapi(Which::First)?;
    let base = base.trim_end_matches("/dns-query");
    for (transit, destination, name, code) in [
        ("169.254.77.100", "10.30.0.170", APP, 0),
        ("10.1.1.1", "10.30.0.170", APP, 0),
        ("169.254.77.101", "fdaa:2::97", APP, 4),
        ("169.254.77.102", "10.30.0.170", "other", 5),
    ] {
        let asked = json!({ "transitIPs": [{ "transitIP": transit, "destinationIP": destination, "app": name }] });
        let mut curl = client.beside("curl");
        curl.args(["-sS", "--max-time", "5", "-d"]).arg(asked.to_string());
        curl.arg(format!("{base}/v0/connector/transit-ip"));
        let answer: Value = serde_json::from_str(&output(curl)?)?;
        if answer["transitIPs"][0]["code"].as_u64().unwrap_or(0) != code {
            return Err(format!("{asked} was answered {answer}, not {code}").into());
        }
    }
    Ok(())
}

/// Every name of an app is reached at the first try: bare, IPv4, IPv6, both, by an alias. No route is advertised, and
/// nobody but the connector is asked.
pub(crate) fn names_of_an_app_are_reached_at_once_and_without_a_route(bed: &Bed) -> Result<(), Failed> {
    let app = App::serve(bed, &[Which::First])?;
    let before = app.apps.routes(Which::First)?;
    let sidecar = app.client()?;
    for (name, at) in [
        ("web.transit.test", "10.30.0.171:80"),
        ("v6.transit.test", "[fdaa:2::97]:80"),
        ("pair.transit.test", "10.30.0.172:80"),
        ("alias.transit.test", "10.30.0.173:80"),
        ("web.transit.test", "10.30.0.171:80"),
    ] {
        let served = served_at(&sidecar, name)?;
        if served != at {
            return Err(format!("{name} was served at {served}, not {at}").into());
        }
        if app.apps.asked(name, Which::First) == 0 || app.apps.asked(name, Which::Second) != 0 {
            return Err(format!("{name} was not asked of its connector alone").into());
        }
    }
    let after = app.apps.routes(Which::First)?;
    if before != after {
        return Err(format!("routes became {after:?}").into());
    }
    app.kept_to_itself()
}

/// A connector that was restarted has forgotten what was agreed: connections are agreed anew, and do not fail.
pub(crate) fn a_connector_that_forgot_is_agreed_with_anew(bed: &Bed) -> Result<(), Failed> {
    let app = App::serve(bed, &[Which::First])?;
    let sidecar = app.client()?;
    served_at(&sidecar, "web.transit.test")?;
    app.apps.restart(bed, Which::First)?;
    app.configure(Which::First, &attributes())?;
    let start = Instant::now();
    let served = served_at(&sidecar, "web.transit.test")?;
    crate::say(&format!("after the connector's restart the page took {} ms", start.elapsed().as_millis()));
    let log = sidecar.process.log();
    if served != "10.30.0.171:80" || !log.contains("a connector does not know a transit address") {
        return Err(format!("served at {served:?}\n{log}").into());
    }
    Ok(())
}

/// When the connector in use is gone, the next one serves.
pub(crate) fn another_connector_takes_over(bed: &Bed) -> Result<(), Failed> {
    let app = App::serve(bed, &[Which::First, Which::Second])?;
    let asked = || app.apps.asked("transit.test", Which::First);
    let before = asked();
    let sidecar = app.client()?;
    // Which one a client uses is not said anywhere.
    let used = if asked() > before { Which::First } else { Which::Second };
    app.apps.connector(used).process.end();
    app.apps.ask("alter", json!({ "node": used.name(), "online": false }))?;
    until(Duration::from_secs(20), "the other connector to serve", || {
        Ok((sidecar.get_absolute("v6.transit.test", "/")?.status == 200).then_some(()))
    })?;
    let served = served_at(&sidecar, "transit.test")?;
    if served == "10.30.0.170:80" { Ok(()) } else { Err(format!("served at {served}").into()) }
}

/// A connector that does not serve the app, and an app without connector, fail with their code and go nowhere else.
pub(crate) fn an_app_that_no_connector_serves_fails_with_its_code(bed: &Bed) -> Result<(), Failed> {
    let app = App::serve(bed, &[Which::First])?;
    let sidecar = app.client()?;
    let mut other = attributes();
    other[APPS][0]["name"] = "another".into();
    app.configure(Which::First, &other)?;
    // A refusal needs a name that is not agreed upon yet.
    sidecar.get_absolute("web.transit.test", "/")?.expect(502, "TC-1508")?;
    let mut node = app.apps.node(Which::First.name())?;
    node["Tags"] = Value::Null;
    app.apps.ask("update_node", json!({ "value": node }))?;
    until(Duration::from_secs(5), "the connector to be none", || {
        let answer = sidecar.get_absolute("pair.transit.test", "/")?;
        Ok(answer.text().contains("no connector that the tailnet shows").then_some(()))
    })?;
    app.kept_to_itself()
}
