//! The connection settings that the `kafka` source and sink share, and what librdkafka is told of them. Checked
//! while planning by librdkafka itself, which knows its own options; secrets are read when the stage is built.

use std::collections::BTreeMap;

use afferent_engine::component::{PlanContext, Problem};
use afferent_engine::config::{Secret, resolve};
use afferent_engine::{Error, Result};
use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::tls::Tls;

/// Defines a configuration struct with the connection settings in front of its own fields. A nested struct would
/// make authors write one more level, and serde's `flatten` would accept unknown keys.
macro_rules! with_brokers {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$own_meta:meta])* $own:ident: $own_type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, rename_all = "snake_case")]
        pub struct $name {
            /// Some brokers of the cluster, each as `host:port`; the others are found through them.
            brokers: Vec<String>,
            /// How the connection is secured.
            #[serde(default)]
            security: crate::kafka::config::Security,
            /// Who we are, for `sasl_plaintext` and `sasl_ssl`.
            #[serde(default)]
            sasl: Option<crate::kafka::config::Sasl>,
            /// Certificates, for `ssl` and `sasl_ssl`.
            #[serde(default)]
            tls: Option<crate::tls::Tls>,
            /// Further options of librdkafka by their own names, for experts. Those that the guarantees rest on
            /// cannot be set here.
            #[serde(default)]
            options: std::collections::BTreeMap<String, String>,
            $($(#[$own_meta])* $own: $own_type,)*
        }

        impl $name {
            fn cluster(&self) -> crate::kafka::config::Cluster {
                crate::kafka::config::Cluster {
                    brokers: self.brokers.clone(),
                    security: self.security,
                    sasl: self.sasl.clone(),
                    tls: self.tls.clone(),
                    options: self.options.clone(),
                }
            }
        }
    };
}
pub(super) use with_brokers;

/// How a connection to Kafka is secured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// Not at all.
    #[default]
    Plaintext,
    /// TLS.
    Ssl,
    /// User and password, in the clear unless the mechanism hides it.
    SaslPlaintext,
    /// User and password over TLS.
    SaslSsl,
}

impl Security {
    fn protocol(self) -> &'static str {
        match self {
            Self::Plaintext => "plaintext",
            Self::Ssl => "ssl",
            Self::SaslPlaintext => "sasl_plaintext",
            Self::SaslSsl => "sasl_ssl",
        }
    }

    fn authenticates(self) -> bool {
        matches!(self, Self::SaslPlaintext | Self::SaslSsl)
    }

    fn encrypts(self) -> bool {
        matches!(self, Self::Ssl | Self::SaslSsl)
    }
}

/// Who we are.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct Sasl {
    /// How the password is proven.
    #[serde(default)]
    pub mechanism: Mechanism,
    /// The user.
    pub username: String,
    /// The user's password; write it as `${VARIABLE}` or `${file:/path}`.
    pub password: Secret,
}

/// How a password is proven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// It is sent.
    Plain,
    /// SCRAM with SHA-256.
    ScramSha256,
    /// SCRAM with SHA-512.
    #[default]
    ScramSha512,
}

impl Mechanism {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// Options that the guarantees rest on, or that have a field of their own.
const RESERVED: [&str; 16] = [
    "bootstrap.servers",
    "metadata.broker.list",
    "security.protocol",
    "sasl.username",
    "sasl.password",
    "group.id",
    "enable.auto.commit",
    "auto.commit.enable",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "group.protocol",
    "partition.assignment.strategy",
    "enable.idempotence",
    "acks",
    "request.required.acks",
    "transactional.id",
];

/// The settings as written.
#[derive(Clone, Debug)]
pub(super) struct Cluster {
    pub brokers: Vec<String>,
    pub security: Security,
    pub sasl: Option<Sasl>,
    pub tls: Option<Tls>,
    pub options: BTreeMap<String, String>,
}

impl Cluster {
    /// Everything that can be said without a connection; `own` is what the source or sink sets besides.
    pub(super) fn check(&mut self, own: &[(&str, String)], context: &PlanContext) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.brokers.is_empty() {
            problems.push(
                Problem::new("no-brokers", "/brokers", "there is no broker to connect to")
                    .help("write for example [\"localhost:9092\"]"),
            );
        }
        for (number, broker) in self.brokers.iter().enumerate() {
            if broker.trim().is_empty() || broker.contains([',', '/', ' ']) {
                problems.push(Problem::new(
                    "broker-address",
                    format!("/brokers/{number}"),
                    format!("`{broker}` is not `host:port`"),
                ));
            }
        }
        match (self.security.authenticates(), self.sasl.is_some()) {
            (true, false) => {
                problems.push(
                    Problem::new("sasl", "/security", format!("`{}` needs user and password", self.security.protocol()))
                        .help("add `sasl`"),
                );
            }
            (false, true) => {
                problems.push(
                    Problem::new("sasl", "/sasl", format!("`{}` has no use for them", self.security.protocol()))
                        .help("set `security: sasl_ssl`"),
                );
            }
            _ => {}
        }
        if let Some(tls) = &mut self.tls {
            if !self.security.encrypts() {
                problems.push(
                    Problem::new("tls", "/tls", format!("`{}` is a connection without TLS", self.security.protocol()))
                        .help("set `security: ssl`"),
                );
            }
            problems.extend(tls.check(context));
        }
        for name in self.options.keys().filter(|name| RESERVED.contains(&name.as_str())) {
            problems.push(
                Problem::new(
                    "reserved-option",
                    option_path(name),
                    format!("`{name}` cannot be set here: the guarantees rest on it, or it has a field of its own"),
                )
                .help("leave it out"),
            );
        }
        if problems.is_empty() && !self.options.values().any(|value| value.contains("${")) {
            // librdkafka knows its own options and their ranges; nothing is connected by this.
            let mut config = ClientConfig::new();
            self.apply(&mut config, own, |text| Ok(text.to_owned())).unwrap_or_else(|e| {
                problems.push(Problem::new("option", "/options", e.to_string()));
            });
            if let Err(error) = config.create_native_config() {
                problems.push(option_problem(&error));
            }
        }
        problems
    }

    /// What librdkafka is told.
    ///
    /// # Errors
    /// Fatal, with the variable or file that is missing.
    pub(super) fn client(&self, own: &[(&str, String)]) -> Result<ClientConfig> {
        let mut config = ClientConfig::new();
        self.apply(&mut config, own, |text| resolve(text).map_err(Error::fatal))?;
        if let Some(sasl) = &self.sasl {
            config.set("sasl.mechanism", sasl.mechanism.name());
            config.set("sasl.username", resolve(&sasl.username).map_err(|e| Error::fatal(e).context("reading `sasl.username`"))?);
            config.set("sasl.password", sasl.password.reveal().map_err(|e| Error::fatal(e).context("reading `sasl.password`"))?);
        }
        if let Some(tls) = &self.tls {
            // librdkafka does not say which file it could not read.
            tls.readable()?;
            for (name, path) in
                [("ssl.ca.location", &tls.ca), ("ssl.certificate.location", &tls.cert), ("ssl.key.location", &tls.key)]
            {
                if let Some(path) = path {
                    config.set(name, path.display().to_string());
                }
            }
        }
        Ok(config)
    }

    fn apply(&self, config: &mut ClientConfig, own: &[(&str, String)], text: impl Fn(&str) -> Result<String>) -> Result<()> {
        config.set("bootstrap.servers", text(&self.brokers.join(","))?);
        config.set("security.protocol", self.security.protocol());
        for (name, value) in own {
            config.set(*name, value.as_str());
        }
        for (name, value) in &self.options {
            config.set(name.as_str(), text(value)?);
        }
        Ok(())
    }
}

/// The JSON pointer of an option; `~` and `/` are written as RFC 6901 says.
fn option_path(name: &str) -> String {
    format!("/options/{}", name.replace('~', "~0").replace('/', "~1"))
}

fn option_problem(error: &KafkaError) -> Problem {
    match error {
        KafkaError::ClientConfig(_, description, name, value) => {
            Problem::new("option", option_path(name), format!("`{name}: {value}` is refused by librdkafka: {description}"))
                .help("the options are listed in librdkafka's CONFIGURATION.md")
        }
        other => Problem::new("option", "/options", other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> Cluster {
        Cluster {
            brokers: vec!["localhost:9092".into()],
            security: Security::Plaintext,
            sasl: None,
            tls: None,
            options: BTreeMap::new(),
        }
    }

    fn places(mut cluster: Cluster) -> Vec<String> {
        cluster.check(&[], &PlanContext::default()).into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn options_are_checked_by_the_library_that_has_them() {
        assert!(places(cluster()).is_empty());
        let with =
            |name: &str, value: &str| Cluster { options: BTreeMap::from([(name.to_owned(), value.to_owned())]), ..cluster() };
        assert!(places(with("fetch.wait.max.ms", "10")).is_empty());
        assert_eq!(places(with("fetch.wait.max", "10")), ["/options/fetch.wait.max"]);
        assert_eq!(places(with("fetch.wait.max.ms", "soon")), ["/options/fetch.wait.max.ms"]);
        assert_eq!(places(with("enable.auto.commit", "true")), ["/options/enable.auto.commit"]);
    }

    #[test]
    fn security_and_credentials_belong_together() {
        assert_eq!(places(Cluster { security: Security::SaslSsl, ..cluster() }), ["/security"]);
        assert_eq!(places(Cluster { tls: Some(Tls::default()), ..cluster() }), ["/tls"]);
        assert_eq!(places(Cluster { brokers: vec![], ..cluster() }), ["/brokers"]);
        assert_eq!(places(Cluster { brokers: vec!["a:1,b:1".into()], ..cluster() }), ["/brokers/0"]);
        let sasl = Sasl { mechanism: Mechanism::Plain, username: "u".into(), password: Secret::new("p") };
        assert_eq!(places(Cluster { sasl: Some(sasl.clone()), ..cluster() }), ["/sasl"]);
        let config = Cluster { security: Security::SaslPlaintext, sasl: Some(sasl), ..cluster() }.client(&[]).unwrap();
        assert_eq!(config.get("sasl.mechanism"), Some("PLAIN"));
        assert_eq!(config.get("sasl.password"), Some("p"));
    }
}
