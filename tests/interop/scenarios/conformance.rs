//! The proxy's two protocols, to the byte: what is asked for is done, what is not offered is refused in form.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::bed::Bed;
use crate::client::{self, http, response};
use crate::process::output;
use crate::sidecar::{Launch, Sidecar};

/// SOCKS5's other commands and address types, and what is no SOCKS5 at all, get their replies.
pub(crate) fn socks_requests_beyond_connect_get_their_reply(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for (what, request, expected) in [
        ("BIND", client::socks5_request(2, "10.20.0.80", 80), 7),
        ("UDP ASSOCIATE", client::socks5_request(3, "0.0.0.0", 0), 0),
        ("command 9", client::socks5_request(9, "10.20.0.80", 80), 7),
        ("address type 9", vec![5, 1, 0, 9, 1, 2, 3, 4, 0, 80], 8),
    ] {
        let mut stream = sidecar.connect()?;
        stream.write_all(&[5, 1, 0])?;
        stream.read_exact(&mut [0; 2])?;
        stream.write_all(&request)?;
        let code = client::socks5_reply(&mut stream)?;
        if code != expected {
            return Err(format!("{what}: reply {code:02}").into());
        }
    }
    let mut stream = sidecar.connect()?;
    stream.write_all(&[5, 1, 2])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    if method != [5, 0xff] {
        return Err(format!("only passwords offered: {method:02x?}").into());
    }
    expect_end("after method FF", &mut stream)
}

/// SOCKS4 and noise are turned away, and the proxy goes on.
pub(crate) fn what_is_neither_protocol_is_turned_away(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let noises: [&[u8]; 4] = [
        b"\x04\x01\x00\x50\x0a\x14\x00\x50me\x00",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00\xff\x00\xff\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ];
    for noise in noises {
        let mut stream = sidecar.connect()?;
        stream.write_all(noise)?;
        expect_end(&format!("{noise:02x?}"), &mut stream)?;
    }
    sidecar.page("web", "web")
}

/// Several SOCKS bytes at once, or one by one, make the same request.
pub(crate) fn socks_does_not_mind_how_bytes_arrive(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let get = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
    let mut all = vec![5, 2, 2, 0];
    all.extend(client::socks5_request(1, "web", 80));
    all.extend(get);
    let mut stream = sidecar.connect()?;
    stream.write_all(&all)?;
    page_behind(&mut stream)?;
    let mut stream = sidecar.connect()?;
    for byte in &all {
        stream.write_all(&[*byte])?;
        std::thread::sleep(Duration::from_millis(1));
    }
    page_behind(&mut stream)
}

fn page_behind(stream: &mut TcpStream) -> Result<(), Failed> {
    stream.read_exact(&mut [0; 2])?;
    let code = client::socks5_reply(stream)?;
    let page = response(stream, false)?;
    match code == 0 && page.text() == "tailcar site web\n" {
        true => Ok(()),
        false => Err(format!("reply {code:02}, {page:?}").into()),
    }
}

/// A server that speaks first is heard, and nothing precedes it.
pub(crate) fn a_server_that_speaks_first_is_heard(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let (response, tunnel) = sidecar.tunnel("web:5004")?;
    if response.status != 200 {
        return Err(format!("{response:?}").into());
    }
    for mut stream in [tunnel, sidecar.dial("web", 5004)?] {
        let banner = client::line(&mut stream)?;
        if banner != "220 hello" {
            return Err(format!("the banner is {banner:?}").into());
        }
    }
    Ok(())
}

/// One connection carries many plain requests, to several hosts, with bodies both ways.
pub(crate) fn a_connection_carries_many_plain_requests(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let mut stream = sidecar.connect()?;
    for round in 0..5 {
        for (host, name) in [("web", "web"), ("web.corp.test", "corp"), ("[fd20::80]", "corp")] {
            let page = http(&mut stream, &format!("GET http://{host}/?{round} HTTP/1.1\r\nHost: {host}\r\n\r\n"))?;
            if page.text() != format!("tailcar site {name}\n") {
                return Err(format!("{host}, round {round}: {page:?}").into());
            }
        }
    }
    let page = http(&mut stream, "HEAD http://web/ HTTP/1.1\r\nHost: web\r\n\r\n")?;
    if page.status != 200 {
        return Err(format!("HEAD: {page:?}").into());
    }
    let page = http(&mut stream, "GET http://web/status/204 HTTP/1.1\r\nHost: web\r\n\r\n")?;
    if page.status != 204 {
        return Err(format!("204: {page:?}").into());
    }
    let chunked = "POST http://web/headers HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n\
                   5\r\nhello\r\n6;note=1\r\n world\r\n0\r\n\r\n";
    let seen: Value = serde_json::from_slice(&http(&mut stream, chunked)?.body)?;
    if seen["body_n"] != 11 || seen["body_sha256"] != "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
    {
        return Err(format!("a chunked body arrived as {seen}").into());
    }
    let page = http(&mut stream, "GET http://web/chunked?n=100000&seed=3 HTTP/1.1\r\nHost: web\r\n\r\n")?;
    match page.body.len() {
        100_000 => Ok(()),
        other => Err(format!("{other} bytes of a chunked answer of 100000").into()),
    }
}

/// Hop-by-hop fields end here; the rest goes on, and the target is in origin form.
pub(crate) fn hop_by_hop_fields_end_at_the_proxy(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let request = "GET http://web/headers?a=b HTTP/1.1\r\nHost: web\r\nProxy-Connection: keep-alive\r\n\
                   Proxy-Authorization: Basic c2VjcmV0\r\nConnection: X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n\
                   TE: trailers\r\nX-End: 2\r\nCookie: c=d\r\n\r\n";
    let seen: Value = serde_json::from_slice(&http(&mut sidecar.connect()?, request)?.body)?;
    let fields = &seen["headers"];
    for gone in ["Proxy-Connection", "Proxy-Authorization", "X-Hop", "Keep-Alive"] {
        if !fields[gone].is_null() {
            return Err(format!("{gone} went on: {fields}").into());
        }
    }
    match fields["X-End"][0] == "2"
        && fields["Cookie"][0] == "c=d"
        && seen["target"] == "/headers?a=b"
        && seen["host"] == "web"
    {
        true => Ok(()),
        false => Err(format!("arrived as {seen}").into()),
    }
}

/// `Expect: 100-continue` gets its interim answer from the target before the body is sent.
pub(crate) fn expect_continue_is_answered_before_the_body(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let mut stream = sidecar.connect()?;
    let head = "POST http://web/continue HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    let interim = http(&mut stream, head)?;
    if interim.status != 100 {
        return Err(format!("not an interim answer: {interim:?}").into());
    }
    stream.write_all(b"hello")?;
    let last = response(&mut stream, false)?;
    let seen: Value = serde_json::from_slice(&last.body)?;
    match seen["n"] == 5 && seen["expect"] == "100-continue" {
        true => Ok(()),
        false => Err(format!("{seen}").into()),
    }
}

/// A WebSocket by an upgraded plain request and by a tunnel echoes, large messages too.
pub(crate) fn a_websocket_echoes_both_ways_in(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let upgrade = |target: &str| {
        format!(
            "GET {target} HTTP/1.1\r\nHost: web\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
    };
    let (_, tunnel) = sidecar.tunnel("web:80")?;
    for (mut stream, target) in [(sidecar.connect()?, "http://web/ws"), (tunnel, "/ws")] {
        let switched = http(&mut stream, &upgrade(target))?;
        // RFC 6455, 1.3 gives this key's answer.
        if switched.status != 101 || switched.header("sec-websocket-accept") != Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") {
            return Err(format!("{target}: {switched:?}").into());
        }
        let message = vec![b'm'; 60_000];
        let mut frame = vec![0x82, 0x80 | 126];
        frame.extend(60_000_u16.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(&message);
        stream.write_all(&frame)?;
        let mut back = vec![0; message.len() + 4];
        stream.read_exact(&mut back)?;
        if back[..2] != [0x82, 126] || back[4..] != message {
            return Err(format!("{target}: the echo begins {:02x?}", &back[..8]).into());
        }
    }
    Ok(())
}

/// Heads that are too long, or that make no sense, are answered and closed.
pub(crate) fn bad_heads_are_answered(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let long = format!("GET http://web/ HTTP/1.1\r\nHost: web\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    for (what, request, expected) in [
        ("a megabyte of head", long.as_str(), &[400, 431][..]),
        ("origin form", "GET / HTTP/1.1\r\nHost: web\r\n\r\n", &[400, 404, 421]),
        ("no port", "CONNECT web HTTP/1.1\r\nHost: web\r\n\r\n", &[400]),
        ("port 0", "CONNECT web:0 HTTP/1.1\r\nHost: web:0\r\n\r\n", &[400, 403]),
        ("https as a plain request", "GET https://web/ HTTP/1.1\r\nHost: web\r\n\r\n", &[400, 501]),
        (
            "two lengths",
            "POST http://web/upload HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            &[400],
        ),
        ("a space before the colon", "GET http://web/ HTTP/1.1\r\nHost : web\r\n\r\n", &[400]),
    ] {
        let mut stream = sidecar.connect()?;
        // A proxy may answer and close before it has read a head that is too long.
        drop(stream.write_all(request.as_bytes()));
        let answer = response(&mut stream, false).map_err(|why| format!("{what}: {}", why.message().unwrap_or("")))?;
        if !expected.contains(&answer.status) {
            return Err(format!("{what}: {answer:?}").into());
        }
    }
    sidecar.page("web", "web")
}

/// A head that comes drop by drop does not hold a connection for ever, nor anybody else.
pub(crate) fn a_slow_head_is_bounded(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let mut stream = sidecar.connect()?;
    stream.write_all(b"GET http://web/ HTTP/1.1\r\n")?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    for drop in 0..120 {
        if stream.write_all(format!("X-{drop}: y\r\n").as_bytes()).is_err() {
            return sidecar.page("web", "web");
        }
        match stream.read(&mut [0; 1024]) {
            Ok(_) => return sidecar.page("web", "web"),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => return sidecar.page("web", "web"),
        }
    }
    Err("a head of drops was read for a minute".into())
}

/// curl, which nobody here wrote, by all the ways it knows.
pub(crate) fn curl_gets_pages_by_every_proxy_scheme(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let listener = sidecar.listener()?;
    for scheme in ["http", "socks5", "socks5h"] {
        let host = if scheme == "socks5" { "10.20.0.80" } else { "web.corp.test" };
        curl(bed, &["-x", &format!("{scheme}://{listener}"), &format!("http://{host}/")])?;
    }
    curl(bed, &["-p", "-x", &format!("http://{listener}"), "http://web.corp.test/"])?;
    curl(bed, &["-x", &format!("socks5h://{listener}"), "http://[fd20::80]/"])?;
    let file = bed.folder.join("upload");
    std::fs::write(&file, vec![b'u'; 3 << 20])?;
    let mut command = bed.hosts.client.command("curl");
    command.args(["-sS", "--max-time", "20", "-x", &format!("http://{listener}"), "-H", "Expect: 100-continue"]);
    command.arg("--data-binary").arg(format!("@{}", file.display())).arg("http://web/upload");
    let answer: Value = serde_json::from_str(&output(command)?)?;
    match answer["n"] == 3 << 20 {
        true => Ok(()),
        false => Err(format!("curl's upload arrived as {answer}").into()),
    }
}

fn curl(bed: &Bed, args: &[&str]) -> Result<(), Failed> {
    let mut command = bed.hosts.client.command("curl");
    command.args(["-sS", "--max-time", "20"]).args(args);
    let page = output(command)?;
    match page == "tailcar site corp\n" {
        true => Ok(()),
        false => Err(format!("curl {args:?} printed {page:?}").into()),
    }
}

/// With a user and password asked for, those who know them get in by both protocols, others do not.
pub(crate) fn credentials_are_asked_for_when_configured(bed: &Bed) -> Result<(), Failed> {
    let file = bed.folder.join("proxy-credentials");
    std::fs::write(&file, "someone:open sesame\n")?;
    let sidecar = Launch::new(bed).args(&["--proxy-auth", &format!("file:{}", file.display())]).ready()?;
    let (response, _) = sidecar.tunnel("web:80")?;
    if response.status != 407 || response.header("proxy-authenticate").is_none() {
        return Err(format!("without credentials: {response:?}").into());
    }
    socks_password(&sidecar, b"open sesame", 0)?;
    socks_password(&sidecar, b"wrong", 1)?;
    let request = "GET http://web/ HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\
                   Proxy-Authorization: Basic c29tZW9uZTpvcGVuIHNlc2FtZQ==\r\n\r\n";
    let page = http(&mut sidecar.connect()?, request)?;
    match page.text() == "tailcar site web\n" {
        true => Ok(()),
        false => Err(format!("with credentials: {page:?}").into()),
    }
}

/// Username and password as RFC 1929 has them; `expected` is the status of the answer.
fn socks_password(sidecar: &Sidecar<'_>, password: &[u8], expected: u8) -> Result<(), Failed> {
    let mut stream = sidecar.connect()?;
    stream.write_all(&[5, 2, 0, 2])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    if method != [5, 2] {
        return Err(format!("chose method {method:02x?}").into());
    }
    let mut request = vec![1, 7];
    request.extend(b"someone");
    request.push(u8::try_from(password.len())?);
    request.extend(password);
    stream.write_all(&request)?;
    let mut status = [0; 2];
    stream.read_exact(&mut status)?;
    match (status[1] == 0) == (expected == 0) {
        true => Ok(()),
        false => Err(format!("password status {status:02x?}").into()),
    }
}

/// The peer ends the connection, perhaps after an answer.
fn expect_end(what: &str, stream: &mut TcpStream) -> Result<(), Failed> {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(format!("{what}: {error}, after {rest:02x?}").into()),
    }
}
