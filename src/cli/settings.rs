//! What a session is to do: the flags' values, checked together and given their defaults.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use super::args::{LogFormat, OutputFormat, SessionArgs};
use super::credential::{CredentialSource, Flags};
use super::environment::{Environment, present};
use crate::fault::{self, Fault};
use crate::node;
use crate::transport::underlay::plain_http_allowed;

/// Everything that `run` and `exec` need to know.
pub(super) struct Settings {
    /// The node's settings, still without its credential.
    pub(super) node: node::Config,
    /// Where that comes from.
    pub(super) credential: CredentialSource,
    /// Where the proxy listens.
    pub(super) listen: Vec<SocketAddr>,
    /// The file with the proxy's user name and password.
    pub(super) proxy_auth: Option<PathBuf>,
    /// The most connections at once.
    pub(super) max_connections: NonZeroUsize,
    /// When to leave.
    pub(super) life: Life,
    /// What to say, and where.
    pub(super) output: Output,
}

// The node's settings are left out: they may hold a proxy's password.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { credential, listen, life, output, .. } = self;
        let mut fields = f.debug_struct("Settings");
        fields.field("credential", credential).field("listen", listen).field("life", life).field("output", output);
        fields.finish_non_exhaustive()
    }
}

/// When a session ends without a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Life {
    /// The longest from joined to ready.
    pub(super) ready_timeout: Duration,
    /// The longest that a logout may take.
    pub(super) logout_timeout: Duration,
    /// Whether an unconfirmed logout is a failure.
    pub(super) strict_logout: bool,
    /// Leave after this time.
    pub(super) max_lifetime: Option<Duration>,
    /// Leave after this time without a connection.
    pub(super) idle_timeout: Option<Duration>,
    /// Leave when our parent ends.
    pub(super) with_parent: bool,
    /// Leave when standard input ends.
    pub(super) on_stdin_eof: bool,
}

/// Files, formats, labels.
#[derive(Debug, Clone)]
pub(super) struct Output {
    /// What goes to standard output.
    pub(super) format: OutputFormat,
    /// How log lines look.
    pub(super) log_format: LogFormat,
    /// The log filter.
    pub(super) log_filter: String,
    /// Whether only failures are said.
    pub(super) quiet: bool,
    /// This run's label.
    pub(super) run_id: String,
    /// More labels.
    pub(super) labels: Vec<(String, String)>,
    /// There while ready.
    pub(super) ready_file: Option<PathBuf>,
    /// Always the newest.
    pub(super) status_file: Option<PathBuf>,
    /// Our process number.
    pub(super) pidfile: Option<PathBuf>,
}

/// How continuous integration services call one run of one job.
const CI_RUN_IDS: [&str; 6] =
    ["GITHUB_RUN_ID", "CI_JOB_ID", "BUILDKITE_JOB_ID", "CIRCLE_WORKFLOW_JOB_ID", "BUILD_TAG", "BITBUCKET_BUILD_NUMBER"];

impl Output {
    /// What is said, from its flags and the run's label.
    pub(super) fn new(args: &SessionArgs, env: &Environment) -> Self {
        let output = &args.output;
        let run_id = output.run_id.clone().unwrap_or_else(|| run_id(env));
        let level = match (output.log_format, output.quiet) {
            (_, true) => "error",
            (LogFormat::Json, false) => "info",
            (LogFormat::Text, false) => "warn",
        };
        Self {
            format: output.output,
            log_format: output.log_format,
            log_filter: output.log_level.clone().unwrap_or_else(|| level.to_owned()),
            quiet: output.quiet,
            run_id,
            labels: output.metadata.clone(),
            ready_file: output.ready_file.clone(),
            status_file: output.status_file.clone(),
            pidfile: output.pidfile.clone(),
        }
    }
}

#[cfg(test)]
impl Output {
    /// Nothing but failures, and no files.
    pub(super) fn quiet() -> Self {
        Self {
            format: OutputFormat::Text,
            log_format: LogFormat::Text,
            log_filter: String::from("warn"),
            quiet: true,
            run_id: String::from("r42"),
            labels: vec![(String::from("job"), String::from("e2e"))],
            ready_file: None,
            status_file: None,
            pidfile: None,
        }
    }
}

impl Settings {
    /// Checks the flags against each other.
    ///
    /// # Errors
    /// The faults of [`CredentialSource::choose`], `TC-1109` for plain HTTP to a public host, `TC-2009` for a listener
    /// that other machines could reach.
    pub(super) fn new(args: SessionArgs, output: Output, on_stdin_eof: bool, env: &Environment) -> Result<Self, Fault> {
        let listen = listeners(&args)?;
        let SessionArgs { node, underlay, proxy, limits, .. } = args;
        if underlay.login_server.scheme() == "http" && !plain_http_allowed(&underlay.login_server) {
            let host = underlay.login_server.host_str().unwrap_or_default();
            let detail = format!("plain HTTP to the control server {host}, which is neither loopback nor private");
            return Err(Fault::new(&fault::CONTROL_PLAIN, detail));
        }
        let flags = Flags {
            auth_key: node.auth_key,
            auth_key_fd: node.auth_key_fd,
            client_id: node.client_id,
            id_token: node.id_token,
            audience: node.audience,
        };
        let credential = CredentialSource::choose(flags, env)?;
        if on_stdin_eof && credential.reads_stdin() {
            tracing::debug!("the key is the first line of standard input, whose end ends the run");
        }
        let hostname = node.hostname.unwrap_or_else(|| default_hostname(&output.run_id));
        Ok(Self {
            node: node::Config {
                login_server: underlay.login_server,
                credential: None,
                hostname,
                advertise_tags: node.advertise_tags,
                accept_routes: node.accept_routes,
                exit_node: node.exit_node.filter(|name| !name.is_empty()),
                accept_dns: node.accept_dns,
                transport: underlay.transport,
                ca_file: underlay.ca_file,
                proxy: underlay.proxy.map(|proxy| proxy.0),
                no_proxy: underlay.no_proxy.iter().map(|host| host.trim().to_owned()).collect(),
                direct_allow: proxy.direct_allow,
                join_timeout: limits.join_timeout,
                hold_timeout: limits.hold_timeout,
                dial_timeout: limits.dial_timeout,
            },
            credential,
            listen,
            proxy_auth: proxy.proxy_auth,
            max_connections: proxy.max_connections,
            life: Life {
                ready_timeout: limits.ready_timeout,
                logout_timeout: limits.logout_timeout,
                strict_logout: limits.strict_logout,
                max_lifetime: limits.max_lifetime,
                idle_timeout: limits.idle_timeout,
                with_parent: limits.exit_with_parent,
                on_stdin_eof,
            },
            output,
        })
    }
}

impl Settings {
    /// Checks what a command beside us changes.
    ///
    /// # Errors
    /// `TC-2009` for a password that the command's proxy variables could not carry, and for a key that it could read.
    pub(super) fn check_for_command(&self) -> Result<(), Fault> {
        if self.proxy_auth.is_some() {
            let detail = "--proxy-auth is not for exec: the command's proxy variables carry no password";
            return Err(Fault::new(&fault::USAGE, detail));
        }
        self.credential.check_for_command()
    }
}

/// Where to listen: what the flags say, else a free port of loopback.
fn listeners(args: &SessionArgs) -> Result<Vec<SocketAddr>, Fault> {
    let proxy = &args.proxy;
    let mut listen = proxy.listen.clone();
    for address in [proxy.socks5_server, proxy.outbound_http_proxy_listen].into_iter().flatten() {
        // Two names for one port are one listener: it speaks both.
        if address.port() == 0 || !listen.contains(&address) {
            listen.push(address);
        }
    }
    if listen.is_empty() {
        listen.push(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
    }
    match listen.iter().find(|address| !address.ip().is_loopback()) {
        Some(address) if !proxy.allow_non_loopback => {
            let detail = format!("{address} can be reached by other machines; --allow-non-loopback permits that");
            Err(Fault::new(&fault::USAGE, detail))
        }
        Some(_) | None => Ok(listen),
    }
}

/// The CI's own name for the run, else eight random digits.
fn run_id(env: &Environment) -> String {
    let ci = CI_RUN_IDS.iter().find_map(|name| present(env, name)?.to_str());
    ci.map_or_else(|| format!("{:08x}", rand::random::<u32>()), str::to_owned)
}

/// `tailcar-RUN_ID` as a DNS label: lower case, anything else a hyphen, at most 63 characters.
fn default_hostname(run_id: &str) -> String {
    let name: String = format!("tailcar-{run_id}")
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    name.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::Parser;

    use super::super::args::{Cli, Command};
    use super::*;

    fn settings(line: &str) -> Result<Settings, Fault> {
        settings_in(line, &Environment::new())
    }

    fn settings_in(line: &str, env: &Environment) -> Result<Settings, Fault> {
        let words = ["tailcar", "run", "--auth-key=file:/k"].into_iter().chain(line.split_whitespace());
        let Command::Run(run) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        let output = Output::new(&run.session, env);
        Settings::new(run.session, output, run.exit_on_stdin_eof, env)
    }

    #[test]
    fn without_a_listener_there_is_one_on_a_free_port() {
        assert_eq!(settings("").unwrap().listen, ["127.0.0.1:0".parse().unwrap()]);
    }

    #[test]
    fn aliases_add_listeners_and_two_names_for_one_are_one() {
        let listen = settings("--listen :1 --socks5-server :2 --outbound-http-proxy-listen :2").unwrap().listen;
        assert_eq!(listen, ["127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap()]);
    }

    #[test]
    fn other_machines_are_let_in_only_by_a_flag() {
        let fault = settings("--listen 0.0.0.0:1080").unwrap_err();
        assert_eq!((fault.row, fault.row.exit), (&fault::USAGE, 64));
        assert!(settings("--listen 0.0.0.0:1080 --allow-non-loopback").is_ok());
    }

    #[test]
    fn plain_http_to_a_public_name_is_refused() {
        let fault = settings("--login-server http://headscale.example").unwrap_err();
        assert_eq!((fault.row, fault.row.exit), (&fault::CONTROL_PLAIN, 64));
        assert!(settings("--login-server http://10.0.0.1:8080").is_ok());
    }

    #[test]
    fn a_proxy_password_is_in_no_debug_output() {
        let line = "--proxy http://me:geheim@proxy:3128";
        let cli = Cli::try_parse_from(["tailcar", "run"].into_iter().chain(line.split(' '))).unwrap();
        let shown = format!("{cli:?} {:?}", settings(line).unwrap());
        assert!(shown.contains("proxy:3128") && !shown.contains("geheim"), "{shown}");
        assert_eq!(settings(line).unwrap().node.proxy.unwrap().password(), Some("geheim"));
    }

    #[test]
    fn a_command_gets_no_proxy_that_asks_it_for_a_password() {
        assert!(settings("").unwrap().check_for_command().is_ok());
        let fault = settings("--proxy-auth file:/a").unwrap().check_for_command().unwrap_err();
        assert_eq!((fault.row, fault.row.exit), (&fault::USAGE, 64));
    }

    #[test]
    fn the_run_is_named_by_the_flag_or_the_ci_and_the_node_after_it() {
        let env = Environment::from([(OsString::from("GITHUB_RUN_ID"), OsString::from("42"))]);
        assert_eq!(settings_in("", &env).unwrap().node.hostname, "tailcar-42");
        let named = settings_in("--run-id My_Run.7.", &env).unwrap();
        assert_eq!((named.output.run_id.as_str(), named.node.hostname.as_str()), ("My_Run.7.", "tailcar-my-run-7"));
        assert_eq!(settings("").unwrap().output.run_id.len(), 8);
        assert_eq!(default_hostname(&"x".repeat(100)).len(), 63);
    }
}
