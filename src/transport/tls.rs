//! TLS to control and DERP: whom we trust.
//!
//! Trusted are the machine's own roots (or Mozilla's, where the machine has none), and what `--ca-file` adds. A DERP
//! node may instead be pinned by the hash of its certificate, or marked as a test server that nobody checks; both come
//! only from the netmap, which control's own session authenticates.
//! Source: Tailscale, net/tlsdial (`Config`, `SetConfigExpectedCertHash`).

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime, pem};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// Why the trusted certificates could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The file cannot be read.
    #[error("cannot read certificates from {path}: {detail}")]
    Read {
        /// The file.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The file has no certificate in it.
    #[error("{path} holds no certificate")]
    Empty {
        /// The file.
        path: String,
    },
    /// What the file has in it is not a certificate.
    #[error("{path} holds what is not a certificate: {detail}")]
    Broken {
        /// The file.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
}

/// How a DERP node's certificate is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// By the trusted roots, for this name instead of the one that is connected to.
    Name(String),
    /// By the SHA-256 of the certificate's DER, and by nothing else.
    Pin([u8; 32]),
    /// Not at all: the netmap says that it is a test server.
    Insecure,
}

/// The TLS settings of this run.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    provider: Arc<CryptoProvider>,
}

impl Tls {
    /// Reads the trusted certificates.
    ///
    /// # Errors
    /// [`RootsError`] when `ca_file` cannot be used.
    pub fn load(ca_file: Option<&Path>) -> Result<Self, RootsError> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        if let Some(path) = ca_file {
            add_file(&mut roots, path)?;
        }
        let provider = Arc::new(ring::default_provider());
        let config = builder(&provider).with_root_certificates(roots).with_no_client_auth();
        Ok(Self { config: Arc::new(config), provider })
    }

    /// Settings that check by the trusted roots.
    pub fn trusted(&self) -> Arc<ClientConfig> {
        self.config.clone()
    }

    /// Settings that check as `check` says.
    pub fn checked(&self, check: &Check) -> Arc<ClientConfig> {
        let verifier: Arc<dyn ServerCertVerifier> = match check {
            Check::Name(_) => return self.trusted(),
            Check::Pin(hash) => Arc::new(Pinned { hash: Some(*hash), provider: self.provider.clone() }),
            Check::Insecure => Arc::new(Pinned { hash: None, provider: self.provider.clone() }),
        };
        let config = builder(&self.provider).dangerous().with_custom_certificate_verifier(verifier);
        Arc::new(config.with_no_client_auth())
    }
}

fn builder(provider: &Arc<CryptoProvider>) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring offers TLS 1.2 and 1.3")
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), RootsError> {
    let named = || path.display().to_string();
    let unread = |error: pem::Error| RootsError::Read { path: named(), detail: error.to_string() };
    let broken = |detail: String| RootsError::Broken { path: named(), detail };
    let certificates = CertificateDer::pem_file_iter(path).map_err(unread)?;
    let mut added = 0;
    for certificate in certificates {
        let failed = |error| if matches!(error, pem::Error::Io(_)) { unread(error) } else { broken(error.to_string()) };
        let certificate = certificate.map_err(failed)?;
        roots.add(certificate).map_err(|error| broken(error.to_string()))?;
        added += 1;
    }
    if added == 0 { Err(RootsError::Empty { path: named() }) } else { Ok(()) }
}

/// Accepts a certificate by its hash, or any where there is no hash. The handshake's signature is checked in any case:
/// who presents the certificate must hold its key.
#[derive(Debug)]
struct Pinned {
    hash: Option<[u8; 32]>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(expected) = self.hash else { return Ok(ServerCertVerified::assertion()) };
        let actual = ::ring::digest::digest(&::ring::digest::SHA256, end_entity);
        if actual.as_ref() == expected {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
