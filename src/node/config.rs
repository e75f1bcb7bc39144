//! What a node is told when it starts.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

pub use crate::engine::Transport;
use crate::node::dial::DirectRule;
use crate::provision::Credential;

/// The node's settings. Durations are limits; each has its flag of the same name.
#[derive(Clone)]
pub struct Config {
    /// The control server. Defaults to `https://controlplane.tailscale.com`.
    pub login_server: Url,
    /// What admits us: a key, or what a key is made from first.
    pub credential: Option<Credential>,
    /// The name we ask for.
    pub hostname: String,
    /// Tags to ask for; with an auth key usually none, since the key carries them.
    pub advertise_tags: Vec<String>,
    /// Whether subnet routes of peers are used. Defaults to `true`.
    pub accept_routes: bool,
    /// Whose routes to everything are used, by name, address or stable id. Defaults to nobody's.
    pub exit_node: Option<String>,
    /// Whether the tailnet's DNS settings are used. Defaults to `true`.
    pub accept_dns: bool,
    /// Paths to peers. Defaults to [`Transport::Auto`].
    pub transport: Transport,
    /// More trusted certificates for control and DERP, as a PEM file.
    pub ca_file: Option<PathBuf>,
    /// The HTTP proxy for control and DERP, as from `--proxy` or `HTTPS_PROXY`. May hold a password.
    pub proxy: Option<Url>,
    /// Hosts reached without that proxy, as from `--no-proxy` or `NO_PROXY`.
    pub no_proxy: Vec<String>,
    /// Destinations that may be dialled outside the tailnet. Defaults to none.
    pub direct_allow: Vec<DirectRule>,
    /// The longest that joining may take. Defaults to 60 s.
    pub join_timeout: Duration,
    /// The longest that a connection waits for the node to join. Defaults to 30 s.
    pub hold_timeout: Duration,
    /// The longest that a dial may take once the node has joined. Defaults to 30 s.
    pub dial_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            login_server: Url::parse("https://controlplane.tailscale.com").expect("a constant URL parses"),
            credential: None,
            hostname: String::from("tailcar"),
            advertise_tags: Vec::new(),
            accept_routes: true,
            exit_node: None,
            accept_dns: true,
            transport: Transport::Auto,
            ca_file: None,
            proxy: None,
            no_proxy: Vec::new(),
            direct_allow: Vec::new(),
            join_timeout: Duration::from_secs(60),
            hold_timeout: Duration::from_secs(30),
            dial_timeout: Duration::from_secs(30),
        }
    }
}

/// Without the proxy's URL, which may hold a password, and without the credential.
impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let login_server = self.login_server.as_str();
        f.debug_struct("Config")
            .field("login_server", &login_server)
            .field("hostname", &self.hostname)
            .finish_non_exhaustive()
    }
}
