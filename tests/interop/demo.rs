//! `tests/run demo`: the bed, and a command through `tailcar exec` in it.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::Failed;

use crate::bed::{Bed, TRAP};
use crate::headscale::CONTROL;
use crate::{say, sidecar, words};

/// Brings the bed up, runs `command` in the client's namespace and takes the bed down.
///
/// Without a command: curl of a page on the web peer, by its MagicDNS name.
pub(crate) fn run(peers: &Path, command: Vec<OsString>) -> ExitCode {
    let result = Bed::up(peers).and_then(|bed| {
        say(&targets(&bed));
        through(&bed, command)
    });
    crate::take_down(result.is_err());
    match result {
        Ok(code) => code,
        Err(error) => {
            say(&format!("demo: {}", words(&error)));
            ExitCode::FAILURE
        }
    }
}

/// What a command of the user's may ask for.
fn targets(bed: &Bed) -> String {
    let (v4, v6) = (bed.web4(), bed.web6());
    format!(
        "demo: `tests/run demo -- CMD` runs CMD with a proxy into this tailnet:
  a node           http://web/  http://web.tb.example/  http://{v4}/  http://[{v6}]/
  behind a router  http://web.corp.test/ (split DNS)  http://10.20.0.80/  http://[fd20::80]/
  on each of them  port 80: /page  /bytes?n=1000000  /chunked?n=1000000  /slow?ms=3000  /headers  /ws
                   port 7 echo, 9 discard, 5003 accepts and is silent, 5004 greets; UDP port 7 echo
  no answer        http://10.20.0.99/ (no such host)  http://nobody.corp.test/ (no such name)
  refused          http://{TRAP}/ (outside the tailnet)"
    )
}

fn through(bed: &Bed, command: Vec<OsString>) -> Result<ExitCode, Failed> {
    let command = if command.is_empty() {
        ["curl", "-sS", "--max-time", "30", "http://web/"].map(OsString::from).to_vec()
    } else {
        command
    };
    let key = bed.folder.join("demo.key");
    std::fs::write(&key, &bed.key.secret)?;
    let mut sidecar: Command = bed.hosts.client.command(sidecar::program());
    sidecar.env("HOME", &bed.folder).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    sidecar.arg("exec").arg("--login-server").arg(format!("https://{CONTROL}"));
    sidecar.arg("--auth-key").arg(format!("file:{}", key.display()));
    sidecar.arg("--ca-file").arg(&bed.authority).args(["--hostname", "demo", "--"]).args(command);
    let status = sidecar.status()?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
