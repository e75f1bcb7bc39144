//! What one flag's text means: a plain function a kind, from text to value or to a sentence that says what is wrong.
//!
//! The sentences never repeat the text: clap shows it beside them, after [`super::redact`] has looked at it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use jiff::SignedDuration;
use tracing_subscriber::filter::Targets;
use url::Url;

use crate::node::config::Transport;
use crate::node::dial::DirectRule;
use crate::provision::ClientId;

/// A time such as `500ms`, `30s`, `1h30m`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    const WANTED: &str = "not a time such as 500ms, 30s, 3m or 1h30m";
    if let Ok(seconds) = text.parse::<u32>() {
        return Ok(Duration::from_secs(seconds.into()));
    }
    let time: SignedDuration = text.parse().map_err(|_| WANTED.to_owned())?;
    // A year keeps every later sum of times far from overflow.
    let year = Duration::from_secs(366 * 24 * 3600);
    match Duration::try_from(time) {
        Ok(time) if time <= year => Ok(time),
        Ok(_) | Err(_) => Err(String::from("not between 0 and a year")),
    }
}

/// An address to listen on: `HOST:PORT` with a numeric host or `localhost`. Without a host, or with the port alone,
/// it is on loopback: this proxy serves one machine.
pub(super) fn listen(text: &str) -> Result<SocketAddr, String> {
    let text = text.strip_prefix("localhost").unwrap_or(text);
    let port = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port.parse::<u16>() {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    text.parse().map_err(|_| String::from("not ADDRESS:PORT such as 127.0.0.1:1080 or [::1]:0"))
}

/// A URL of a control server. Whether plain HTTP will do is decided with the host in view, by
/// [`crate::transport::underlay::plain_http_allowed`].
pub(super) fn url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| {
        let bare = error == url::ParseError::RelativeUrlWithoutBase;
        if bare { String::from("the scheme is missing: write https://…") } else { error.to_string() }
    })?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(String::from("neither https:// nor http://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(String::from("a control server's URL has no user name or password"));
    }
    Ok(url)
}

/// The URL of an HTTP proxy, whose user name and password no `Debug` shows.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ProxyUrl(pub(super) Url);

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(url) = self;
        write!(f, "{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
    }
}

/// An HTTP proxy: `http://[USER:PASSWORD@]HOST:PORT`; the scheme may be left out.
pub(super) fn http_proxy(text: &str) -> Result<ProxyUrl, String> {
    let url = if text.contains("://") { Url::parse(text) } else { Url::parse(&format!("http://{text}")) };
    let url = url.map_err(|error| error.to_string())?;
    if url.scheme() != "http" {
        return Err(String::from("only http:// proxies (CONNECT) are supported"));
    }
    if url.host().is_none() {
        return Err(String::from("the host is missing"));
    }
    Ok(ProxyUrl(url))
}

/// Which paths to peers may be used.
pub(super) fn transport(text: &str) -> Result<Transport, String> {
    match text {
        "auto" => Ok(Transport::Auto),
        "direct" => Ok(Transport::Direct),
        "derp" => Ok(Transport::Derp),
        _ => Err(String::from("none of auto, direct, derp")),
    }
}

/// One DNS label: letters, digits and hyphens, at most 63 (RFC 1035, 2.3.1).
pub(super) fn hostname(text: &str) -> Result<String, String> {
    let fits = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    if !fits {
        return Err(String::from("not a host name: 1 to 63 letters, digits and hyphens"));
    }
    Ok(text.to_ascii_lowercase())
}

/// A tag: `tag:` and letters, digits, hyphens. Source: Tailscale, tailcfg, `CheckTag`.
pub(super) fn tag(text: &str) -> Result<String, String> {
    let Some(name) = text.strip_prefix("tag:") else {
        return Err(String::from("a tag begins with tag:"));
    };
    let fits = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fits { Ok(text.to_owned()) } else { Err(String::from("a tag is a letter, then letters, digits and hyphens")) }
}

/// A peer by name, address or stable id; empty for none, as Tailscale's flag takes it.
pub(super) fn exit_node(text: &str) -> Result<String, String> {
    if text.parse::<IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    let fits = text.len() <= 253 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    if fits { Ok(text.to_owned()) } else { Err(String::from("neither a node's name nor an address")) }
}

/// The id of a federated client, with its attributes.
pub(super) fn client_id(text: &str) -> Result<ClientId, String> {
    ClientId::parse(text).map_err(|error| error.to_string())
}

/// `file:PATH`.
pub(super) fn file_source(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("file:") {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        Some(_) | None => Err(String::from("not file:PATH; a secret on the command line could be read by everybody")),
    }
}

/// A host that may leave the tailnet: an address, a CIDR, `*.suffix`, or a name.
pub(super) fn direct_rule(text: &str) -> Result<DirectRule, String> {
    if let Ok(net) = text.parse::<IpNet>() {
        let net = unmapped(net.trunc());
        if net.prefix_len() == 0 {
            return Err(String::from("a prefix of length 0 would let everything leave the tailnet"));
        }
        return Ok(DirectRule::Net(net));
    }
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(DirectRule::Net(IpNet::from(ip.to_canonical())));
    }
    let lower = text.to_ascii_lowercase();
    let (suffix, name) = match lower.strip_prefix("*.") {
        Some(rest) => (true, rest),
        None => (false, lower.as_str()),
    };
    let name = name.trim_end_matches('.');
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(String::from("none of: a name, *.suffix, an address, a CIDR (all without a port)"));
    }
    Ok(if suffix { DirectRule::Suffix(name.to_owned()) } else { DirectRule::Name(name.to_owned()) })
}

/// IPv4 written as IPv6 (RFC 4291, 2.5.5.2), as IPv4: that is how a dial has it.
fn unmapped(net: IpNet) -> IpNet {
    match (net.addr().to_canonical(), net.prefix_len()) {
        (IpAddr::V4(ip), length @ 96..) => Ipv4Net::new(ip, length - 96).map_or(net, IpNet::V4),
        (IpAddr::V4(_) | IpAddr::V6(_), _) => net,
    }
}

/// What `--log-level` takes: a level, or directives of the log filter.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    text.parse::<Targets>().map(|_| text.to_owned()).map_err(|_| String::from("no level and no log directives"))
}

/// A run's label: printable, without white space, at most 128 characters.
pub(super) fn run_id(text: &str) -> Result<String, String> {
    let fits = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err(String::from("not 1 to 128 printable characters without space")) }
}

/// `KEY=VALUE`.
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        Some(_) | None => Err(String::from("not KEY=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        let millis = |text| duration(text).map(|time| time.as_millis());
        assert_eq!(millis("500ms"), Ok(500));
        assert_eq!(millis("30"), Ok(30_000));
        assert_eq!(millis("1h30m"), Ok(5_400_000));
        assert!(["", "-1s", "soon", "3x", "9999999h"].iter().all(|text| duration(text).is_err()));
    }

    #[test]
    fn a_listener_without_host_is_on_loopback() {
        for text in ["1080", ":1080", "localhost:1080", "127.0.0.1:1080"] {
            assert_eq!(listen(text).unwrap().to_string(), "127.0.0.1:1080");
        }
        assert_eq!(listen("[::1]:0").unwrap().to_string(), "[::1]:0");
        assert!(["", "host:1", "127.0.0.1", "127.0.0.1:70000"].iter().all(|text| listen(text).is_err()));
    }

    #[test]
    fn a_control_url_has_a_scheme_and_no_password() {
        assert!(url("headscale.corp").unwrap_err().contains("https://"));
        assert!(url("ftp://x").is_err());
        assert!(url("https://me:secret@x").is_err());
    }

    #[test]
    fn an_underlay_proxy_is_http_with_or_without_its_scheme() {
        assert_eq!(http_proxy("proxy.corp:3128").unwrap().0.as_str(), "http://proxy.corp:3128/");
        assert_eq!(http_proxy("http://u:p@proxy:1").unwrap().0.password(), Some("p"));
        assert!(http_proxy("socks5://proxy:1").is_err());
    }

    #[test]
    fn direct_rules_are_told_apart() {
        assert_eq!(direct_rule("10.1.2.3/8"), Ok(DirectRule::Net("10.0.0.0/8".parse().unwrap())));
        assert_eq!(direct_rule("[::1]"), Ok(DirectRule::Net("::1/128".parse().unwrap())));
        assert_eq!(direct_rule("*.Example.com."), Ok(DirectRule::Suffix("example.com".into())));
        assert_eq!(direct_rule("Example.com"), Ok(DirectRule::Name("example.com".into())));
        assert!(["", "*", "*.", "a..b", "a b", "host:80", "http://x"].iter().all(|text| direct_rule(text).is_err()));
    }

    #[test]
    fn a_direct_rule_for_everything_is_refused() {
        for text in ["0.0.0.0/0", "::/0", "10.0.0.0/0", "::ffff:0:0/96", "::ffff:10.0.0.0/96"] {
            assert!(direct_rule(text).unwrap_err().contains("everything"), "{text}");
        }
    }

    #[test]
    fn ipv4_written_as_ipv6_is_ipv4_in_a_direct_rule() {
        let net = |text: &str| Ok(DirectRule::Net(text.parse().unwrap()));
        assert_eq!(direct_rule("::ffff:10.1.2.3/104"), net("10.0.0.0/8"));
        assert_eq!(direct_rule("::ffff:10.1.2.3"), net("10.1.2.3/32"));
        assert_eq!(direct_rule("[::ffff:a01:203]"), net("10.1.2.3/32"));
        assert_eq!(direct_rule("2001:db8::/32"), net("2001:db8::/32"));
        // Part of a wider prefix, not mapped itself.
        assert_eq!(direct_rule("::/8"), net("::/8"));
    }

    #[test]
    fn an_exit_node_is_a_name_an_address_or_nobody() {
        assert!(
            ["web", "web.tb.example.", "100.64.0.2", "fd7a::2", "nCNTRL", ""]
                .iter()
                .all(|text| exit_node(text).is_ok())
        );
        assert!(["auto:any", "a b", "http://web"].iter().all(|text| exit_node(text).is_err()));
    }

    #[test]
    fn names_and_tags_are_checked() {
        assert_eq!(hostname("Run-7").as_deref(), Ok("run-7"));
        assert!(["", "-a", "a.b", "a_b"].iter().all(|text| hostname(text).is_err()));
        assert!(tag("tag:browser").is_ok() && tag("browser").is_err() && tag("tag:9").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_value_or_a_sentence(text in ".{0,60}") {
            let _ = (duration(&text), listen(&text), url(&text), http_proxy(&text), hostname(&text), tag(&text));
            let _ = (direct_rule(&text), label(&text), run_id(&text), transport(&text), file_source(&text));
        }
    }
}
