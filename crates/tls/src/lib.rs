//! TLS towards the broker and the store: whom we trust, who we are, and what was wrong.
//!
//! The clients below take certificates as they are: one skips what it cannot read, one panics. So
//! files are read and checked here, and a handshake that fails becomes a sentence that names the
//! setting to look at. The system's authorities stay trusted beside those of a `ca_file`; a
//! container that has none needs the file and nothing else.
//!
//! Shared by the adapters of the broker and the store, and knows neither. Begin with [`BROKER`].
//!
//! Nothing here quotes a file: a key that is pasted into the wrong one must not end up in a log.

use std::error::Error;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{AlertDescription, CertificateError, ClientConfig, InvalidMessage, RootCertStore};

/// The largest file of certificates that is read: the system's own bundle has a quarter of it.
const FILE_BYTES: u64 = 1 << 20;

/// A file of certificates or a key that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{setting} = {path:?} cannot be used: {source}")]
pub struct TlsError {
    setting: &'static str,
    path: PathBuf,
    source: Fault,
}

/// No TLS connection came about. The sentence names the setting to look at.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub struct HandshakeError {
    sentence: String,
    source: rustls::Error,
}

/// What is wrong with a file. None of these quotes the file.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Unreadable(#[from] std::io::Error),
    #[error("it has more than {FILE_BYTES} bytes")]
    TooLarge,
    #[error("there is no certificate in it, as PEM")]
    NoCertificate,
    #[error("certificate {0} in it is no authority's")]
    NotAnAuthority(usize, #[source] rustls::Error),
    #[error("there is no private key in it, as PEM and unencrypted")]
    NoKey,
    #[error("it is not the key of the certificate in {0}")]
    OtherKey(&'static str),
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
    #[error(transparent)]
    Client(Box<dyn Error + Send + Sync>),
}

/// The server that is spoken to, in the words of the settings.
#[derive(Debug)]
pub struct Peer {
    /// How messages call it.
    pub name: &'static str,
    /// The setting of its address.
    pub address: &'static str,
    /// The setting of the authorities' file.
    pub ca_file: &'static str,
    /// The settings of the client's certificate and its key, where there are any.
    pub identity: Option<(&'static str, &'static str)>,
}

/// The broker.
pub const BROKER: Peer = Peer {
    name: "the broker",
    address: "amqp.url",
    ca_file: "amqp.ca_file",
    identity: Some(("amqp.client_cert_file", "amqp.client_key_file")),
};

/// The store.
pub const STORE: Peer =
    Peer { name: "the store", address: "s3.endpoint", ca_file: "s3.ca_file", identity: None };

/// The collector of traces.
pub const COLLECTOR: Peer = Peer {
    name: "the collector",
    address: "telemetry.otlp_endpoint",
    ca_file: "telemetry.ca_file",
    identity: None,
};

impl Peer {
    /// Reads the authorities of `ca_file`; yields the file as it is, and what is in it.
    ///
    /// # Errors
    /// [`TlsError`] if it holds none, or one that cannot be used.
    pub fn authorities(
        &self,
        path: &Path,
    ) -> Result<(Vec<u8>, Vec<CertificateDer<'static>>), TlsError> {
        let wrong = |fault| self.wrong(path, fault);
        let pem = read(path).map_err(wrong)?;
        let certificates = certificates(&pem).map_err(wrong)?;
        let mut roots = RootCertStore::empty();
        for (number, certificate) in certificates.iter().enumerate() {
            roots
                .add(certificate.clone())
                .map_err(|e| wrong(Fault::NotAnAuthority(number + 1, e)))?;
        }
        Ok((pem, certificates))
    }

    /// The error of a `ca_file` that a client refuses.
    pub fn refused(&self, ca_file: &Path, error: Box<dyn Error + Send + Sync>) -> TlsError {
        self.wrong(ca_file, Fault::Client(error))
    }

    fn wrong(&self, ca_file: &Path, source: Fault) -> TlsError {
        TlsError { setting: self.ca_file, path: ca_file.to_owned(), source }
    }

    /// How to speak TLS with it. Files are read anew at each call, so that certificates can be
    /// replaced under a process that runs.
    ///
    /// # Errors
    /// [`TlsError`], which names the setting and the file.
    pub fn client_config(
        &self,
        ca_file: Option<&Path>,
        identity: Option<(&Path, &Path)>,
    ) -> Result<ClientConfig, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(system_authorities());
        if let Some(path) = ca_file {
            roots.add_parsable_certificates(self.authorities(path)?.1);
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let wrong = |setting, path: &Path, source| TlsError { setting, path: path.into(), source };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong(self.address, Path::new(""), e.into()))?
            .with_root_certificates(roots);
        let (Some((cert_file, key_file)), Some((cert_setting, key_setting))) =
            (identity, self.identity)
        else {
            return Ok(builder.with_no_client_auth());
        };
        let chain = read(cert_file)
            .and_then(|pem| certificates(&pem))
            .map_err(|fault| wrong(cert_setting, cert_file, fault))?;
        let key = read(key_file)
            .and_then(|pem| {
                // The library's own words could quote a line of the key.
                PrivateKeyDer::from_pem_slice(&pem).map_err(|_| Fault::NoKey)
            })
            .map_err(|fault| wrong(key_setting, key_file, fault))?;
        builder.with_client_auth_cert(chain, key).map_err(|e| {
            let fault = match e {
                rustls::Error::InconsistentKeys(_) => Fault::OtherKey(cert_setting),
                other => other.into(),
            };
            wrong(key_setting, key_file, fault)
        })
    }

    /// What was wrong with a connection, if it was about TLS: a sentence, and the error behind it.
    pub fn explain(&self, error: &(dyn Error + 'static)) -> Option<HandshakeError> {
        let Self { name, address, ca_file, identity } = self;
        let tls = find(error)?;
        let certificate = format!("{name}'s certificate");
        let sentence = match tls {
            rustls::Error::InvalidCertificate(problem) => match problem {
                CertificateError::UnknownIssuer => format!(
                    "{certificate} comes from an authority that is not trusted: put that \
                     authority's certificate into {ca_file}"
                ),
                CertificateError::Expired => format!("{certificate} has expired"),
                CertificateError::ExpiredContext { not_after, .. } => {
                    format!("{certificate} expired at {}: {name} needs a new one", date(*not_after))
                }
                CertificateError::NotValidYet => format!("{certificate} is not valid yet"),
                CertificateError::NotValidYetContext { not_before, .. } => format!(
                    "{certificate} is valid from {} on: is this machine's clock right?",
                    date(*not_before)
                ),
                CertificateError::NotValidForName => {
                    format!("{certificate} is not for the host in {address}")
                }
                CertificateError::NotValidForNameContext { expected, presented } => format!(
                    "{certificate} is not for the host in {address}, {}, but for: {}",
                    expected.to_str(),
                    presented.join(", ")
                ),
                other => format!("{certificate} is refused: {other}"),
            },
            rustls::Error::AlertReceived(alert) => match (identity, alert) {
                (Some((cert, key)), AlertDescription::CertificateRequired) => {
                    format!("{name} demands a client certificate: set {cert} and {key}")
                }
                (
                    Some((cert, _)),
                    AlertDescription::BadCertificate
                    | AlertDescription::UnsupportedCertificate
                    | AlertDescription::CertificateRevoked
                    | AlertDescription::CertificateExpired
                    | AlertDescription::CertificateUnknown
                    | AlertDescription::UnknownCA
                    | AlertDescription::AccessDenied,
                ) => format!("{name} refuses the client certificate in {cert}: {alert:?}"),
                // TLS 1.2 has no word of its own for a certificate that is missing.
                (Some((cert, key)), AlertDescription::HandshakeFailure) => format!(
                    "{name} broke off the handshake; if it demands a client certificate, set \
                     {cert} and {key}"
                ),
                _ => format!("{name} broke off the handshake: {alert:?}"),
            },
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                format!("{name} does not speak TLS at the address in {address}")
            }
            other => format!("TLS with {name} failed: {other}"),
        };
        Some(HandshakeError { sentence, source: tls.clone() })
    }
}

/// The authorities that the system trusts, as far as they can be read; `SSL_CERT_FILE` and
/// `SSL_CERT_DIR` name others.
fn system_authorities() -> Vec<CertificateDer<'static>> {
    rustls_native_certs::load_native_certs().certs
}

/// Whether the system trusts any authority. A slim container has none.
pub fn system_has_authorities() -> bool {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(system_authorities()).0 > 0
}

fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    file.take(FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(Fault::TooLarge);
    }
    Ok(bytes)
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or(Fault::NoCertificate)
}

/// The TLS error among the causes of this one. An `io::Error` that wraps one says so only by
/// `get_ref`: its `source` is already the wrapped one's.
fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(tls) = cause.downcast_ref() {
            return Some(tls);
        }
        let wrapped = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => cause.source(),
        };
    }
    None
}

fn date(time: UnixTime) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(time.as_secs());
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// As lapin's and hyper's errors hold it: as a cause, inside an `io::Error`.
    #[derive(Debug, thiserror::Error)]
    #[error("a request failed")]
    struct Outer(#[source] io::Error);

    fn explained(peer: &Peer, error: rustls::Error) -> String {
        let outer = Outer(io::Error::new(io::ErrorKind::InvalidData, error));
        peer.explain(&outer).unwrap().to_string()
    }

    #[test]
    fn what_was_wrong_is_said_in_the_words_of_the_settings() {
        use AlertDescription as Alert;
        use rustls::Error::{AlertReceived, InvalidCertificate};
        let at = |seconds| UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let early = CertificateError::NotValidYetContext { time: at(0), not_before: at(86_400) };
        for (peer, error, said) in [
            (&STORE, InvalidCertificate(CertificateError::UnknownIssuer), "s3.ca_file"),
            (&BROKER, InvalidCertificate(early), "from 1970-01-02T00:00:00Z on"),
            (&BROKER, InvalidCertificate(CertificateError::Revoked), "broker's certificate"),
            // Before TLS 1.3 this is all that a server says of a certificate that is missing.
            (&BROKER, AlertReceived(Alert::HandshakeFailure), "set amqp.client_cert_file and"),
            (&BROKER, AlertReceived(Alert::CertificateExpired), "in amqp.client_cert_file: Cert"),
            (&STORE, AlertReceived(Alert::HandshakeFailure), "the store broke off"),
            (&STORE, rustls::Error::DecryptError, "TLS with the store failed"),
        ] {
            let sentence = explained(peer, error);
            assert!(sentence.contains(said), "{sentence}");
        }
        let other = Outer(io::ErrorKind::ConnectionRefused.into());
        assert!(BROKER.explain(&other).is_none());
    }

    #[test]
    fn files_that_are_no_certificates_are_refused_with_the_setting_and_without_their_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.pem");
        let refused = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            let error = STORE.authorities(&path).unwrap_err().to_string();
            assert!(error.starts_with("s3.ca_file = ") && error.contains("file.pem"), "{error}");
            error
        };
        for text in ["", "text", "-----BEGIN CERTIFICATE-----", "-----BEGIN secret"] {
            let error = refused(text.as_bytes());
            assert!(error.contains("no certificate in it") && !error.contains("secret"), "{error}");
        }
        let not_one = "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----\n";
        assert!(refused(not_one.as_bytes()).contains("certificate 1 in it is no authority's"));
        assert!(refused(&vec![b'a'; FILE_BYTES as usize + 1]).contains("more than"));
        // Half a key, on one line: the library would quote it.
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
        std::fs::write(&path, cert.self_signed(&key).unwrap().pem()).unwrap();
        let half = folder.path().join("key.pem");
        std::fs::write(&half, "-----BEGIN PRIVATE KEY-----MIIsecret").unwrap();
        let error = BROKER.client_config(None, Some((&path, &half))).unwrap_err().to_string();
        assert!(
            error.starts_with("amqp.client_key_file = ") && !error.contains("secret"),
            "{error}"
        );
        std::fs::write(&half, key.serialize_pem()).unwrap();
        BROKER.client_config(Some(&path), Some((&path, &half))).unwrap();
    }
}
