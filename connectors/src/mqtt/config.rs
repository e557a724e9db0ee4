//! The connection settings that the `mqtt` source and sink share: what an author writes, how it is checked while
//! planning, and what of it the client needs (secrets and files are read only when the stage is built).

use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{PlanContext, Problem};
use afferent_engine::config::{Interval, Secret, resolve};
use afferent_engine::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use url::Url;

use crate::tls::Tls;

/// Defines a configuration struct with the connection settings in front of its own fields. A nested struct would
/// make authors write one more level, and serde's `flatten` would accept unknown keys.
macro_rules! with_connection {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$own_meta:meta])* $own:ident: $own_type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, rename_all = "snake_case")]
        pub struct $name {
            /// Where the broker is: `mqtt://host:1883`, or `mqtts://host:8883` for TLS.
            url: String,
            /// The name of the session; by default `afferent-<pipeline>-<stage>`. The broker keeps what is not
            /// acknowledged under this name, and closes the older of two connections that have the same one.
            #[serde(default)]
            client_id: Option<String>,
            /// The user to log in as.
            #[serde(default)]
            username: Option<String>,
            /// The user's password; write it as `${VARIABLE}` or `${file:/path}`.
            #[serde(default)]
            password: Option<afferent_engine::config::Secret>,
            /// Certificates, for a broker with a private authority or one that asks for ours.
            #[serde(default)]
            tls: Option<crate::tls::Tls>,
            /// The version of the protocol.
            #[serde(default)]
            protocol: crate::mqtt::config::Protocol,
            /// How often the connection is tested when nothing else is said, from 5s to 18h.
            #[serde(default = "crate::mqtt::config::keep_alive")]
            keep_alive: afferent_engine::config::Interval,
            $($(#[$own_meta])* $own: $own_type,)*
        }

        impl $name {
            fn connection(&self) -> crate::mqtt::config::Connection {
                crate::mqtt::config::Connection {
                    url: self.url.clone(),
                    client_id: self.client_id.clone(),
                    username: self.username.clone(),
                    password: self.password.clone(),
                    tls: self.tls.clone(),
                    protocol: self.protocol,
                    keep_alive: self.keep_alive,
                }
            }
        }
    };
}
pub(super) use with_connection;

/// A version of MQTT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Protocol {
    /// MQTT 3.1.1.
    #[serde(rename = "v3_1_1")]
    V311,
    /// MQTT 5.
    #[default]
    #[serde(rename = "v5")]
    V5,
}

/// How often a message is delivered between a client and the broker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the words of the MQTT specification")]
pub enum Qos {
    /// QoS 0: not acknowledged, gone when something fails.
    AtMostOnce,
    /// QoS 1: acknowledged, perhaps delivered twice.
    #[default]
    AtLeastOnce,
    /// QoS 2: refused, see the error.
    ExactlyOnce,
}

/// Why QoS 2 is refused. rumqttc 0.25.1 clears the set of received packet ids (`incoming_pub`) in
/// `MqttState::clean`, which runs whenever a connection breaks, and never consults it to recognise a repeated
/// PUBLISH: after a reconnect the same message would be taken twice, which is what QoS 2 promises to prevent.
pub(super) fn refuse_exactly_once(qos: Qos) -> Option<Problem> {
    (qos == Qos::ExactlyOnce).then(|| {
        Problem::new(
            "qos-2",
            "/qos",
            "QoS 2 cannot be kept: the client library forgets the packet ids it has received when a connection breaks, so that a message would be taken twice",
        )
        .help("use `at_least_once`")
    })
}

pub(super) fn keep_alive() -> Interval {
    Interval::secs(30)
}

/// The settings as written.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub url: String,
    pub client_id: Option<String>,
    pub username: Option<String>,
    pub password: Option<Secret>,
    pub tls: Option<Tls>,
    pub protocol: Protocol,
    pub keep_alive: Interval,
}

/// The settings as the client needs them; holds secrets, so it is not `Debug`.
#[derive(Clone)]
pub(super) struct Dial {
    pub protocol: Protocol,
    pub client_id: String,
    pub host: String,
    pub port: u16,
    pub tls: Option<Arc<rustls::ClientConfig>>,
    pub credentials: Option<(String, String)>,
    pub keep_alive: Duration,
    /// The broker forgets the session at once (sinks, QoS 0), or keeps it this long.
    pub session: Option<Duration>,
    /// How many unacknowledged messages the broker may send (v5).
    pub receive_maximum: u16,
    /// How many unacknowledged messages we send.
    pub in_flight: u16,
}

struct Endpoint {
    host: String,
    port: u16,
    secure: bool,
}

impl Connection {
    /// Everything that can be said about the settings without a connection. Fills in the client id.
    pub(super) fn check(&mut self, context: &PlanContext) -> Vec<Problem> {
        let mut problems = Vec::new();
        // References to variables are resolved when the stage is built, where their text is known.
        if !self.url.contains("${") {
            match endpoint(&self.url) {
                Err(message) => {
                    problems.push(Problem::new("broker-url", "/url", message).help("write for example mqtt://localhost:1883"))
                }
                Ok(endpoint) if self.tls.is_some() && !endpoint.secure => problems.push(
                    Problem::new("broker-url", "/tls", format!("`{}` is a connection without TLS", self.url))
                        .help("write mqtts:// to use TLS"),
                ),
                Ok(_) => {}
            }
        }
        let seconds = self.keep_alive.0.as_secs();
        // Five seconds is the least that the client library takes, 65,535 the most that the protocol carries.
        if !(5..=65_535).contains(&seconds) {
            problems.push(Problem::new("keep-alive", "/keep_alive", format!("{} is not between 5s and 65535s", self.keep_alive)));
        }
        if self.password.is_some() && self.username.is_none() {
            problems
                .push(Problem::new("missing-username", "/password", "there is a password and no user").help("add `username`"));
        }
        if let Some(tls) = &mut self.tls {
            problems.extend(tls.check(context));
        }
        if self.client_id.as_deref() == Some("") {
            problems.push(
                Problem::new("client-id", "/client_id", "the client id is empty, and a session needs a name")
                    .help("leave it out for `afferent-<pipeline>-<stage>`"),
            );
        }
        self.client_id.get_or_insert_with(|| format!("afferent-{}-{}", context.pipeline, context.stage));
        problems
    }

    /// Reads files and secrets.
    ///
    /// # Errors
    /// Fatal, with the variable or file that is missing.
    pub(super) fn dial(&self, session: Option<Duration>, receive_maximum: u16, in_flight: u16) -> Result<Dial> {
        let url = resolve(&self.url).map_err(|e| Error::fatal(e).context("reading `url`"))?;
        let endpoint = endpoint(&url).map_err(Error::fatal)?;
        let password = match &self.password {
            None => String::new(),
            Some(secret) => secret.reveal().map_err(|e| Error::fatal(e).context("reading `password`"))?,
        };
        let tls = if endpoint.secure { Some(Arc::new(self.tls.clone().unwrap_or_default().client()?)) } else { None };
        let username =
            self.username.as_deref().map(resolve).transpose().map_err(|e| Error::fatal(e).context("reading `username`"))?;
        Ok(Dial {
            protocol: self.protocol,
            client_id: self.client_id.clone().unwrap_or_default(),
            host: endpoint.host,
            port: endpoint.port,
            tls,
            credentials: username.map(|username| (username, password)),
            keep_alive: self.keep_alive.0,
            session,
            receive_maximum,
            in_flight,
        })
    }
}

fn endpoint(url: &str) -> std::result::Result<Endpoint, String> {
    let parsed = Url::parse(url).map_err(|e| format!("`{url}` is not an address: {e}"))?;
    let (secure, default_port) = match parsed.scheme() {
        "mqtt" => (false, 1883),
        "mqtts" => (true, 8883),
        other => return Err(format!("`{other}://` is not known here: use mqtt:// or mqtts://")),
    };
    if !parsed.username().is_empty() || parsed.password().is_some() {
        // The address is logged; what is in it would be, too.
        return Err("user and password do not belong into the address: use `username` and `password`".to_owned());
    }
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(format!("`{url}` has more than host and port"));
    }
    let host = parsed.host_str().filter(|host| !host.is_empty()).ok_or_else(|| format!("`{url}` names no host"))?;
    Ok(Endpoint { host: host.to_owned(), port: parsed.port().unwrap_or(default_port), secure })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(url: &str) -> Connection {
        Connection {
            url: url.to_owned(),
            client_id: None,
            username: None,
            password: None,
            tls: None,
            protocol: Protocol::V5,
            keep_alive: keep_alive(),
        }
    }

    fn context() -> PlanContext {
        PlanContext { pipeline: "bearings".into(), stage: "vibration".into(), ..PlanContext::default() }
    }

    #[test]
    fn addresses_are_told_apart() {
        let local = endpoint("mqtt://localhost").unwrap();
        assert_eq!((local.host.as_str(), local.port, local.secure), ("localhost", 1883, false));
        let secure = endpoint("mqtts://broker.example:9883").unwrap();
        assert_eq!((secure.port, secure.secure), (9883, true));
        for wrong in ["localhost:1883", "http://localhost", "mqtt://", "mqtt://user:secret@host", "mqtt://host/path", ""] {
            let message = endpoint(wrong).err();
            assert!(message.as_ref().is_some_and(|m| !m.contains("secret")), "{wrong}: {message:?}");
        }
    }

    #[test]
    fn the_client_id_is_stable_and_every_problem_is_told() {
        let mut good = connection("mqtt://localhost");
        assert!(good.check(&context()).is_empty());
        assert_eq!(good.client_id.as_deref(), Some("afferent-bearings-vibration"));

        let mut bad = connection("mqtt://localhost");
        bad.keep_alive = Interval::secs(1);
        bad.password = Some(Secret::new("x"));
        bad.tls = Some(Tls { cert: Some("c.pem".into()), ..Tls::default() });
        let places: Vec<String> = bad.check(&context()).into_iter().map(|problem| problem.path).collect();
        assert_eq!(places, ["/tls", "/keep_alive", "/password", "/tls"]);
        assert!(connection("mqtt://${BROKER}").check(&context()).is_empty());
    }

    #[test]
    fn a_missing_variable_is_named_when_the_stage_is_built() {
        let error = connection("mqtt://${NO_SUCH_BROKER_HERE}").dial(None, 1, 1).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|e| e.contains("NO_SUCH_BROKER_HERE")), "{error:?}");
    }

    #[test]
    fn exactly_once_is_refused_with_its_reason() {
        assert!(refuse_exactly_once(Qos::AtLeastOnce).is_none());
        assert!(refuse_exactly_once(Qos::ExactlyOnce).is_some_and(|problem| problem.message.contains("packet ids")));
    }
}
