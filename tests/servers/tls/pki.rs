//! Certificate authorities and what they sign.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, date_time_ymd,
};

/// An authority, and the folder where its files go.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
    pub file: PathBuf,
}

/// A certificate and its key.
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, issuer.pem()).unwrap();
        Self { issuer, folder, file }
    }

    /// For a server with these names, which may be addresses.
    pub fn server(&self, names: &[&str]) -> Pair {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        self.sign("server", names, ExtendedKeyUsagePurpose::ServerAuth, 2100)
    }

    /// The same, with a certificate that has expired.
    pub fn expired_server(&self, name: &str) -> Pair {
        self.sign("expired", vec![name.to_owned()], ExtendedKeyUsagePurpose::ServerAuth, 2020)
    }

    pub fn client(&self) -> Pair {
        self.sign("client", Vec::new(), ExtendedKeyUsagePurpose::ClientAuth, 2100)
    }

    fn sign(
        &self,
        name: &str,
        alternatives: Vec<String>,
        purpose: ExtendedKeyUsagePurpose,
        until: i32,
    ) -> Pair {
        let mut params = CertificateParams::new(alternatives).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![purpose];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        (params.not_before, params.not_after) =
            (date_time_ymd(2010, 1, 1), date_time_ymd(until, 1, 1));
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let file = |ending: &str, text: String| {
            let path = self.folder.path().join(format!("{name}.{ending}"));
            std::fs::write(&path, text).unwrap();
            path
        };
        Pair { cert: file("crt", cert.pem()), key: file("key", key.serialize_pem()) }
    }
}

/// A path as a setting.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
