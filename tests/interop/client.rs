//! Clients of the proxy that speak byte by byte: SOCKS5 (RFC 1928), HTTP/1.1 (RFC 9112), WebSocket (RFC 6455).

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use libtest_mimic::Failed;

use crate::namespace::Namespace;

/// How long a read or write may take before the scenario fails.
const PATIENCE: Duration = Duration::from_secs(40);

/// Opens a TCP connection from inside `namespace`.
///
/// # Errors
/// When it is refused or takes over five seconds.
pub(crate) fn connect(namespace: &Namespace, address: SocketAddr) -> Result<TcpStream, Failed> {
    let stream = namespace.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(5)))??;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks a SOCKS5 proxy for `host:port`: the reply code, and the stream behind it.
///
/// The host goes as an IPv4 or IPv6 address where it is one, else as a domain.
///
/// # Errors
/// When the proxy breaks the protocol.
pub(crate) fn socks5(mut stream: TcpStream, host: &str, port: u16) -> Result<(u8, TcpStream), Failed> {
    stream.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    if method != [5, 0] {
        return Err(format!("the proxy chose method {method:02x?}").into());
    }
    stream.write_all(&socks5_request(1, host, port))?;
    let code = socks5_reply(&mut stream)?;
    Ok((code, stream))
}

/// A SOCKS5 request of any command.
pub(crate) fn socks5_request(command: u8, host: &str, port: u16) -> Vec<u8> {
    let mut request = vec![5, command, 0];
    match host.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => {
            request.push(1);
            request.extend(address.octets());
        }
        Ok(IpAddr::V6(address)) => {
            request.push(4);
            request.extend(address.octets());
        }
        Err(_) => {
            request.push(3);
            request.push(u8::try_from(host.len()).unwrap_or(u8::MAX));
            request.extend(host.as_bytes());
        }
    }
    request.extend(port.to_be_bytes());
    request
}

/// Reads a SOCKS5 reply with its bound address; its code.
///
/// # Errors
/// When it is cut short or is none.
pub(crate) fn socks5_reply(stream: &mut impl Read) -> Result<u8, Failed> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let length = match head {
        [5, _, 0, 1] => 4,
        [5, _, 0, 4] => 16,
        [5, _, 0, 3] => {
            let mut length = [0];
            stream.read_exact(&mut length)?;
            usize::from(length[0])
        }
        other => return Err(format!("not a SOCKS5 reply: {other:02x?}").into()),
    };
    let mut rest = vec![0; length + 2];
    stream.read_exact(&mut rest)?;
    Ok(head[1])
}

/// An HTTP response: its head and its whole body.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// A header's first value; names in any case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Holds the response to a status and a `TC-` code in the header that carries it.
    ///
    /// # Errors
    /// With what came instead.
    pub(crate) fn expect(&self, status: u16, code: &str) -> Result<(), Failed> {
        let found = self.header("x-tailcar-error").unwrap_or("");
        if self.status == status && found.starts_with(code) {
            return Ok(());
        }
        Err(format!("expected {status} {code}…, got {} {found} {:?}", self.status, self.text()).into())
    }
}

/// Sends `request` as it is and reads one response.
///
/// # Errors
/// When the answer is not HTTP/1.1, or is cut short.
pub(crate) fn http(stream: &mut TcpStream, request: &str) -> Result<Response, Failed> {
    stream.write_all(request.as_bytes())?;
    response(stream, request.starts_with("HEAD "))
}

/// Reads one response; `bodiless` for the answers to HEAD.
///
/// # Errors
/// When it is not HTTP/1.1, or is cut short.
pub(crate) fn response(stream: &mut impl Read, bodiless: bool) -> Result<Response, Failed> {
    let (status, headers) = head(stream)?;
    let mut response = Response { status, headers, body: Vec::new() };
    if bodiless || status == 204 || status == 304 || (100..200).contains(&status) {
        return Ok(response);
    }
    if response.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        response.body = chunks(stream)?;
    } else if let Some(length) = response.header("content-length") {
        response.body = vec![0; length.parse()?];
        stream.read_exact(&mut response.body)?;
    } else {
        stream.read_to_end(&mut response.body)?;
    }
    Ok(response)
}

/// Opens a CONNECT tunnel: the response, and the stream behind it when that was a 200.
///
/// # Errors
/// When the answer is not HTTP/1.1.
pub(crate) fn tunnel(mut stream: TcpStream, authority: &str) -> Result<(Response, TcpStream), Failed> {
    stream.write_all(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes())?;
    let (status, headers) = head(&mut stream)?;
    let mut response = Response { status, headers, body: Vec::new() };
    if status != 200
        && let Some(length) = response.header("content-length")
    {
        response.body = vec![0; length.parse()?];
        stream.read_exact(&mut response.body)?;
    }
    Ok((response, stream))
}

/// Reads a response's head byte by byte: nothing of what follows may be swallowed.
fn head(stream: &mut impl Read) -> Result<(u16, Vec<(String, String)>), Failed> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Err(format!("closed within a head: {:?}", String::from_utf8_lossy(&bytes)).into());
        }
        bytes.push(byte[0]);
        if bytes.len() > 1 << 16 {
            return Err("a head of over 64 KiB".into());
        }
    }
    let text = String::from_utf8(bytes)?;
    let mut lines = text.split("\r\n");
    let first = lines.next().unwrap_or("");
    let status = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| format!("not an HTTP/1.1 answer: {first:?}"))?;
    let headers = lines.filter_map(|line| line.split_once(':'));
    Ok((status, headers.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()))
}

fn chunks(stream: &mut impl Read) -> Result<Vec<u8>, Failed> {
    let mut body = Vec::new();
    loop {
        let line = line(stream)?;
        let size = usize::from_str_radix(line.split(';').next().unwrap_or("").trim(), 16)?;
        if size == 0 {
            while !self::line(stream)?.is_empty() {}
            return Ok(body);
        }
        let start = body.len();
        body.resize(start + size, 0);
        stream.read_exact(&mut body[start..])?;
        if !self::line(stream)?.is_empty() {
            return Err("a chunk longer than its size".into());
        }
    }
}

/// Reads up to a line feed; the line without its end.
///
/// # Errors
/// Those of reading, an end in the middle of the line included.
pub(crate) fn line(stream: &mut impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        match byte[0] {
            b'\n' => break,
            other => bytes.push(other),
        }
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(text.trim_end_matches('\r').to_owned())
}
