//! UDP through SOCKS5 UDP ASSOCIATE: the same names, routes and refusals as TCP.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use libtest_mimic::Failed;

use crate::bed::{Bed, TRAP};
use crate::client;
use crate::namespace::Namespace;
use crate::process::{tail, until};
use crate::sidecar::{JOIN, Launch, Sidecar};

/// How long an answer may take, handshake and DNS included.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer is waited for that must not come.
const SILENCE: Duration = Duration::from_secs(2);
/// The LAN's service: it answers a datagram with as many octets as its text says, or else with the datagram.
const SERVICE: u16 = 5005;

/// A client's association with a proxy.
struct Association {
    _connection: TcpStream,
    socket: UdpSocket,
    relay: SocketAddr,
}

impl Association {
    /// Asks the proxy behind `connection` for one.
    fn open(host: &Namespace, mut connection: TcpStream) -> Result<Self, Failed> {
        let socket = host.inside(|| UdpSocket::bind("127.0.0.1:0"))??;
        connection.write_all(&[5, 1, 0])?;
        connection.read_exact(&mut [0; 2])?;
        connection.write_all(&client::socks5_request(3, "0.0.0.0", 0))?;
        let mut reply = [0; 10];
        connection.read_exact(&mut reply)?;
        let [5, 0, 0, 1, 127, 0, 0, 1, port @ ..] = reply else {
            return Err(format!("reply to UDP ASSOCIATE: {reply:02x?}").into());
        };
        let relay = SocketAddr::from(([127, 0, 0, 1], u16::from_be_bytes(port)));
        Ok(Self { _connection: connection, socket, relay })
    }

    fn of(sidecar: &Sidecar<'_>, bed: &Bed) -> Result<Self, Failed> {
        Self::open(&bed.hosts.client, sidecar.connect()?)
    }

    fn send(&self, host: &str, port: u16, payload: &[u8]) -> Result<(), Failed> {
        // A datagram's header is a request's with the fragment in the place of the reserved octet.
        let mut datagram = client::socks5_request(0, host, port);
        datagram[0] = 0;
        datagram.extend(payload);
        self.socket.send_to(&datagram, self.relay)?;
        Ok(())
    }

    /// The next answer, with the address that it says it came from; `None` when none comes within `limit`.
    fn answer(&self, limit: Duration) -> Result<Option<(SocketAddr, Vec<u8>)>, Failed> {
        self.socket.set_read_timeout(Some(limit))?;
        let mut datagram = vec![0; 65_535];
        let Ok(length) = self.socket.recv(&mut datagram) else { return Ok(None) };
        datagram.truncate(length);
        let (address, length) = match datagram.as_slice() {
            [0, 0, 0, 1, a, b, c, d, ..] => ([*a, *b, *c, *d].into(), 8),
            [0, 0, 0, 4, rest @ ..] => (<[u8; 16]>::try_from(rest.get(..16).ok_or("cut short")?)?.into(), 20),
            other => return Err(format!("not a SOCKS5 datagram: {other:02x?}").into()),
        };
        let port = u16::from_be_bytes([datagram[length], datagram[length + 1]]);
        Ok(Some((SocketAddr::new(address, port), datagram.split_off(length + 2))))
    }

    /// Sends and holds the answer to `expected`, octets and source.
    fn ask(&self, host: &str, port: u16, payload: &[u8], expected: (&str, &[u8])) -> Result<(), Failed> {
        self.send(host, port, payload)?;
        self.expect(expected).map_err(|why| format!("{host}:{port}: {}", why.message().unwrap_or("")).into())
    }

    /// Holds the next answer to `expected`, source and octets.
    fn expect(&self, expected: (&str, &[u8])) -> Result<(), Failed> {
        match self.answer(PATIENCE)? {
            Some((source, octets)) if source.to_string() == expected.0 && octets == expected.1 => Ok(()),
            Some((source, octets)) => Err(format!("{} octets from {source}", octets.len()).into()),
            None => Err("no answer".into()),
        }
    }
}

/// A UDP service on one of the LAN's addresses, for as long as it lives.
struct Service {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Service {
    fn start(bed: &Bed, address: &str) -> Result<Self, Failed> {
        let address: SocketAddr = address.parse()?;
        let socket = bed.hosts.corp.inside(|| UdpSocket::bind(address))??;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut buffer = [0; 2_048];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                    let asked = str::from_utf8(&buffer[..length]).ok().and_then(|text| text.parse::<usize>().ok());
                    // An answer that the kernel knows to be too long for the path is lost like any other.
                    let _ = match asked {
                        Some(octets) => socket.send_to(&vec![7; octets], from),
                        None => socket.send_to(&buffer[..length], from),
                    };
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A question for the A records of `name` (RFC 1035, 4.1).
fn question(name: &str) -> Vec<u8> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap_or(0));
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

/// Real DNS with the LAN's resolver, services by address of both families, by split-DNS name and by MagicDNS name.
pub(crate) fn datagrams_reach_the_lan_by_address_and_by_name(bed: &Bed) -> Result<(), Failed> {
    let _services = [Service::start(bed, "10.20.0.80:5005")?, Service::start(bed, "[fd20::80]:5005")?];
    let sidecar = Launch::new(bed).ready()?;
    let association = Association::of(&sidecar, bed)?;
    association.send("10.20.0.53", 53, &question("v4.corp.test"))?;
    let (source, answer) = association.answer(PATIENCE)?.ok_or("the LAN's resolver did not answer")?;
    if source.to_string() != "10.20.0.53:53" || answer[..2] != [0x12, 0x34] || !answer.ends_with(&[10, 20, 0, 80]) {
        return Err(format!("{source} answered {answer:02x?}").into());
    }
    let payload = vec![42; 1_200];
    for (host, source) in [
        ("10.20.0.80", "10.20.0.80:5005"),
        ("fd20::80", "[fd20::80]:5005"),
        ("v4.corp.test", "10.20.0.80:5005"),
        ("V6.Corp.Test.", "[fd20::80]:5005"),
        ("web.corp.test", "10.20.0.80:5005"),
    ] {
        association.ask(host, SERVICE, &payload, (source, &payload))?;
    }
    association.ask("web", 7, &payload, (&format!("{}:7", bed.web4()), &payload))
}

/// Datagrams that are sent while the node joins are held, and answered without a second try.
pub(crate) fn datagrams_during_the_join_are_held(bed: &Bed) -> Result<(), Failed> {
    let _service = Service::start(bed, "10.20.0.80:5005")?;
    let listener: SocketAddr = "127.0.0.1:18082".parse()?;
    let mut sidecar = Launch::new(bed).args(&["--listen", "127.0.0.1:18082"]).start()?;
    let connection = until(Duration::from_secs(5), "the proxy to be bound", || {
        Ok(client::connect(&bed.hosts.client, listener).ok())
    })?;
    let association = Association::open(&bed.hosts.client, connection)?;
    association.send("web.corp.test", SERVICE, b"early")?;
    sidecar.object(JOIN)?;
    association
        .expect(("10.20.0.80:5005", b"early"))
        .map_err(|why| format!("{}\n{}", why.message().unwrap_or(""), tail(&sidecar.process.log())).into())
}

/// What would be public is dropped, counted and listed, and nothing of it leaves; the tailnet goes on.
pub(crate) fn public_datagrams_go_nowhere(bed: &Bed) -> Result<(), Failed> {
    // Linux's default for a socket holds 256 such datagrams: none is lost before the proxy reads it, however late it does.
    const ROUNDS: usize = 30;
    let _service = Service::start(bed, "10.20.0.80:5005")?;
    let mut sidecar = Launch::new(bed).ready()?;
    let association = Association::of(&sidecar, bed)?;
    let hosts = [TRAP, "8.8.8.8", "2001:4860:4860::8888", "169.254.169.254", "public.example", "127.0.0.1"];
    for _ in 0..ROUNDS {
        for host in hosts {
            association.send(host, 53, &question("www.example.com"))?;
        }
        thread::sleep(Duration::from_millis(2));
    }
    if let Some((source, octets)) = association.answer(SILENCE)? {
        return Err(format!("{source} answered {} octets", octets.len()).into());
    }
    association.ask("10.20.0.80", SERVICE, b"routed", ("10.20.0.80:5005", b"routed"))?;
    drop(association);
    sidecar.terminate()?;
    let log = sidecar.process.log();
    for destination in ["8.8.8.8:53", "[2001:4860:4860::8888]:53", "public.example:53"] {
        if !log.contains(&format!("{destination} (1)")) {
            return Err(format!("{destination} is not listed once\n{}", tail(&log)).into());
        }
    }
    let counted = format!("Unsent(Refused): {}", ROUNDS * hosts.len());
    match log.contains(&counted) {
        true => Ok(()),
        false => Err(format!("no {counted:?} in the log\n{}", tail(&log)).into()),
    }
}

/// What a packet inside the tunnel holds goes; longer datagrams are dropped and counted, and so are answers that come
/// in fragments. Neither harms the flow.
pub(crate) fn datagrams_are_as_long_as_one_packet_in_the_tunnel(bed: &Bed) -> Result<(), Failed> {
    let _services = [Service::start(bed, "10.20.0.80:5005")?, Service::start(bed, "[fd20::80]:5005")?];
    let mut sidecar = Launch::new(bed).ready()?;
    let association = Association::of(&sidecar, bed)?;
    for (host, source, longest) in [("10.20.0.80", "10.20.0.80:5005", 1_252), ("fd20::80", "[fd20::80]:5005", 1_232)] {
        let payload = vec![42; longest];
        association.ask(host, SERVICE, &payload, (source, &payload))?;
        association.send(host, SERVICE, &vec![42; longest + 1])?;
        association.ask(host, SERVICE, b"still here", (source, b"still here"))?;
        // The first teaches the LAN's kernel the path's MTU; what follows comes in fragments.
        for _ in 0..3 {
            association.send(host, SERVICE, b"1400")?;
            if let Some((_, octets)) = association.answer(SILENCE)? {
                return Err(format!("{host}: an answer of {} octets came whole", octets.len()).into());
            }
        }
        association.ask(host, SERVICE, b"1200", (source, &[7; 1_200]))?;
    }
    drop(association);
    sidecar.terminate()?;
    let log = sidecar.process.log();
    let fragments = log.split("dropped_fragment: ").nth(1).and_then(|rest| rest.split([',', ' ']).next()).unwrap_or("");
    if !log.contains("Unsent(TooLong): 2") || matches!(fragments, "" | "0") {
        return Err(format!("{fragments:?} fragments, or datagrams too long not counted\n{}", tail(&log)).into());
    }
    Ok(())
}

/// A route that is withdrawn ends the mapping that used it, and nothing goes out in its place; it may come back.
pub(crate) fn a_withdrawn_route_ends_its_datagrams(bed: &Bed) -> Result<(), Failed> {
    let usual = ["10.20.0.0/24", "fd20::/64"];
    let _service = Service::start(bed, "10.21.0.80:5005")?;
    let sidecar = Launch::new(bed).ready()?;
    let association = Association::of(&sidecar, bed)?;
    let answers = |limit| -> Result<bool, Failed> {
        association.send("10.21.0.80", SERVICE, b"x")?;
        Ok(association.answer(limit)?.is_some())
    };
    let at_least_once = |what: &str, wanted: bool| {
        until(Duration::from_secs(15), what, || Ok((answers(Duration::from_millis(500))? == wanted).then_some(())))
    };
    let approve = |routes: &[&str]| bed.headscale().approve("router", routes);
    if answers(SILENCE)? {
        return Err("10.21.0.80 answered before its route was approved".into());
    }
    approve(&["10.20.0.0/24", "fd20::/64", "10.21.0.0/24"])?;
    let came = at_least_once("the approved route to carry datagrams", true);
    approve(&usual)?;
    came?;
    at_least_once("the withdrawn route to be silent", false)?;
    until(Duration::from_secs(15), "the withdrawn route to be told", || {
        answers(Duration::from_millis(500))?;
        Ok(sidecar.process.log().contains("code=1502").then_some(()))
    })
}

/// The association ends with the connection that asked for it, and its port with it.
pub(crate) fn an_association_ends_with_its_connection(bed: &Bed) -> Result<(), Failed> {
    let _service = Service::start(bed, "10.20.0.80:5005")?;
    let sidecar = Launch::new(bed).ready()?;
    let Association { _connection: connection, socket, relay } = Association::of(&sidecar, bed)?;
    drop(connection);
    socket.connect(relay)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    until(Duration::from_secs(5), "the association's port to be closed", || {
        let sent = socket.send(b"x").and_then(|_| socket.recv(&mut [0]));
        Ok(sent.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused).then_some(()))
    })
}
