//! Bad keys and bad servers: each its own code and exit status, soon, with no secret said and no node left.

use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::headscale::{BROWSER, KeyKind};
use crate::process::until;
use crate::sidecar::Launch;

/// Soon enough to be called at once, on a loaded machine.
const SOON: Duration = Duration::from_secs(20);

/// Keys that the server refuses end the run with 77 and a registration code.
pub(crate) fn keys_that_the_server_refuses_end_the_run(bed: &Bed) -> Result<(), Failed> {
    let (revoked, used, expired) = {
        let headscale = bed.headscale();
        let revoked = headscale.mint(BROWSER)?;
        headscale.revoke(&revoked)?;
        let used = headscale.mint(KeyKind { reusable: false, ..BROWSER })?;
        let expired = headscale.mint(KeyKind { expires: "1s", ..BROWSER })?;
        (revoked, used, expired)
    };
    let user = Launch::new(bed).secret(&used.secret).ready()?;
    user.page("web", "web")?;
    let unknown: String = bed.key.secret.chars().rev().take(64).collect();
    let unknown = format!("hskey-auth-aaaaaaaaaaaa-{}", unknown.replace(['-', '_'], "a"));
    until(SOON, "the key to expire", || Ok(bed.headscale().has_expired(&expired)?.then_some(())))?;
    for (what, secret, code) in [
        ("unknown", &unknown, "TC-1201"),
        ("expired", &expired.secret, "TC-1202"),
        // headscale revokes a key by expiring it, and says so.
        ("revoked", &revoked.secret, "TC-1202"),
        ("used", &used.secret, "TC-1203"),
    ] {
        let launch = Launch::new(bed).secret(secret);
        let outcome = launch.outcome(SOON)?;
        outcome.expect(77, code).map_err(|why| format!("{what}: {}", why.message().unwrap_or("")))?;
        // `hskey-auth-`, what names the key, and its secret, in which there may be dashes too.
        let tail = secret.splitn(4, '-').last().unwrap_or(secret);
        if outcome.log.contains(tail) || outcome.object.to_string().contains(tail) {
            return Err(format!("the {what} key was said aloud").into());
        }
    }
    Ok(())
}

/// A tag that the key may not give is refused by the server.
pub(crate) fn a_tag_that_is_not_permitted_ends_the_run(bed: &Bed) -> Result<(), Failed> {
    let outcome = Launch::new(bed).args(&["--advertise-tags", "tag:router"]).outcome(SOON)?;
    outcome.expect(77, "TC-1204")
}

/// A control server that is not there: retryable, and within the join timeout.
pub(crate) fn a_control_server_that_is_not_there_is_temporary(bed: &Bed) -> Result<(), Failed> {
    for url in ["https://10.99.0.1:9", "https://10.99.0.77:8443"] {
        let launch = Launch::new(bed).control(url).args(&["--join-timeout", "3s"]);
        let outcome = launch.outcome(SOON)?;
        outcome.expect(75, "TC-11")?;
        if outcome.object["retryable"] != true {
            return Err(format!("not retryable: {}", outcome.object).into());
        }
    }
    Ok(())
}

/// An authority that nobody told us to trust is not trusted, and nothing is registered.
pub(crate) fn an_untrusted_certificate_ends_the_run(bed: &Bed) -> Result<(), Failed> {
    let outcome = Launch::new(bed).without_trust().args(&["--join-timeout", "5s"]).outcome(SOON)?;
    outcome.expect(76, "TC-11")
}

/// The same authority by the environment's variable is trusted.
pub(crate) fn an_authority_by_the_environment_is_trusted(bed: &Bed) -> Result<(), Failed> {
    let file = bed.authority.to_string_lossy().into_owned();
    let sidecar = Launch::new(bed).without_trust().env("SSL_CERT_FILE", &file).ready()?;
    sidecar.page("web", "web")
}

/// Plain HTTP to a public name is refused before anything is sent: the leak check holds it to that.
pub(crate) fn plain_http_to_a_public_name_is_refused(bed: &Bed) -> Result<(), Failed> {
    let outcome = Launch::new(bed).control("http://control.example").args(&["--join-timeout", "3s"]).outcome(SOON)?;
    match (outcome.exit, outcome.object["retryable"].as_bool()) {
        (Some(64 | 65 | 78), Some(false)) => Ok(()),
        _ => Err(format!("{:?} {}\n{}", outcome.exit, outcome.object, outcome.log).into()),
    }
}

/// A node whose key the server has expired, and whose auth key was for one use, ends with that reason.
pub(crate) fn a_node_that_is_expired_mid_run_ends_with_that_reason(bed: &Bed) -> Result<(), Failed> {
    let key = bed.headscale().mint(KeyKind { reusable: false, ..BROWSER })?;
    let mut sidecar = Launch::new(bed).secret(&key.secret).ready()?;
    sidecar.page("web", "web")?;
    let id = bed.headscale().id(&sidecar.hostname)?;
    bed.headscale().cli(&["nodes", "expire", "-i", &id])?;
    let status = sidecar.process.wait(SOON)?;
    let last = until(Duration::from_secs(2), "the failure object", || Ok(sidecar.object(SOON).ok()))?;
    let cause = last["cause"].as_str().unwrap_or("");
    match (status.code(), cause.contains("expired")) {
        (Some(77), true) => Ok(()),
        _ => Err(format!("ended with {status} and {last}").into()),
    }
}
