//! Tailscale's own DERP server as a second region, which clients know by its certificate's hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use libtest_mimic::Failed;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::authority::Authority;
use crate::namespace::Namespace;
use crate::process::Process;

/// Where the second region listens.
pub(crate) const HOST: &str = "10.99.0.2";
/// Its TLS port.
pub(crate) const PORT: u16 = 8444;
/// Its region's number.
pub(crate) const REGION: u64 = 998;

/// A running `derper` and the region file that names it.
pub(crate) struct Derper {
    pub(crate) process: Process,
    /// Its region, as a DERP map has it.
    pub(crate) region: Value,
    /// The DERP map that headscale merges into its own.
    pub(crate) regions: PathBuf,
}

impl Derper {
    /// Starts it in `wan`, with a certificate of an authority that nobody else trusts.
    ///
    /// # Errors
    /// When it does not come to listen within ten seconds.
    pub(crate) fn start(program: &Path, wan: &Namespace, folder: &Path) -> Result<Self, Failed> {
        Self::start_at(program, wan, folder, HOST, None)
    }

    /// The same on a host of its own, at that IPv4 address and perhaps an IPv6 one.
    ///
    /// # Errors
    /// When it does not come to listen within ten seconds.
    pub(crate) fn start_at(
        program: &Path,
        wan: &Namespace,
        folder: &Path,
        host: &str,
        v6: Option<&str>,
    ) -> Result<Self, Failed> {
        let folder = folder.join("derper");
        fs::create_dir_all(&folder)?;
        let identity = Authority::new("nobody", &folder)?.issue(host.parse()?, &folder)?;
        let regions = folder.join("regions.json");
        let region = region(&fs::read_to_string(&identity.certificate)?, host, v6)?;
        // YAML, for whose reader a region's number must not be a string, as JSON's keys are.
        fs::write(&regions, format!("regions: {{{REGION}: {region}}}\n"))?;
        let mut command = wan.command(program);
        command.env("HOME", &folder).arg("-certmode=manual").arg("-certdir").arg(&folder);
        // Without a host it listens for both families.
        let listen = if v6.is_some() { "" } else { host };
        command.args(["-hostname", host, "-http-port=-1", "-a"]).arg(format!("{listen}:{PORT}"));
        command.arg("-c").arg(folder.join("derper.json"));
        let mut process = Process::start(command, "derper", &folder, false)?;
        process.says("serving on", Duration::from_secs(15))?;
        Ok(Self { process, region, regions })
    }
}

/// The region, with the pin by which Tailscale's clients accept such a certificate.
///
/// Source: Tailscale, tailcfg, `DERPNode.CertName`: `sha256-raw:` and the hash of the DER.
fn region(pem: &str, host: &str, v6: Option<&str>) -> Result<Value, Failed> {
    use base64::Engine as _;
    let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let der = base64::engine::general_purpose::STANDARD.decode(body)?;
    let pin = hex::encode(digest(&SHA256, &der));
    Ok(json!({
        "regionid": REGION, "regioncode": "second", "regionname": "second region",
        "nodes": [{
            "name": "998a", "regionid": REGION, "hostname": host, "certname": format!("sha256-raw:{pin}"),
            "ipv4": host, "ipv6": v6.unwrap_or_default(), "stunport": 3478, "derpport": PORT, "canport80": false,
        }],
    }))
}
