//! Fail-closed: what the tailnet does not carry goes nowhere, before the join, during it and in outages.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::bed::{Bed, TRAP};
use crate::client;
use crate::headscale::POLICY;
use crate::leak;
use crate::process::until;
use crate::sidecar::Launch;

/// Addresses and names that no route covers are refused as public, at once.
pub(crate) fn what_would_be_public_is_refused(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for host in
        [TRAP, "8.8.8.8", "2001:4860:4860::8888", "169.254.169.254", "10.99.0.31", "10.20.1.1", "public.example"]
    {
        let start = Instant::now();
        let (code, _) = sidecar.socks(host, 80)?;
        let authority = if host.contains(':') { format!("[{host}]:80") } else { format!("{host}:80") };
        let (response, _) = sidecar.tunnel(&authority)?;
        response.expect(403, "TC-1901").map_err(|why| format!("{host}: {}", why.message().unwrap_or("")))?;
        if code != 2 || !response.header("proxy-status").unwrap_or("").contains("http_request_denied") {
            return Err(format!("{host}: SOCKS {code:02}, {:?}", response.headers).into());
        }
        if start.elapsed() > Duration::from_secs(2) {
            return Err(format!("refusing {host} took {:?}", start.elapsed()).into());
        }
    }
    for host in ["100.64.99.99", "fd7a:115c:a1e0::9999", "127.0.0.1", "::1", "localhost"] {
        let (code, _) = sidecar.socks(host, 80)?;
        if !matches!(code, 2..=4) {
            return Err(format!("{host}: SOCKS {code:02}").into());
        }
    }
    Ok(())
}

/// What the user names is dialled directly; its neighbour is not.
pub(crate) fn direct_allow_opens_what_it_names_and_no_more(bed: &Bed) -> Result<(), Failed> {
    let status = bed.folder.join("direct-status");
    let file = status.to_string_lossy();
    let mut sidecar = Launch::new(bed).args(&["--direct-allow", TRAP, "--status-file", &file]).ready()?;
    sidecar.page(TRAP, "trap")?;
    sidecar.page(TRAP, "trap")?;
    let (code, _) = sidecar.socks("10.99.0.253", 80)?;
    if code != 2 {
        return Err(format!("its neighbour: SOCKS {code:02}").into());
    }
    let seen = leak::offenders(&bed.hosts.client)?;
    match seen.as_slice() {
        [only] if only.contains(TRAP) && only.ends_with(" 80") => {}
        other => return Err(format!("sent directly: {other:?}").into()),
    }
    sidecar.terminate()?;
    let end: serde_json::Value = serde_json::from_slice(&std::fs::read(&status)?)?;
    let (direct, refused) = (end["direct"][format!("{TRAP}:80")].as_u64(), end["refused"]["10.99.0.253:80"].as_u64());
    if (direct, refused) != (Some(2), Some(1)) {
        return Err(format!("counted otherwise: {end}").into());
    }
    Ok(())
}

/// Before the join the proxy is bound and holds connections: until ready, or until the hold expires.
pub(crate) fn early_connections_are_held_until_ready_or_answered(bed: &Bed) -> Result<(), Failed> {
    let listener: SocketAddr = "127.0.0.1:18080".parse()?;
    bed.headscale().stop();
    let args = ["--listen", "127.0.0.1:18080", "--hold-timeout", "2s", "--join-timeout", "50s"];
    let held = Launch::new(bed).args(&args).start().and_then(|sidecar| {
        until(Duration::from_secs(5), "the proxy to be bound", || {
            Ok(client::connect(&bed.hosts.client, listener).ok().map(drop))
        })?;
        let start = Instant::now();
        let (response, _) = client::tunnel(client::connect(&bed.hosts.client, listener)?, "web:80")?;
        if start.elapsed() < Duration::from_millis(1500) || start.elapsed() > Duration::from_secs(5) {
            return Err(format!("a hold of 2 s took {:?}", start.elapsed()).into());
        }
        response.expect(503, "TC-")?;
        response.header("retry-after").ok_or("no Retry-After")?;
        match client::socks5(client::connect(&bed.hosts.client, listener)?, bed.web4(), 80)?.0 {
            1 => Ok(sidecar),
            other => Err(format!("an expired hold gave SOCKS {other:02}").into()),
        }
    });
    bed.headscale().resume(&bed.hosts.wan)?;
    let mut sidecar = held?;
    let object = sidecar.object(Duration::from_secs(40))?;
    if object["state"] != "ready" {
        return Err(format!("control came back, but: {object}").into());
    }
    sidecar.ready = object;
    sidecar.page("web", "web")
}

/// A connection that arrives while the join is under way gets its page without a retry.
pub(crate) fn a_connection_during_the_join_gets_its_page(bed: &Bed) -> Result<(), Failed> {
    let listener: SocketAddr = "127.0.0.1:18081".parse()?;
    let sidecar = Launch::new(bed).args(&["--listen", "127.0.0.1:18081"]).start()?;
    let stream = until(Duration::from_secs(5), "the proxy to be bound", || {
        Ok(client::connect(&bed.hosts.client, listener).ok())
    })?;
    let (code, mut stream) = client::socks5(stream, "web.corp.test", 80)?;
    if code != 0 {
        return Err(format!("held, then SOCKS {code:02}\n{}", sidecar.process.log()).into());
    }
    let page = client::http(&mut stream, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    match page.text() == "tailcar site corp\n" {
        true => Ok(()),
        false => Err(format!("{page:?}").into()),
    }
}

/// With control down the data plane goes on, nothing leaks, and the stream comes back by itself.
pub(crate) fn a_control_outage_leaves_connections_alone(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page("web", "web")?;
    sidecar.page("web.corp.test", "corp")?;
    bed.headscale().stop();
    let during = sidecar.page("web", "web").and_then(|()| sidecar.page("web.corp.test", "corp"));
    bed.headscale().resume(&bed.hosts.wan)?;
    during?;
    bed.headscale().online(&sidecar.hostname, Duration::from_secs(30))?;
    sidecar.page("web", "web")
}

/// Access that the policy withdraws is gone, without a restart, and comes back with it.
pub(crate) fn a_policy_change_closes_what_it_closes(bed: &Bed) -> Result<(), Failed> {
    let narrow =
        POLICY.replace(r#""dst": ["tag:web", "tag:router"], "ip": ["*"]"#, r#""dst": ["tag:web"], "ip": ["tcp:7"]"#);
    if narrow == POLICY {
        return Err("the policy has changed under this scenario".into());
    }
    let sidecar = Launch::new(bed).args(&["--dial-timeout", "3s"]).ready()?;
    until(Duration::from_secs(10), "the peer to know the node", || Ok(sidecar.page("web", "web").ok()))?;
    bed.headscale().set_policy(&narrow)?;
    let closed = until(Duration::from_secs(20), "port 80 to be closed", || {
        let (response, _) = sidecar.tunnel("web:80")?;
        let code = response.header("x-tailcar-error").unwrap_or("").to_owned();
        Ok((response.status != 200).then_some((response.status, code)))
    });
    let still = sidecar.socks("web", 7).map(|(code, _)| code);
    bed.headscale().set_policy(POLICY)?;
    let (status, code) = closed?;
    if !(code.starts_with("TC-16") || code.starts_with("TC-17")) || !matches!(status, 502 | 504) {
        return Err(format!("a closed port gave {status} {code}").into());
    }
    if still? != 0 {
        return Err("the port that stayed open did not".into());
    }
    until(Duration::from_secs(20), "port 80 to be open again", || Ok(sidecar.page("web", "web").ok()))
}

/// A peer that the policy lets in finds nothing: neither the proxy's port nor any other.
pub(crate) fn nothing_inbound_is_answered(bed: &Bed) -> Result<(), Failed> {
    let open =
        POLICY.replace(r#""grants": ["#, r#""grants": [{"src": ["tag:router"], "dst": ["tag:browser"], "ip": ["*"]},"#);
    bed.headscale().set_policy(&open)?;
    let result = inbound(bed);
    bed.headscale().set_policy(POLICY)?;
    result
}

fn inbound(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page("10.20.0.80", "corp")?;
    let own = sidecar.ready["node"]["addresses"][0].as_str().ok_or("no address")?.to_owned();
    let ports = [sidecar.listener()?.port(), 22, 80, 53];
    thread::scope(|scope| {
        let knocks: Vec<_> = ports
            .map(|port| {
                (
                    port,
                    scope.spawn({
                        let own = &own;
                        move || -> Result<bool, Failed> {
                            let address = SocketAddr::new(own.parse()?, port);
                            let limit = Duration::from_secs(3);
                            Ok(bed
                                .hosts
                                .router
                                .inside(|| std::net::TcpStream::connect_timeout(&address, limit).is_ok())?)
                        }
                    }),
                )
            })
            .into_iter()
            .collect();
        for (port, knock) in knocks {
            if knock.join().map_err(|_| "a thread panicked")?? {
                return Err(Failed::from(format!("port {port} of the sidecar answered a peer")));
            }
        }
        Ok(())
    })
}
