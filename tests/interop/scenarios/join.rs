//! Joining: an ephemeral key becomes a node that others can see, and pages come through it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::bed::Bed;
use crate::headscale::DOMAIN;
use crate::sidecar::Launch;

/// The node is online, ephemeral and tagged, and the ready object says what headscale says.
pub(crate) fn an_ephemeral_key_becomes_an_online_tagged_node(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let listed = bed.headscale().online(&sidecar.hostname, Duration::from_secs(5))?;
    let node = &sidecar.ready["node"];
    let name = format!("{}.{DOMAIN}", sidecar.hostname);
    let facts = [
        ("v", sidecar.ready["v"].clone(), Value::from(1)),
        ("pid", sidecar.ready["pid"].clone(), Value::from(sidecar.process.id())),
        ("name", node["name"].clone(), Value::from(name)),
        ("hostname", node["hostname"].clone(), Value::from(sidecar.hostname.as_str())),
        ("id", node["id"].clone(), listed["id"].clone()),
        ("addresses", node["addresses"].clone(), listed["ip_addresses"].clone()),
        ("tags", node["tags"].clone(), listed["tags"].clone()),
        ("tailnet", node["tailnet"].clone(), Value::from(DOMAIN)),
        ("ephemeral", listed["pre_auth_key"]["ephemeral"].clone(), Value::from(true)),
    ];
    for (what, said, listed) in facts {
        if said != listed {
            return Err(format!("{what}: tailcar says {said}, headscale {listed}").into());
        }
    }
    if !matches!(node["home_derp"].as_u64(), Some(998 | 999)) {
        return Err(format!("home DERP {}", node["home_derp"]).into());
    }
    let log = sidecar.process.log();
    for words in ["joined", "proxy", "Ready: you may start your tests.", "tag:browser"] {
        if !log.contains(words) {
            return Err(format!("no {words:?} on stderr:\n{log}").into());
        }
    }
    Ok(())
}

/// One page, by SOCKS5 with each address type, by CONNECT and as a plain HTTP request.
pub(crate) fn a_page_comes_by_socks_by_connect_and_as_a_plain_request(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let full = format!("web.{DOMAIN}");
    for host in [bed.web4(), bed.web6(), "web", &full] {
        sidecar.page(host, "web")?;
    }
    let six = format!("[{}]", bed.web6());
    for host in [bed.web4(), &six, "web", &full] {
        let (response, mut stream) = sidecar.tunnel(&format!("{host}:80"))?;
        if response.status != 200 || !response.body.is_empty() {
            return Err(format!("CONNECT {host}: {response:?}").into());
        }
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        expect_page(host, &crate::client::http(&mut stream, &request)?)?;
        expect_page(host, &sidecar.get_absolute(host, "/")?)?;
    }
    Ok(())
}

fn expect_page(host: &str, page: &crate::client::Response) -> Result<(), Failed> {
    if page.status == 200 && page.text() == "tailcar site web\n" {
        return Ok(());
    }
    Err(format!("{host} answered {} {:?}", page.status, page.text()).into())
}

/// The files hold what stdout said, whole and private, and are gone or say so at the end.
pub(crate) fn ready_status_and_pid_files_say_what_stdout_says(bed: &Bed) -> Result<(), Failed> {
    let file = |name: &str| bed.folder.join(name);
    let [ready, status, pid] = [file("a.ready"), file("a.status"), file("a.pid")];
    let flags = [("--ready-file", &ready), ("--status-file", &status), ("--pidfile", &pid)];
    let mut launch = Launch::new(bed);
    for (flag, path) in flags {
        launch = launch.args(&[flag, &path.to_string_lossy()]);
    }
    let mut sidecar = launch.ready()?;
    for path in [&ready, &status] {
        let written: Value = serde_json::from_slice(&fs::read(path)?)?;
        if written != sidecar.ready {
            return Err(format!("{} holds {written}, stdout {}", path.display(), sidecar.ready).into());
        }
        let mode = fs::metadata(path)?.permissions().mode() & 0o777;
        if mode != 0o600 {
            return Err(format!("{} has mode {mode:o}", path.display()).into());
        }
    }
    let written = fs::read_to_string(&pid)?;
    if written.trim() != sidecar.process.id().to_string() {
        return Err(format!("the pid file holds {written:?}").into());
    }
    sidecar.terminate()?;
    let last: Value = serde_json::from_slice(&fs::read(&status)?)?;
    if last["state"] == "ready" {
        return Err(format!("the status file still says {last}").into());
    }
    Ok(())
}

/// The second node of a hostname gets another name from the server, and both work.
pub(crate) fn a_taken_hostname_is_renamed_by_the_server_and_both_work(bed: &Bed) -> Result<(), Failed> {
    let first = Launch::new(bed).hostname("twin").ready()?;
    let second = Launch::new(bed).hostname("twin").ready()?;
    let (one, other) = (&first.ready["node"]["name"], &second.ready["node"]["name"]);
    if one == other || !other.as_str().is_some_and(|name| name.starts_with("twin-")) {
        return Err(format!("two nodes called {one} and {other}").into());
    }
    first.page("web", "web")?;
    second.page("web", "web")
}

/// One reusable key, ten sidecars at once, each with its page.
pub(crate) fn ten_sidecars_join_with_one_key_at_once(bed: &Bed) -> Result<(), Failed> {
    std::thread::scope(|scope| {
        let joins: Vec<_> =
            (0..10).map(|_| scope.spawn(|| Launch::new(bed).ready().and_then(|own| own.page("web", "web")))).collect();
        for join in joins {
            join.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })
}
