//! The bed's certificate authority: one made at start, in memory but for what peers must read.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use libtest_mimic::Failed;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};

/// A test authority and the files of what it has issued.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's own certificate, for those who are to trust it.
    pub(crate) certificate: PathBuf,
}

/// Paths of a server's certificate chain and key.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    /// Makes an authority called `name`, its certificate at `NAME.pem` in `folder`.
    ///
    /// # Errors
    /// Those of key generation and of writing.
    pub(crate) fn new(name: &str, folder: &Path) -> Result<Self, Failed> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = folder.join(format!("{name}.pem"));
        fs::write(&certificate, params.self_signed(&key)?.pem())?;
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// Issues a certificate for a numeric host, as `HOST.crt` and `HOST.key` in `folder`, which is
    /// how `derper` looks for them.
    ///
    /// # Errors
    /// Those of key generation and of writing.
    pub(crate) fn issue(&self, host: IpAddr, folder: &Path) -> Result<Identity, Failed> {
        self.issue_to(host, &[host], folder)
    }

    /// The same for a host of several addresses; the files have the name of `host`.
    ///
    /// # Errors
    /// Those of key generation and of writing.
    pub(crate) fn issue_to(&self, host: IpAddr, addresses: &[IpAddr], folder: &Path) -> Result<Identity, Failed> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name.push(DnType::CommonName, host.to_string());
        let identity =
            Identity { certificate: folder.join(format!("{host}.crt")), key: folder.join(format!("{host}.key")) };
        fs::write(&identity.certificate, params.signed_by(&key, &self.issuer)?.pem())?;
        fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}
