//! The bed without us: when this fails, what the others say means nothing.

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::client;
use crate::headscale::BROWSER;
use crate::process::until;
use crate::tailscaled::{Role, Tailscaled};

use std::time::Duration;

/// A tailscaled in the sidecar's place gets a page from the web peer and one from behind the router.
pub(crate) fn a_real_client_reaches_the_web_peer_and_the_lan(bed: &Bed) -> Result<(), Failed> {
    let role = Role {
        hostname: "stand-in",
        tun: "userspace-networking",
        daemon: &["--socks5-server=127.0.0.1:1055"],
        up: &["--accept-routes"],
    };
    let secret = bed.headscale().mint(BROWSER)?.secret;
    let stand_in = Tailscaled::join(&bed.places(), &bed.hosts.client, &role, &secret)?;
    for (host, name) in [(bed.web4(), "web"), (bed.web6(), "web"), ("10.20.0.80", "corp"), ("fd20::80", "corp")] {
        until(Duration::from_secs(10), host, || {
            let stream = client::connect(&bed.hosts.client, "127.0.0.1:1055".parse()?)?;
            let (0, mut stream) = client::socks5(stream, host, 80)? else { return Ok(None) };
            let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            let page = client::http(&mut stream, request)?;
            Ok((page.text() == format!("tailcar site {name}\n")).then_some(()))
        })?;
    }
    crate::process::output({
        let mut command = stand_in.command();
        command.arg("logout");
        command
    })?;
    bed.headscale().gone("stand-in", Duration::from_secs(5))
}
