//! tailscaled, the peer that nobody here wrote: as web peer, as subnet router, as a client to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::Value;

use crate::namespace::Namespace;
use crate::process::{Process, output, until};

/// The UDP port of every tailscaled of the bed, so that the leak rules can name it.
pub(crate) const UDP_PORT: u16 = 41_641;

/// How one is to run.
pub(crate) struct Role<'a> {
    pub(crate) hostname: &'a str,
    /// `userspace-networking` or the name of a TUN device.
    pub(crate) tun: &'a str,
    /// Further flags of the daemon.
    pub(crate) daemon: &'a [&'a str],
    /// Further flags of `tailscale up`.
    pub(crate) up: &'a [&'a str],
}

/// Where the programs, the trust and the logs are.
pub(crate) struct Places<'a> {
    pub(crate) peers: &'a Path,
    pub(crate) authority: &'a Path,
    pub(crate) folder: &'a Path,
    /// The control server's URL.
    pub(crate) control: &'a str,
}

/// A running daemon.
pub(crate) struct Tailscaled {
    cli: PathBuf,
    socket: PathBuf,
    namespace: String,
    up: Vec<String>,
    pub(crate) process: Process,
}

impl Tailscaled {
    /// Starts a daemon in `namespace` and joins it with `secret`.
    ///
    /// # Errors
    /// When it ends, or has not joined within 20 seconds.
    pub(crate) fn join(
        places: &Places<'_>,
        namespace: &Namespace,
        role: &Role<'_>,
        secret: &str,
    ) -> Result<Self, Failed> {
        let program = namespace.command(places.peers.join("tailscaled"));
        let daemon = Self::start(program, places, namespace, role)?;
        daemon.first_up(&places.folder.join(role.hostname), secret)?;
        Ok(daemon)
    }

    /// Starts a daemon that has joined before: `role` names its state.
    ///
    /// # Errors
    /// When it ends, or does not run within 20 seconds.
    pub(crate) fn resume(places: &Places<'_>, namespace: &Namespace, role: &Role<'_>) -> Result<Self, Failed> {
        let program = namespace.command(places.peers.join("tailscaled"));
        let daemon = Self::start(program, places, namespace, role)?;
        until(Duration::from_secs(20), "a daemon that is back", || {
            Ok((daemon.status()?["BackendState"] == "Running").then_some(()))
        })?;
        Ok(daemon)
    }

    /// The same, and the daemon manages DNS, in an `/etc` of its own: it writes a new resolv.conf there, and
    /// files beside it.
    ///
    /// # Errors
    /// When it ends, or has not joined within 20 seconds.
    pub(crate) fn join_with_dns(
        places: &Places<'_>,
        namespace: &Namespace,
        role: &Role<'_>,
        secret: &str,
    ) -> Result<Self, Failed> {
        let etc = places.folder.join(format!("{}-etc", role.hostname));
        fs::create_dir_all(&etc)?;
        for file in ["passwd", "group", "resolv.conf"] {
            fs::copy(Path::new("/etc").join(file), etc.join(file))?;
        }
        fs::write(etc.join("resolv.conf"), format!("nameserver {}\n", crate::bed::TRAP))?;
        fs::write(etc.join("nsswitch.conf"), "hosts: dns\n")?;
        let mut command = namespace.command("sh");
        command.args(["-c", "umount /etc/resolv.conf; mount --bind \"$0\" /etc && exec \"$@\""]);
        command.arg(etc).arg(places.peers.join("tailscaled"));
        let daemon = Self::start(command, places, namespace, role)?;
        daemon.first_up(&places.folder.join(role.hostname), secret)?;
        Ok(daemon)
    }

    /// `command` runs the daemon, once it has its flags.
    fn start(
        mut command: Command,
        places: &Places<'_>,
        namespace: &Namespace,
        role: &Role<'_>,
    ) -> Result<Self, Failed> {
        let folder = places.folder.join(role.hostname);
        fs::create_dir_all(&folder)?;
        let socket = folder.join("tailscaled.sock");
        // One that is left from an earlier run would be taken for this one's.
        drop(fs::remove_file(&socket));
        environment(&mut command, places.authority, &folder);
        command.args(["--state=mem:", "--no-logs-no-support"]).arg(format!("--tun={}", role.tun));
        command.arg(format!("--port={UDP_PORT}")).arg("--statedir").arg(&folder).arg("--socket").arg(&socket);
        command.args(role.daemon);
        let process = Process::start(command, role.hostname, places.folder, false)?;
        let mut daemon = Self {
            cli: places.peers.join("tailscale"),
            socket,
            namespace: namespace.name().to_owned(),
            up: up_flags(role, places.control),
            process,
        };
        until(Duration::from_secs(10), "tailscaled's socket", || match daemon.process.ended()? {
            Some(status) => Err(format!("tailscaled ended with {status}: {}", daemon.process.log()).into()),
            None => Ok(daemon.socket.exists().then_some(())),
        })?;
        Ok(daemon)
    }

    fn first_up(&self, folder: &Path, secret: &str) -> Result<(), Failed> {
        let key = folder.join("key");
        fs::write(&key, secret)?;
        let mut command = self.command();
        command.arg("up").arg(format!("--authkey=file:{}", key.display())).args(&self.up).arg("--timeout=20s");
        output(command).map(drop)
    }

    /// `tailscale`, to talk to this daemon.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(&self.cli).arg("--socket").arg(&self.socket);
        command.env_clear().env("PATH", crate::namespace::PATH);
        command
    }

    /// A command that sees the daemon's network and its `/etc`.
    pub(crate) fn beside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.process.id())).args(["--net", "--mount", "--", program]);
        command.env_clear().env("PATH", crate::namespace::PATH);
        command
    }

    /// Where it answers its command line.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Leaves the data plane without leaving the tailnet: headscale then calls the node offline.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn down(&self) -> Result<(), Failed> {
        let mut command = self.command();
        command.arg("down");
        output(command).map(drop)
    }

    /// The opposite of [`Tailscaled::down`], with what the role was started with.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn up_again(&self) -> Result<(), Failed> {
        let mut command = self.command();
        command.arg("up").args(&self.up).arg("--timeout=20s");
        output(command).map(drop)
    }

    /// `tailscale status --json`.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn status(&self) -> Result<Value, Failed> {
        let mut command = self.command();
        command.args(["status", "--json"]);
        Ok(serde_json::from_str(&output(command)?)?)
    }

    /// What it has been told of the tailnet.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn netmap(&self) -> Result<Value, Failed> {
        let mut command = self.command();
        command.args(["debug", "netmap"]);
        Ok(serde_json::from_str(&output(command)?)?)
    }

    /// Its own addresses in the tailnet, IPv4 first.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn addresses(&self) -> Result<Vec<String>, Failed> {
        let status = self.status()?;
        let listed = status["Self"]["TailscaleIPs"].as_array().cloned().unwrap_or_default();
        Ok(listed.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }
}

/// The flags of `tailscale up`, which wants all of them said each time.
fn up_flags(role: &Role<'_>, control: &str) -> Vec<String> {
    let mut flags = vec![format!("--login-server={control}"), format!("--hostname={}", role.hostname)];
    if !role.up.contains(&"--accept-dns") {
        flags.push("--accept-dns=false".to_owned());
    }
    flags.extend(role.up.iter().map(|flag| (*flag).to_owned()));
    flags
}

/// What keeps it from looking for a way out of the bed, and from the caller's own proxies.
pub(crate) fn environment(command: &mut Command, authority: &Path, folder: &Path) {
    for name in ["TS_NO_LOGS_NO_SUPPORT", "TS_PANIC_IF_HIT_MAIN_CONTROL", "TS_DISABLE_PORTMAPPER", "TS_DISABLE_UPNP"] {
        command.env(name, "1");
    }
    command
        .env("TS_ASSUME_NETWORK_UP_FOR_TEST", "1")
        .env("TS_NETCHECK_GENERATE_204_URL", "http://10.99.0.254/status/204");
    // Without it no tailscaled of this version takes part in connectors with transit addresses.
    command.env("TAILSCALE_USE_WIP_CODE", "1");
    command.env("TS_DEBUG_FIREWALL_MODE", "nftables").env("TS_LOGS_DIR", folder);
    command.env("SSL_CERT_FILE", authority).env("HOME", folder);
}
