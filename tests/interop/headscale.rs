//! headscale: control server, embedded DERP and STUN, and its command line for what tests ask of it.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use libtest_mimic::Failed;
use serde_json::Value;

use crate::authority::Identity;
use crate::namespace::Namespace;
use crate::process::{Process, output, until};

/// Where control and region 999 listen.
pub(crate) const CONTROL: &str = "10.99.0.1:8443";
/// The tailnet's domain.
pub(crate) const DOMAIN: &str = "tb.example";

/// What the policy grants when a scenario has not changed it.
pub(crate) const POLICY: &str = r#"{
  "tagOwners": {"tag:browser": ["dev@"], "tag:router": ["dev@"], "tag:web": ["dev@"]},
  "grants": [
    {"src": ["tag:browser"], "dst": ["tag:web", "tag:router"], "ip": ["*"]},
    {"src": ["tag:browser"], "dst": ["10.20.0.0/24", "10.21.0.0/24", "fd20::/64"], "ip": ["*"]},
  ],
  "autoApprovers": {"routes": {"10.20.0.0/24": ["tag:router"], "fd20::/64": ["tag:router"]}},
}"#;

/// A running headscale.
pub(crate) struct Headscale {
    program: PathBuf,
    config: PathBuf,
    namespace: String,
    folder: PathBuf,
    pub(crate) process: Process,
}

/// What a pre-auth key allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyKind {
    pub(crate) tag: &'static str,
    pub(crate) reusable: bool,
    pub(crate) expires: &'static str,
}

/// The sidecar's usual key: ephemeral, tagged, good for many joins.
pub(crate) const BROWSER: KeyKind = KeyKind { tag: "tag:browser", reusable: true, expires: "24h" };

/// A minted key: the secret, and the id by which it is revoked.
#[derive(Clone)]
pub(crate) struct Key {
    pub(crate) secret: String,
    pub(crate) id: String,
}

impl Headscale {
    /// Starts the server in `wan` with its policy, and waits until it answers. `tick` is how long it collects
    /// changes of nodes before they take effect.
    ///
    /// # Errors
    /// When it ends, or does not listen within ten seconds.
    pub(crate) fn start(
        program: &Path,
        wan: &Namespace,
        folder: &Path,
        tls: &Identity,
        regions: &Path,
        tick: &str,
    ) -> Result<Self, Failed> {
        Self::start_with(program, wan, folder, &configuration(folder, tls, regions, tick), POLICY)
    }

    /// The same with a configuration of the caller's.
    ///
    /// # Errors
    /// When it ends, or does not listen within ten seconds.
    pub(crate) fn start_with(
        program: &Path,
        wan: &Namespace,
        folder: &Path,
        configuration: &Value,
        policy: &str,
    ) -> Result<Self, Failed> {
        let config = folder.join("headscale.json");
        fs::write(&config, configuration.to_string())?;
        let mut process = Process::start(serve(program, &config, wan), "headscale", folder, false)?;
        let url = configuration["server_url"].as_str().unwrap_or_default();
        let address = url.trim_start_matches("https://").parse()?;
        await_listener(wan, &mut process, address)?;
        let headscale = Self {
            program: program.to_owned(),
            config,
            namespace: wan.name().to_owned(),
            folder: folder.to_owned(),
            process,
        };
        headscale.cli(&["users", "create", "dev"])?;
        headscale.set_policy(policy)?;
        Ok(headscale)
    }

    /// Stops the server, as an outage would: its state stays on disk.
    pub(crate) fn stop(&mut self) {
        self.process.end();
    }

    /// Starts it again after [`Headscale::stop`], and waits until the bed's peers are back: a router
    /// that is not has no routes.
    ///
    /// # Errors
    /// When it does not listen soon, or a peer does not come back.
    pub(crate) fn resume(&mut self, wan: &Namespace) -> Result<(), Failed> {
        let command = serve(&self.program, &self.config, wan);
        self.process = Process::start(command, "headscale", &self.folder, false)?;
        await_listener(wan, &mut self.process, CONTROL.parse()?)?;
        until(Duration::from_secs(30), "the bed's peers to come back", || {
            let nodes = self.nodes()?;
            let online = |name| nodes.iter().any(|node| node["given_name"] == name && node["online"] == true);
            Ok((online("web") && online("router")).then_some(()))
        })
    }

    /// Runs `headscale ARGS` against the server; its JSON answer.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn cli(&self, args: &[&str]) -> Result<Value, Failed> {
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(&self.program);
        command.env_clear().env("HOME", &self.folder);
        command.arg("-c").arg(&self.config).args(["--force", "-o", "json"]).args(args);
        let text = output(command)?;
        Ok(serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Mints an ephemeral, tagged key.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn mint(&self, kind: KeyKind) -> Result<Key, Failed> {
        let mut args = vec!["preauthkeys", "create", "--ephemeral", "--tags", kind.tag, "-e", kind.expires];
        if kind.reusable {
            args.push("--reusable");
        }
        let answer = self.cli(&args)?;
        let secret = answer["key"].as_str().ok_or("a minted key has no text")?.to_owned();
        let id = answer["id"].as_str().map_or_else(|| answer["id"].to_string(), str::to_owned);
        Ok(Key { secret, id })
    }

    /// Expires a key at once: headscale's way of revoking.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn revoke(&self, key: &Key) -> Result<(), Failed> {
        self.cli(&["preauthkeys", "expire", "-i", &key.id]).map(drop)
    }

    /// Whether a key's expiry, as the server lists it, has passed.
    ///
    /// # Errors
    /// What the command complained of, or when the key is not listed.
    pub(crate) fn has_expired(&self, key: &Key) -> Result<bool, Failed> {
        let listed = self.cli(&["preauthkeys", "list"])?;
        let id = |entry: &Value| entry["id"].as_str().map_or_else(|| entry["id"].to_string(), str::to_owned);
        let entry = listed.as_array().into_iter().flatten().find(|entry| id(entry) == key.id);
        let seconds = entry.and_then(|entry| entry["expiration"]["seconds"].as_u64());
        let seconds = seconds.ok_or_else(|| format!("no expiry of key {} at headscale", key.id))?;
        Ok(UNIX_EPOCH.elapsed()?.as_secs() > seconds)
    }

    /// Puts a policy in force.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn set_policy(&self, policy: &str) -> Result<(), Failed> {
        let file = self.folder.join("policy.hujson");
        fs::write(&file, policy)?;
        self.cli(&["policy", "set", "-f", &file.to_string_lossy()]).map(drop)
    }

    /// All nodes that the server knows.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn nodes(&self) -> Result<Vec<Value>, Failed> {
        Ok(self.cli(&["nodes", "list"])?.as_array().cloned().unwrap_or_default())
    }

    /// The node of that hostname, when there is one.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn node(&self, hostname: &str) -> Result<Option<Value>, Failed> {
        Ok(self.nodes()?.into_iter().find(|node| node["name"] == hostname || node["given_name"] == hostname))
    }

    /// A node's id, as the command line wants it.
    ///
    /// # Errors
    /// When there is no such node.
    pub(crate) fn id(&self, hostname: &str) -> Result<String, Failed> {
        let node = self.node(hostname)?.ok_or_else(|| format!("no node {hostname} at headscale"))?;
        Ok(node["id"].as_str().map_or_else(|| node["id"].to_string(), str::to_owned))
    }

    /// Approves exactly these routes of a node.
    ///
    /// # Errors
    /// What the command complained of.
    pub(crate) fn approve(&self, hostname: &str, routes: &[&str]) -> Result<(), Failed> {
        let id = self.id(hostname)?;
        self.cli(&["nodes", "approve-routes", "-i", &id, "-r", &routes.join(",")]).map(drop)
    }

    /// Waits until the node is online; what is listed of it.
    ///
    /// # Errors
    /// When it is not within `limit`.
    pub(crate) fn online(&self, hostname: &str, limit: Duration) -> Result<Value, Failed> {
        until(limit, &format!("headscale to call {hostname} online"), || {
            Ok(self.node(hostname)?.filter(|node| node["online"] == true))
        })
    }

    /// Waits until the node is no longer listed; how long that took.
    ///
    /// # Errors
    /// When it still is after `limit`.
    pub(crate) fn gone(&self, hostname: &str, limit: Duration) -> Result<(), Failed> {
        until(limit, &format!("headscale to forget {hostname}"), || Ok(self.node(hostname)?.is_none().then_some(())))
    }
}

fn serve(program: &Path, config: &Path, wan: &Namespace) -> std::process::Command {
    let mut command = wan.command(program);
    command.env("HOME", config.parent().unwrap_or(config)).arg("-c").arg(config).arg("serve");
    command
}

fn await_listener(wan: &Namespace, process: &mut Process, address: SocketAddr) -> Result<(), Failed> {
    until(Duration::from_secs(15), "headscale to listen", || {
        if let Some(status) = process.ended()? {
            return Err(format!("headscale ended with {status}: {}", process.log()).into());
        }
        Ok(wan.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())?.then_some(()))
    })
}

/// headscale's configuration, as JSON, which its YAML reader takes.
pub(crate) fn configuration(folder: &Path, tls: &Identity, regions: &Path, tick: &str) -> Value {
    serde_json::json!({
        "server_url": format!("https://{CONTROL}"),
        "listen_addr": CONTROL,
        "metrics_listen_addr": "127.0.0.1:9090",
        "noise": {"private_key_path": folder.join("noise.key")},
        "prefixes": {"v4": "100.64.0.0/10", "v6": "fd7a:115c:a1e0::/48", "allocation": "sequential"},
        "database": {"type": "sqlite", "sqlite": {"path": folder.join("headscale.sqlite"), "write_ahead_log": true}},
        "unix_socket": folder.join("headscale.sock"),
        "unix_socket_permission": "0770",
        "tls_cert_path": tls.certificate,
        "tls_key_path": tls.key,
        "derp": {
            "server": {
                "enabled": true, "region_id": 999, "region_code": "tb", "region_name": "testbed",
                "verify_clients": true, "stun_listen_addr": "10.99.0.1:3478",
                "private_key_path": folder.join("derp.key"),
                "automatically_add_embedded_derp_region": true, "ipv4": "10.99.0.1",
            },
            "urls": [], "paths": [regions], "auto_update_enabled": false,
        },
        "disable_check_updates": true,
        "tuning": {"node_store_batch_timeout": tick},
        "node": {
            "expiry": 0,
            "ephemeral": {"inactivity_timeout": "66s"},
            "routes": {"ha": {"probe_interval": "2s", "probe_timeout": "1s"}},
        },
        "policy": {"mode": "database"},
        "dns": {
            "magic_dns": true, "base_domain": DOMAIN, "override_local_dns": false,
            "nameservers": {"global": [], "split": {
                "corp.test": ["10.20.0.53"],
                "silent.test": ["10.20.0.54"],
                "failing.test": ["10.20.0.55"],
                "spare.test": ["10.20.0.54", "10.20.0.53"],
                "away.test": ["10.77.0.53"],
            }},
            "search_domains": ["corp.test"],
            "extra_records": [
                {"name": "extra.tb.example", "type": "A", "value": "10.20.0.80"},
                {"name": "extra6.tb.example", "type": "AAAA", "value": "fd20::80"},
            ],
        },
        "logtail": {"enabled": false},
        "log": {"level": "info", "format": "text"},
    })
}
