//! The command line: flags, their help, and nothing that needs more than the words themselves.
//!
//! Environment variables take part as words before the user's own (see [`super::environment`]), so a flag has one
//! parser wherever it comes from, and the last one wins.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::builder::styling::{AnsiColor, Styles};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use url::Url;

use super::key_source::KeySource;
use super::values::{self, ProxyUrl};
use crate::node::config::Transport;
use crate::node::dial::DirectRule;
use crate::provision::ClientId;

/// Joins a tailnet for one run of a headless browser, and gives it a local proxy into it
#[derive(Debug, Parser)]
#[command(
    name = "tailcar",
    version,
    about,
    long_about = LONG_ABOUT,
    after_help = EXAMPLES,
    styles = STYLES,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 110
)]
pub(super) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Join, offer the proxy, and stay until told to stop
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Run(RunArgs),
    /// Join, run a command with its proxy variables set, and exit with its exit code
    #[command(after_help = EXEC_EXAMPLES, args_override_self = true)]
    Exec(ExecArgs),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man {
        /// The command whose page it is [default: the program's own]
        page: Option<String>,
    },
}

/// `tailcar run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// What it shares with `exec`.
    #[command(flatten)]
    pub(super) session: SessionArgs,
    /// Leave when standard input ends; the parent keeps its end of a pipe open
    #[arg(long, help_heading = "Life", overrides_with = "exit_on_stdin_eof")]
    pub(super) exit_on_stdin_eof: bool,
}

/// `tailcar exec`.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// What it shares with `run`.
    #[command(flatten)]
    pub(super) session: SessionArgs,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    pub(super) command: Vec<OsString>,
}

/// Everything that `run` and `exec` share.
#[derive(Debug, Args)]
pub(super) struct SessionArgs {
    /// Who we are in the tailnet.
    #[command(flatten)]
    pub(super) node: NodeArgs,
    /// How control and DERP are reached.
    #[command(flatten)]
    pub(super) underlay: UnderlayArgs,
    /// What the browser gets.
    #[command(flatten)]
    pub(super) proxy: ProxyArgs,
    /// How long things may take.
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    /// What is said, and where.
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

/// The node's own settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Node")]
pub(super) struct NodeArgs {
    /// Where the auth key is: file:PATH, or - for the first line of standard input. The secret of an OAuth client,
    /// tskey-client-…, makes a key; it may end in ?ephemeral=BOOL&preauthorized=BOOL&baseURL=URL and needs
    /// --advertise-tags [env: TS_AUTHKEY and TS_AUTH_KEY hold the key itself, TS_AUTHKEY_FILE a path,
    /// TS_CLIENT_SECRET a client's secret]
    #[arg(long, alias = "authkey", value_name = "SOURCE", value_parser = KeySource::parse, allow_hyphen_values = true)]
    pub(super) auth_key: Option<KeySource>,
    /// Read the auth key from this open file descriptor
    #[arg(long, value_name = "N", conflicts_with = "auth_key")]
    pub(super) auth_key_fd: Option<u32>,
    /// Make a key as this federated client, for a workload that proves who it is; the id may end in
    /// ?ephemeral=BOOL&preauthorized=BOOL. Needs --advertise-tags, and --id-token or --audience [env: TS_CLIENT_ID]
    #[arg(long, value_name = "ID", value_parser = values::client_id, conflicts_with_all = ["auth_key", "auth_key_fd"])]
    pub(super) client_id: Option<ClientId>,
    /// Where the workload's ID token is: file:PATH, or - for the first line of standard input [env: TS_ID_TOKEN holds
    /// the token itself]
    #[arg(long, value_name = "SOURCE", value_parser = KeySource::parse, allow_hyphen_values = true)]
    pub(super) id_token: Option<KeySource>,
    /// Ask the runner of this GitHub Actions job for an ID token for this audience [env: TS_AUDIENCE]
    #[arg(long, value_name = "AUDIENCE", conflicts_with = "id_token")]
    pub(super) audience: Option<String>,
    /// The node's name in the tailnet [default: tailcar-RUN_ID] [env: TS_HOSTNAME]
    #[arg(long, value_name = "NAME", value_parser = values::hostname)]
    pub(super) hostname: Option<String>,
    /// Ask for these tags, separated by commas; with an auth key usually none, since the key carries them, but a key
    /// that is made first is made for them
    #[arg(long, value_name = "TAGS", value_delimiter = ',', value_parser = values::tag)]
    pub(super) advertise_tags: Vec<String>,
    /// Use the subnet routes of peers
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true,
          default_missing_value = "true", action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    pub(super) accept_routes: bool,
    /// Send what is public through this peer, by name or address; private addresses never go there
    #[arg(long, value_name = "NAME|IP", value_parser = values::exit_node)]
    pub(super) exit_node: Option<String>,
    /// Use the tailnet's DNS settings [env: TS_ACCEPT_DNS]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true,
          default_missing_value = "true", action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    pub(super) accept_dns: bool,
}

/// The way to control, DERP and peers.
#[derive(Debug, Args)]
#[command(next_help_heading = "Underlay")]
pub(super) struct UnderlayArgs {
    /// The control server
    #[arg(long, value_name = "URL", default_value = "https://controlplane.tailscale.com", value_parser = values::url)]
    pub(super) login_server: Url,
    /// Paths to peers: auto relays until a direct path works, direct and derp take one kind only
    #[arg(long, value_name = "KIND", default_value = "auto", value_parser = values::transport)]
    pub(super) transport: Transport,
    /// An HTTP proxy for control and DERP, never for targets [env: HTTPS_PROXY]
    #[arg(long, value_name = "URL", value_parser = values::http_proxy)]
    pub(super) proxy: Option<ProxyUrl>,
    /// Hosts that are reached without that proxy, separated by commas [env: NO_PROXY]
    #[arg(long, value_name = "HOSTS", value_delimiter = ',')]
    pub(super) no_proxy: Vec<String>,
    /// More trusted certificates for control and DERP, as PEM [env: SSL_CERT_FILE]
    #[arg(long, value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
}

/// The local proxy.
#[derive(Debug, Args)]
#[command(next_help_heading = "Proxy")]
pub(super) struct ProxyArgs {
    /// Listen here, for SOCKS5 and HTTP on one port; may be given several times [default: 127.0.0.1:0]
    #[arg(long, value_name = "ADDR", value_parser = values::listen)]
    pub(super) listen: Vec<SocketAddr>,
    /// One more address to listen on [env: TS_SOCKS5_SERVER]
    #[arg(long, value_name = "ADDR", value_parser = values::listen)]
    pub(super) socks5_server: Option<SocketAddr>,
    /// One more address to listen on [env: TS_OUTBOUND_HTTP_PROXY_LISTEN]
    #[arg(long, value_name = "ADDR", value_parser = values::listen)]
    pub(super) outbound_http_proxy_listen: Option<SocketAddr>,
    /// Permit addresses that other machines can reach; use it with --proxy-auth
    #[arg(long, overrides_with = "allow_non_loopback")]
    pub(super) allow_non_loopback: bool,
    /// Ask clients for the user name and password in this file: file:PATH, one line user:password; not with exec,
    /// whose command would not know them
    #[arg(long, value_name = "SOURCE", value_parser = values::file_source)]
    pub(super) proxy_auth: Option<PathBuf>,
    /// Let this host leave the tailnet: a name, *.suffix, an address or a CIDR; may be given several times
    #[arg(long, value_name = "HOST", value_delimiter = ',', value_parser = values::direct_rule)]
    pub(super) direct_allow: Vec<DirectRule>,
    /// The most connections at once
    #[arg(long, value_name = "N", default_value = "4096")]
    pub(super) max_connections: NonZeroUsize,
}

/// Durations: `500ms`, `30s`, `3m`, `1h30m`; a bare number is seconds.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// The longest that joining may take [env: TS_BOOT_TIMEOUT]
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = values::duration)]
    pub(super) join_timeout: Duration,
    /// The longest from joined to ready
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = values::duration)]
    pub(super) ready_timeout: Duration,
    /// The longest that an early connection waits for the node to join
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    pub(super) hold_timeout: Duration,
    /// The longest that a connection to a target may take
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = values::duration)]
    pub(super) dial_timeout: Duration,
    /// The longest that logging out may take
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = values::duration)]
    pub(super) logout_timeout: Duration,
    /// Exit with 80 when control did not confirm the logout
    #[arg(long, overrides_with = "strict_logout")]
    pub(super) strict_logout: bool,
    /// Leave after this time
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(super) max_lifetime: Option<Duration>,
    /// Leave once no connection was open for this time
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(super) idle_timeout: Option<Duration>,
    /// Leave when the process that started us ends
    #[arg(long, overrides_with = "exit_with_parent")]
    pub(super) exit_with_parent: bool,
}

/// What is written to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OutputFormat {
    /// Lines for people, on standard error.
    Text,
    /// Also one line of JSON on standard output when ready, and one on failure.
    Json,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Files, logs, labels.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct OutputArgs {
    /// json: also one line on standard output when ready, and one on failure
    #[arg(long, short, value_name = "FORMAT", default_value = "text", hide_possible_values = true)]
    pub(super) output: OutputFormat,
    /// Written when ready, with the JSON of that moment; gone before and after [env: TAILCAR_READY_FILE]
    #[arg(long, value_name = "FILE")]
    pub(super) ready_file: Option<PathBuf>,
    /// Always holds the newest JSON [env: TAILCAR_STATUS_FILE]
    #[arg(long, value_name = "FILE")]
    pub(super) status_file: Option<PathBuf>,
    /// Holds our process number while we run [env: TAILCAR_PIDFILE]
    #[arg(long, value_name = "FILE")]
    pub(super) pidfile: Option<PathBuf>,
    /// Logs on standard error, as text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", hide_possible_values = true)]
    pub(super) log_format: LogFormat,
    /// error, warn, info, debug or trace; or directives such as tailcar::node=debug
    /// [default: warn, info with --log-format json] [env: TAILCAR_LOG]
    #[arg(long, value_name = "LEVEL", value_parser = values::log_filter)]
    pub(super) log_level: Option<String>,
    /// Say nothing on standard error but failures
    #[arg(long, short, overrides_with = "quiet")]
    pub(super) quiet: bool,
    /// This run's label in logs, JSON and the default host name [env: TAILCAR_RUN_ID, else the CI's own, else random]
    #[arg(long, value_name = "ID", value_parser = values::run_id)]
    pub(super) run_id: Option<String>,
    /// A label for the JSON, KEY=VALUE; may be given several times
    #[arg(long, value_name = "K=V", value_parser = values::label)]
    pub(super) metadata: Vec<(String, String)>,
}

const LONG_ABOUT: &str = "\
Joins a tailnet for one run of a headless browser, and gives it a local proxy into it.

tailcar takes an ephemeral auth key, joins as a WireGuard node inside this process (no root, no network device),
listens as SOCKS5 and HTTP proxy on one local port, and logs out at the end. What the proxy cannot reach through the
tailnet fails with a code and a cause; it never goes out by the public internet instead.";

const EXAMPLES: &str = "\
Examples:
  # a proxy on a free port, printed once it is ready; Ctrl-C leaves the tailnet
  tailcar run --auth-key file:/run/secrets/authkey

  # beside a browser: one line of JSON when ready
  TS_AUTHKEY=… tailcar run --listen 127.0.0.1:1080 --output json

  # one command inside the tailnet
  tailcar exec --auth-key file:key -- curl http://intranet/

  # headscale with a certificate of your own authority
  tailcar run --login-server https://headscale.corp --ca-file ca.pem --auth-key file:key

TS_EXTRA_ARGS holds more flags of `run`. Durations are written 500ms, 30s, 3m or 1h30m.

Exit codes:
  0 done   64-66 usage, key or setting, file   70 a bug   71 the system refused
  73 a file cannot be written   74 lost in mid-run   75 try again   76 something unexpected answers
  77 refused   78 policy or setting wrong   80 the logout was not confirmed, with --strict-logout
  129, 130, 131, 143 after a second signal (HUP, INT, QUIT, TERM), no logout
  exec: the command's own, 128+n after signal n, 125-127 where it was not started
Every failure prints its code TC-…, its cause and what to do.";

const EXEC_EXAMPLES: &str = "\
Examples:
  tailcar exec --auth-key file:key -- curl http://intranet/
  TS_AUTHKEY=… tailcar exec -- npx playwright test

The command starts once the node is ready. It gets HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (also in
lower case) and TAILCAR_PROXY (host:port); the auth key's variables are taken out. When it has
ended, what it started is ended too; if tailcar is killed, the kernel ends the command itself alone.

Exit code: the command's own, 128+n after signal n; 127 not found, 126 cannot be executed,
125 when we failed before it started.";

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(words: &[&str]) -> Result<RunArgs, clap::Error> {
        let words = ["tailcar", "run"].iter().chain(words);
        let Command::Run(args) = Cli::try_parse_from(words)?.command else { panic!("not run") };
        Ok(args)
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_flags_everything_has_its_documented_default() {
        let args = run(&[]).unwrap().session;
        assert!(args.node.accept_routes && args.node.accept_dns && args.proxy.listen.is_empty());
        assert_eq!(args.limits.join_timeout, Duration::from_secs(60));
        assert_eq!(args.limits.logout_timeout, Duration::from_secs(2));
        assert_eq!(args.proxy.max_connections.get(), 4096);
    }

    #[test]
    fn a_later_flag_overrides_an_earlier_one_and_lists_grow() {
        let args = run(&["--hostname=a", "--quiet", "--hostname=b", "--quiet", "--listen=[::1]:0", "--listen=:1080"]);
        let args = args.unwrap().session;
        assert_eq!(args.node.hostname.as_deref(), Some("b"));
        assert_eq!(args.proxy.listen.len(), 2);
    }

    #[test]
    fn switches_that_are_on_can_be_turned_off() {
        assert!(!run(&["--accept-routes=false"]).unwrap().session.node.accept_routes);
        assert!(run(&["--accept-routes"]).unwrap().session.node.accept_routes);
    }

    #[test]
    fn an_unknown_flag_suggests_the_nearest() {
        let error = run(&["--hold-timout", "3s"]).unwrap_err().to_string();
        assert!(error.contains("--hold-timeout"), "{error}");
    }

    #[test]
    fn what_follows_two_dashes_belongs_to_the_command() {
        let cli = Cli::try_parse_from(["tailcar", "exec", "--", "curl", "--hostname", "x"]).unwrap();
        let Command::Exec(exec) = cli.command else { panic!("not exec") };
        assert_eq!(exec.command, ["curl", "--hostname", "x"]);
    }
}
