//! The control server's pings: asked down the map stream, answered up the control connection.

use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::process::{output, until};
use crate::sidecar::Launch;

/// headscale's own debug page asks the node and shows the answer's time.
pub(crate) fn headscale_pings_the_node_and_is_answered(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    until(Duration::from_secs(10), "an answer to headscale's ping", || {
        let mut command = bed.hosts.wan.command("curl");
        command.args(["-sS", "--max-time", "20", "-X", "POST", "--data-urlencode"]);
        command.arg(format!("node={}", sidecar.hostname)).arg("http://127.0.0.1:9090/debug/ping");
        let page = output(command)?;
        Ok(page.contains("responded in").then_some(()))
    })
}
