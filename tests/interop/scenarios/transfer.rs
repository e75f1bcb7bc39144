//! Bytes in bulk and the ends of streams: all arrive, none twice, no faster than they are read.
//!
//! Ends are looked at on the LAN behind the router, where the far end is a kernel's TCP: a userspace
//! peer ends and starts connections anew, and turns a reset into an end.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use ring::digest::{Context, SHA256};

use crate::bed::Bed;
use crate::process::{output, until};
use crate::sidecar::{Launch, Sidecar};

const GIBIBYTE: u64 = 1 << 30;
/// The LAN's site, as a host that speaks TCP itself.
const LAN: &str = "10.20.0.80";

/// A gibibyte from the web peer has the checksum that its sender computed.
pub(crate) fn a_gibibyte_arrives_whole(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    download(&sidecar, "web", GIBIBYTE)
}

/// A gibibyte to the web peer has the checksum that we computed.
pub(crate) fn a_gibibyte_leaves_whole(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    upload(&sidecar, "web", GIBIBYTE)
}

/// At one megabit a second things take their time, and arrive whole; a small page is not starved.
pub(crate) fn a_thin_line_is_slow_and_whole(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page("web", "web")?;
    let shape = "rate 1mbit burst 16kb latency 300ms";
    for (namespace, device) in [(&bed.hosts.client, "eth0"), (&bed.hosts.wan, "p21")] {
        let mut command = namespace.command("tc");
        command.args(["qdisc", "replace", "dev", device, "root", "tbf"]).args(shape.split(' '));
        output(command)?;
    }
    let start = Instant::now();
    let result = thread::scope(|scope| {
        let bulk =
            scope.spawn(|| download(&sidecar, "web", 512 << 10).and_then(|()| upload(&sidecar, "web", 256 << 10)));
        let page = sidecar.page("web", "web");
        let bulk = bulk.join().map_err(|_| "the transfer panicked")?;
        page.and(bulk)
    });
    let took = start.elapsed();
    for (namespace, device) in [(&bed.hosts.client, "eth0"), (&bed.hosts.wan, "p21")] {
        let mut command = namespace.command("tc");
        command.args(["qdisc", "del", "dev", device, "root"]);
        output(command)?;
    }
    result?;
    match took > Duration::from_secs(5) {
        true => Ok(()),
        false => Err(format!("6.3 Mbit in {took:?} is over the line's rate").into()),
    }
}

/// Who does not read holds up the sender, not our memory, and nobody else.
pub(crate) fn a_reader_that_stops_is_waited_for(bed: &Bed) -> Result<(), Failed> {
    const SIZE: u64 = 256 << 20;
    let sidecar = Launch::new(bed).ready()?;
    sidecar.page(LAN, "corp")?;
    let before = sidecar.resident()?;
    let mut slow = sidecar.dial(LAN, 19)?;
    slow.write_all(format!("{SIZE}\n").as_bytes())?;
    held_up(bed, 19)?;
    sidecar.page(LAN, "corp")?;
    let grown = sidecar.resident()? - before;
    if grown > 32.0 {
        return Err(format!("an unread stream made the process grow by {grown:.1} MiB").into());
    }
    let (read, _) = drain(&mut slow)?;
    match read == SIZE {
        true => Ok(()),
        false => Err(format!("{read} bytes of {SIZE}").into()),
    }
}

/// Waits until the LAN's site has sent from `port` and for a second has had nothing more acknowledged.
fn held_up(bed: &Bed, port: u16) -> Result<(), Failed> {
    let mut last = (0, Instant::now());
    until(Duration::from_secs(30), "the sender to be held up", || {
        let mut command = bed.hosts.corp.command("ss");
        command.args(["-Htni", "sport", "=", &format!(":{port}")]);
        let listed = output(command)?;
        let sent = listed.split_whitespace().find_map(|word| word.strip_prefix("bytes_acked:"));
        let sent: u64 = sent.map_or(Ok(0), str::parse)?;
        if sent != last.0 {
            last = (sent, Instant::now());
        }
        Ok((sent > 0 && last.1.elapsed() > Duration::from_secs(1)).then_some(()))
    })
}

/// The end of our side leaves the other open: all that was sent is echoed, then comes the end.
pub(crate) fn the_end_of_one_side_leaves_the_other_open(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for host in [LAN, "fd20::80", "web"] {
        let mut stream = sidecar.dial(host, 7)?;
        let sent = vec![0x5a_u8; 1 << 20];
        let mut writer = stream.try_clone()?;
        let echoed = thread::scope(|scope| {
            scope.spawn(|| writer.write_all(&sent).and_then(|()| writer.shutdown(Shutdown::Write)));
            drain(&mut stream)
        })?;
        if echoed.0 != 1 << 20 {
            return Err(format!("{host} echoed {} bytes of {}", echoed.0, 1 << 20).into());
        }
        let mut stream = sidecar.dial(host, 9)?;
        stream.write_all(&sent)?;
        stream.shutdown(Shutdown::Write)?;
        let line = crate::client::line(&mut stream)?;
        if !line.starts_with("1048576 ") {
            return Err(format!("{host} discarded {line:?}").into());
        }
    }
    Ok(())
}

/// A reset from the far end is a reset here, after what was sent before it.
pub(crate) fn a_reset_from_afar_is_a_reset_here(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let mut stream = sidecar.dial(LAN, 5001)?;
    stream.write_all(b"x")?;
    expect_reset(&mut stream)?;
    let mut stream = sidecar.dial(LAN, 5002)?;
    let mut bye = [0; 3];
    stream.read_exact(&mut bye)?;
    if &bye != b"bye" {
        return Err(format!("read {bye:?} before the reset").into());
    }
    expect_reset(&mut stream)
}

/// A reset from here is a reset there: the far end's connection is gone and not half-closed.
pub(crate) fn a_reset_from_here_is_a_reset_there(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    let established = || -> Result<usize, Failed> {
        let mut command = bed.hosts.corp.command("ss");
        command.args(["-Htn", "state", "established", "state", "close-wait", "sport", "=", ":5003"]);
        Ok(output(command)?.lines().count())
    };
    let mut stream = sidecar.dial(LAN, 5003)?;
    stream.write_all(b"x")?;
    until(Duration::from_secs(5), "the far end's connection", || Ok((established()? == 1).then_some(())))?;
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    drop(stream);
    until(Duration::from_secs(5), "the far end's reset", || Ok((established()? == 0).then_some(())))
}

/// A client that has closed its sending side is waited for, however long its answer takes, and is not once it is gone.
pub(crate) fn a_client_that_half_closed_is_waited_for_until_it_is_gone(bed: &Bed) -> Result<(), Failed> {
    const PORT: u16 = 5099;
    let sidecar = Launch::new(bed).ready()?;
    let listener = bed.hosts.corp.inside(|| TcpListener::bind((LAN, PORT)))??;
    let mut client = sidecar.dial(LAN, PORT)?;
    let mut far = listener.accept()?.0;
    far.set_read_timeout(Some(Duration::from_secs(5)))?;
    client.shutdown(Shutdown::Write)?;
    let mut octet = [0];
    if far.read(&mut octet)? != 0 {
        return Err("the far end got something".into());
    }
    far.write_all(b"x")?;
    client.read_exact(&mut octet)?;
    rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
    drop(client);
    until(Duration::from_secs(5), "the far end's reset", || Ok(far.take_error()?.map(drop)))
}

/// A closed port refuses at once, by its own code.
pub(crate) fn a_closed_port_is_refused_by_its_code(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    for host in [LAN, "web", "[fd20::80]"] {
        let (response, _) = sidecar.tunnel(&format!("{host}:81"))?;
        response.expect(502, "TC-17").map_err(|why| format!("{host}: {}", why.message().unwrap_or("")))?;
        let (code, _) = sidecar.socks(host.trim_matches(['[', ']']), 81)?;
        if code != 5 || !response.header("proxy-status").unwrap_or("").contains("connection_refused") {
            return Err(format!("{host}: SOCKS {code:02}, {:?}", response.headers).into());
        }
    }
    Ok(())
}

fn download(sidecar: &Sidecar<'_>, host: &str, size: u64) -> Result<(), Failed> {
    let expected = sidecar.get(host, &format!("/sum?n={size}&seed=7"))?.text();
    let mut stream = sidecar.dial(host, 80)?;
    let request = format!("GET /bytes?n={size}&seed=7 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    while !crate::client::line(&mut stream)?.is_empty() {}
    let (length, sum) = drain(&mut stream)?;
    match length == size && sum == expected.trim() {
        true => Ok(()),
        false => Err(format!("{length} bytes of {size}, checksum {sum}, not {expected}").into()),
    }
}

fn upload(sidecar: &Sidecar<'_>, host: &str, size: u64) -> Result<(), Failed> {
    let mut stream = sidecar.dial(host, 80)?;
    let head = format!("POST /upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let mut digest = Context::new(&SHA256);
    let mut block: Vec<u8> = (0..1_u32 << 16).map(|at| at.wrapping_mul(0x9e37_79b1).to_le_bytes()[3]).collect();
    let mut left = size;
    while left > 0 {
        let part = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        block[0] = block[0].wrapping_add(1);
        digest.update(&block[..part]);
        stream.write_all(&block[..part])?;
        left -= part as u64;
    }
    let answer: serde_json::Value = serde_json::from_slice(&crate::client::response(&mut stream, false)?.body)?;
    let sum = hex::encode(digest.finish());
    match answer["n"].as_u64() == Some(size) && answer["sha256"] == sum {
        true => Ok(()),
        false => Err(format!("sent {size} bytes of {sum}, arrived {answer}").into()),
    }
}

/// Reads to the end: how much, and its SHA-256.
fn drain(stream: &mut TcpStream) -> Result<(u64, String), Failed> {
    let mut digest = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 18];
    let mut length = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok((length, hex::encode(digest.finish()))),
            read => {
                digest.update(&buffer[..read]);
                length += read as u64;
            }
        }
    }
}

fn expect_reset(stream: &mut TcpStream) -> Result<(), Failed> {
    match stream.read(&mut [0; 64]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        other => Err(format!("expected a reset, got {other:?}").into()),
    }
}
