//! Certificates as an author writes them, for every connector that speaks TLS; checked while planning, read when the
//! stage is built. A client that brings its own TLS (librdkafka) is given the paths, others a rustls configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use afferent_engine::component::{PlanContext, Problem};
use afferent_engine::{Error, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use schemars::JsonSchema;
use serde::Deserialize;

/// Certificates for TLS; relative paths start at the pipeline file.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct Tls {
    /// The authorities to trust, as a PEM file; by default those of the system.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Our own certificate with its chain, as a PEM file.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    /// The private key of our certificate, as a PEM file.
    #[serde(default)]
    pub key: Option<PathBuf>,
}

/// Where systems keep the authorities they trust, as one PEM file: Debian, Fedora, openSUSE, Alpine and macOS, BSD.
const SYSTEM_AUTHORITIES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
];

impl Tls {
    /// Everything that can be said without reading a file, below `/tls`. Makes the paths those that are to be read.
    pub(crate) fn check(&mut self, context: &PlanContext) -> Option<Problem> {
        for path in [&mut self.ca, &mut self.cert, &mut self.key].into_iter().flatten() {
            *path = context.path(&*path);
        }
        (self.cert.is_some() != self.key.is_some()).then(|| {
            Problem::new("tls", "/tls", "a certificate needs its key, and a key its certificate")
                .help("write both `cert` and `key`")
        })
    }

    /// Whether the files can be read, for a client that reads them itself.
    ///
    /// # Errors
    /// Fatal, with the file and the reason.
    pub(crate) fn readable(&self) -> Result<()> {
        for path in [&self.ca, &self.cert, &self.key].into_iter().flatten() {
            std::fs::read(path).map_err(|e| Error::fatal(e).context(format!("cannot read {}", path.display())))?;
        }
        Ok(())
    }

    /// A TLS configuration with the `ring` provider named in it: the process-wide default stays as it is, since
    /// other libraries of this process bring another one.
    ///
    /// # Errors
    /// Fatal, with the file that cannot be read or used.
    pub(crate) fn client(&self) -> Result<rustls::ClientConfig> {
        let ca = match &self.ca {
            Some(path) => path.clone(),
            None => std::env::var_os("SSL_CERT_FILE")
                .map(PathBuf::from)
                .into_iter()
                .chain(SYSTEM_AUTHORITIES.map(PathBuf::from))
                .find(|path| path.is_file())
                .ok_or_else(|| {
                    Error::fatal(
                        "this system has no list of trusted authorities where one was looked for; name one with `tls: { ca: FILE }`",
                    )
                })?,
        };
        let mut roots = rustls::RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates(&ca)?);
        if added == 0 {
            return Err(Error::fatal(format!("{} holds no certificate of an authority", ca.display())));
        }
        let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(Error::fatal)?
            .with_root_certificates(roots);
        match (&self.cert, &self.key) {
            (Some(cert), Some(key_path)) => {
                let key = PrivateKeyDer::from_pem_file(key_path)
                    .map_err(|e| Error::fatal(format!("cannot read the private key {}: {e}", key_path.display())))?;
                builder
                    .with_client_auth_cert(certificates(cert)?, key)
                    .map_err(|e| Error::fatal(e).context(format!("using the certificate {}", cert.display())))
            }
            _ => Ok(builder.with_no_client_auth()),
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let cannot =
        |e: rustls::pki_types::pem::Error| Error::fatal(format!("cannot read certificates from {}: {e}", path.display()));
    CertificateDer::pem_file_iter(path).map_err(cannot)?.collect::<std::result::Result<Vec<_>, _>>().map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_at_the_pipeline_file_and_a_certificate_has_a_key() {
        let mut tls = Tls { ca: Some("ca.pem".into()), cert: Some("/etc/own.pem".into()), key: None };
        let problem = tls.check(&PlanContext::at("/pipelines", "/data"));
        assert_eq!(problem.map(|problem| problem.path), Some("/tls".to_owned()));
        assert_eq!(tls.ca.as_deref(), Some(Path::new("/pipelines/ca.pem")));
        assert_eq!(tls.cert.as_deref(), Some(Path::new("/etc/own.pem")));
        tls.key = Some("own.key".into());
        assert!(tls.check(&PlanContext::at("/pipelines", "/data")).is_none());
        assert!(Tls::default().check(&PlanContext::default()).is_none());
    }

    #[test]
    fn a_file_that_cannot_be_read_or_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing.pem");
        let tls = Tls { ca: Some(missing), ..Tls::default() };
        assert!(tls.readable().is_err_and(|e| e.to_string().contains("missing.pem")));
        assert!(tls.client().is_err_and(|e| e.to_string().contains("missing.pem")));
        let empty = folder.path().join("empty.pem");
        std::fs::write(&empty, "").unwrap();
        let tls = Tls { ca: Some(empty), ..Tls::default() };
        assert!(tls.readable().is_ok());
        assert!(tls.client().is_err_and(|e| e.to_string().contains("empty.pem")));
    }
}
