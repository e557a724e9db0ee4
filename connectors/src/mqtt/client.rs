//! The MQTT client library behind one small surface: rumqttc has one module for MQTT 3.1.1 and another for 5,
//! with the same words for different types. Called by the subscriber and the publisher task.
//!
//! **One client for one connection.** rumqttc 0.25.1 reconnects by itself, and keeps state that must not outlive a
//! connection: events of the old connection are yielded behind the CONNACK of the new one (3.1.1), packet ids run
//! past a smaller receive maximum (5), unacknowledged publishes are dropped when the broker forgot the session,
//! and one that breaks the connection is sent again for ever. So a client whose `poll` has failed is dropped and a
//! new one is made, and what must be sent again is remembered by our tasks. Nothing stale can be left then.

use std::time::Duration;

use rumqttc::v5::mqttbytes::v5 as mqtt5;
use rumqttc::{NetworkOptions, TlsConfiguration, Transport, v5};

use super::config::{Dial, Protocol, Qos};

/// The largest packet there is: 256 MiB - 1 behind a header of five bytes. It is the limit that the library is
/// given in both directions (its default is 10 KiB), because a packet over the limit breaks the connection, and
/// a message that is delivered again after each reconnect would break it for ever. In MQTT 5 the library can only
/// be given a limit by announcing it; a smaller one would make the broker discard larger messages as if it had
/// delivered them [MQTT-3.1.2-25], where we want them rejected with their bytes.
const LARGEST_PACKET: u32 = 268_435_460;

/// How long connecting may take, in seconds.
const CONNECT_SECONDS: u64 = 10;

/// Hands requests to the connection. Never blocks: what does not fit is refused.
pub(super) enum Client {
    V311(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

/// The connection itself; to be polled without end by one task.
pub(super) enum Link {
    V311(Box<rumqttc::EventLoop>),
    V5(Box<v5::EventLoop>),
}

/// What the connection reports.
pub(super) enum Event {
    Connected(Connected),
    Message(Message),
    /// Our publish with this packet id was acknowledged; the reason when the broker refused it.
    Acknowledged(u16, Option<String>),
    /// Our publish went out with this packet id (0 at QoS 0).
    Published(u16),
    /// One of our acknowledgements went out.
    AckSent,
    /// Our subscription was answered; the numbers of the filters that the broker refused, with its reason.
    Subscribed(Vec<(usize, String)>),
    PingSent,
    PingAnswered,
    /// Our DISCONNECT went out.
    Disconnected,
    Other,
}

/// What the broker said when it took the connection.
pub(super) struct Connected {
    pub session_present: bool,
    /// Unacknowledged messages it takes from us, if it says.
    pub receive_maximum: Option<u16>,
    /// The largest packet it takes from us, if it says.
    pub largest_packet: Option<u32>,
    /// Its own wish for the keep-alive interval.
    pub keep_alive: Option<Duration>,
}

/// Why a connection failed.
pub(super) struct Broken {
    pub cause: String,
    /// The broker does not want us; trying again will not help unless someone changes something.
    pub refused: bool,
}

/// A message as the library holds it; its bytes are not copied.
pub(super) enum Message {
    V311(rumqttc::Publish),
    V5(mqtt5::Publish),
}

/// What acknowledges a message: its packet id, in the form in which the library wants it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Token {
    packet: u16,
    /// A broker may still deliver at QoS 2 what an earlier session subscribed to so.
    exactly_once: bool,
}

impl Message {
    pub(super) fn payload(&self) -> &[u8] {
        match self {
            Self::V311(publish) => &publish.payload,
            Self::V5(publish) => &publish.payload,
        }
    }

    pub(super) fn topic(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::V311(publish) => publish.topic.as_str().into(),
            Self::V5(publish) => String::from_utf8_lossy(&publish.topic),
        }
    }

    /// User properties, which only MQTT 5 has.
    pub(super) fn headers(&self) -> &[(String, String)] {
        match self {
            Self::V311(_) => &[],
            Self::V5(publish) => publish.properties.as_ref().map_or(&[], |properties| properties.user_properties.as_slice()),
        }
    }

    /// What acknowledges it; none at QoS 0.
    pub(super) fn token(&self) -> Option<Token> {
        let (packet, qos) = match self {
            Self::V311(publish) => (publish.pkid, publish.qos as u8),
            Self::V5(publish) => (publish.pkid, publish.qos as u8),
        };
        (qos > 0).then_some(Token { packet, exactly_once: qos == 2 })
    }
}

/// Makes a client and its connection; the first poll connects.
pub(super) fn connect(dial: &Dial) -> (Client, Link) {
    let transport = match &dial.tls {
        None => Transport::Tcp,
        Some(config) => Transport::tls_with_config(TlsConfiguration::Rustls(std::sync::Arc::clone(config))),
    };
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    network.set_connection_timeout(CONNECT_SECONDS);
    // Room for as many requests as can be outstanding at all, and a few of our own; every send is a `try_send`.
    let requests = usize::from(dial.receive_maximum.max(dial.in_flight)) + 8;
    match dial.protocol {
        Protocol::V311 => {
            let mut options = rumqttc::MqttOptions::new(dial.client_id.clone(), dial.host.clone(), dial.port);
            options
                .set_transport(transport)
                .set_keep_alive(dial.keep_alive)
                .set_clean_session(dial.session.is_none())
                .set_max_packet_size(LARGEST_PACKET as usize, LARGEST_PACKET as usize)
                .set_inflight(dial.in_flight.max(1))
                .set_manual_acks(true);
            if let Some((username, password)) = &dial.credentials {
                options.set_credentials(username.clone(), password.clone());
            }
            let (client, mut link) = rumqttc::AsyncClient::new(options, requests);
            link.set_network_options(network);
            (Client::V311(client), Link::V311(Box::new(link)))
        }
        Protocol::V5 => {
            let mut options = v5::MqttOptions::new(dial.client_id.clone(), dial.host.clone(), dial.port);
            let expiry = dial.session.map(|session| u32::try_from(session.as_secs()).unwrap_or(u32::MAX));
            options
                .set_transport(transport)
                .set_network_options(network)
                .set_connection_timeout(CONNECT_SECONDS)
                .set_keep_alive(dial.keep_alive)
                .set_clean_start(dial.session.is_none())
                .set_session_expiry_interval(expiry)
                .set_receive_maximum(Some(dial.receive_maximum.max(1)))
                .set_max_packet_size(Some(LARGEST_PACKET))
                .set_outgoing_inflight_upper_limit(dial.in_flight.max(1))
                .set_manual_acks(true);
            if let Some((username, password)) = &dial.credentials {
                options.set_credentials(username.clone(), password.clone());
            }
            let (client, link) = v5::AsyncClient::new(options, requests);
            (Client::V5(client), Link::V5(Box::new(link)))
        }
    }
}

impl Client {
    /// Subscribes to all filters with one packet; false when there is no room for the request.
    pub(super) fn subscribe(&self, filters: &[String], qos: Qos) -> bool {
        match self {
            Self::V311(client) => {
                let filters = filters.iter().map(|filter| rumqttc::SubscribeFilter::new(filter.clone(), qos311(qos)));
                client.try_subscribe_many(filters).is_ok()
            }
            Self::V5(client) => {
                let filters = filters.iter().map(|filter| {
                    let mut filter = mqtt5::Filter::new(filter.clone(), qos5(qos));
                    // Retained messages once, not again at each restart of the process.
                    filter.retain_forward_rule = mqtt5::RetainForwardRule::OnNewSubscribe;
                    filter
                });
                client.try_subscribe_many(filters).is_ok()
            }
        }
    }

    /// Acknowledges a message; false when there is no room for the request.
    pub(super) fn acknowledge(&self, token: Token) -> bool {
        match self {
            Self::V311(client) => {
                let qos = if token.exactly_once { rumqttc::QoS::ExactlyOnce } else { rumqttc::QoS::AtLeastOnce };
                let mut publish = rumqttc::Publish::new("", qos, Vec::new());
                publish.pkid = token.packet;
                client.try_ack(&publish).is_ok()
            }
            Self::V5(client) => {
                let qos = if token.exactly_once { v5::mqttbytes::QoS::ExactlyOnce } else { v5::mqttbytes::QoS::AtLeastOnce };
                let publish = mqtt5::Publish { qos, pkid: token.packet, ..mqtt5::Publish::default() };
                client.try_ack(&publish).is_ok()
            }
        }
    }

    /// Publishes a message; false when there is no room for the request.
    pub(super) fn publish(&self, topic: &str, payload: &[u8], qos: Qos, retain: bool) -> bool {
        match self {
            Self::V311(client) => client.try_publish(topic, qos311(qos), retain, payload).is_ok(),
            Self::V5(client) => client.try_publish(topic, qos5(qos), retain, payload.to_vec()).is_ok(),
        }
    }

    /// Says goodbye once everything ahead has gone out; false when there is no room for the request.
    pub(super) fn disconnect(&self) -> bool {
        match self {
            Self::V311(client) => client.try_disconnect().is_ok(),
            Self::V5(client) => client.try_disconnect().is_ok(),
        }
    }
}

impl Link {
    /// The next thing that happens. Must not be cancelled other than for good: a packet may be half written.
    pub(super) async fn poll(&mut self) -> Result<Event, Broken> {
        match self {
            Self::V311(link) => link.poll().await.map(event311).map_err(|e| broken311(&e)),
            Self::V5(link) => link.poll().await.map(event5).map_err(|e| broken5(&e)),
        }
    }
}

fn qos311(qos: Qos) -> rumqttc::QoS {
    match qos {
        Qos::AtMostOnce => rumqttc::QoS::AtMostOnce,
        Qos::AtLeastOnce => rumqttc::QoS::AtLeastOnce,
        Qos::ExactlyOnce => rumqttc::QoS::ExactlyOnce,
    }
}

fn qos5(qos: Qos) -> v5::mqttbytes::QoS {
    match qos {
        Qos::AtMostOnce => v5::mqttbytes::QoS::AtMostOnce,
        Qos::AtLeastOnce => v5::mqttbytes::QoS::AtLeastOnce,
        Qos::ExactlyOnce => v5::mqttbytes::QoS::ExactlyOnce,
    }
}

fn event311(event: rumqttc::Event) -> Event {
    use rumqttc::{Outgoing, Packet};
    match event {
        rumqttc::Event::Incoming(packet) => match packet {
            Packet::Publish(publish) => Event::Message(Message::V311(publish)),
            Packet::PubAck(ack) => Event::Acknowledged(ack.pkid, None),
            Packet::PingResp => Event::PingAnswered,
            Packet::ConnAck(ack) => Event::Connected(Connected {
                session_present: ack.session_present,
                receive_maximum: None,
                largest_packet: None,
                keep_alive: None,
            }),
            Packet::SubAck(ack) => {
                let refused =
                    ack.return_codes.iter().enumerate().filter(|(_, code)| matches!(code, rumqttc::SubscribeReasonCode::Failure));
                Event::Subscribed(refused.map(|(number, _)| (number, "refused".to_owned())).collect())
            }
            _ => Event::Other,
        },
        rumqttc::Event::Outgoing(outgoing) => match outgoing {
            Outgoing::Publish(packet) => Event::Published(packet),
            other => sent(&other),
        },
    }
}

fn event5(event: v5::Event) -> Event {
    use mqtt5::{Packet, PubAckReason};
    match event {
        v5::Event::Incoming(packet) => match packet {
            Packet::Publish(publish) => Event::Message(Message::V5(publish)),
            Packet::PubAck(ack) => {
                let taken = matches!(ack.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers);
                let words = ack.properties.and_then(|properties| properties.reason_string);
                Event::Acknowledged(ack.pkid, (!taken).then(|| words.unwrap_or_else(|| format!("{:?}", ack.reason))))
            }
            Packet::PingResp(_) => Event::PingAnswered,
            Packet::ConnAck(ack) => {
                let properties = ack.properties.as_ref();
                Event::Connected(Connected {
                    session_present: ack.session_present,
                    receive_maximum: properties.and_then(|p| p.receive_max),
                    largest_packet: properties.and_then(|p| p.max_packet_size),
                    keep_alive: properties
                        .and_then(|p| p.server_keep_alive)
                        .map(|seconds| Duration::from_secs(u64::from(seconds))),
                })
            }
            Packet::SubAck(ack) => {
                let refused = ack
                    .return_codes
                    .iter()
                    .enumerate()
                    .filter(|(_, code)| !matches!(code, mqtt5::SubscribeReasonCode::Success(_)));
                Event::Subscribed(refused.map(|(number, code)| (number, format!("{code:?}"))).collect())
            }
            _ => Event::Other,
        },
        v5::Event::Outgoing(outgoing) => match outgoing {
            rumqttc::Outgoing::Publish(packet) => Event::Published(packet),
            other => sent(&other),
        },
    }
}

fn sent(outgoing: &rumqttc::Outgoing) -> Event {
    use rumqttc::Outgoing;
    match outgoing {
        Outgoing::PubAck(_) | Outgoing::PubRec(_) => Event::AckSent,
        Outgoing::PingReq => Event::PingSent,
        Outgoing::Disconnect => Event::Disconnected,
        _ => Event::Other,
    }
}

fn broken311(error: &rumqttc::ConnectionError) -> Broken {
    use rumqttc::{ConnectReturnCode, ConnectionError};
    match error {
        ConnectionError::ConnectionRefused(code) => Broken {
            cause: format!("the broker refused the connection: {code:?}"),
            refused: !matches!(code, ConnectReturnCode::ServiceUnavailable),
        },
        other => Broken { cause: advised(chain(other)), refused: false },
    }
}

fn broken5(error: &v5::ConnectionError) -> Broken {
    use mqtt5::ConnectReturnCode::{
        BadAuthenticationMethod, BadClientId, BadUserNamePassword, Banned, ClientIdentifierNotValid, NotAuthorized,
    };
    use mqtt5::ConnectReturnCode::{RefusedProtocolVersion, UnsupportedProtocolVersion};
    match error {
        v5::ConnectionError::ConnectionRefused(code @ (RefusedProtocolVersion | UnsupportedProtocolVersion)) => Broken {
            cause: format!("the broker refused the connection: {code:?}; it may know only MQTT 3.1.1 (`protocol: v3_1_1`)"),
            refused: true,
        },
        v5::ConnectionError::ConnectionRefused(code) => {
            let refused = matches!(
                code,
                BadAuthenticationMethod | BadClientId | BadUserNamePassword | Banned | ClientIdentifierNotValid | NotAuthorized
            );
            Broken { cause: format!("the broker refused the connection: {code:?}"), refused }
        }
        other => Broken { cause: advised(chain(other)), refused: false },
    }
}

/// A certificate that nobody vouches for usually means an authority of one's own.
fn advised(cause: String) -> String {
    if cause.contains("UnknownIssuer") { format!("{cause}; name its authority with `tls: {{ ca: FILE }}`") } else { cause }
}

/// An error with its causes; the library's own text often leaves them out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_both_versions_look_alike() {
        let mut old = rumqttc::Publish::new("a/b", rumqttc::QoS::AtLeastOnce, b"x".to_vec());
        old.pkid = 7;
        let old = Message::V311(old);
        assert_eq!((old.topic().as_ref(), old.payload(), old.headers().len()), ("a/b", b"x".as_slice(), 0));
        assert!(old.token().is_some_and(|token| token.packet == 7 && !token.exactly_once));

        let properties = mqtt5::PublishProperties { user_properties: vec![("k".into(), "v".into())], ..Default::default() };
        let new = Message::V5(mqtt5::Publish::new("a/b", v5::mqttbytes::QoS::AtMostOnce, "x", Some(properties)));
        assert_eq!((new.topic().as_ref(), new.headers().len()), ("a/b", 1));
        assert!(new.token().is_none());
    }

    #[test]
    fn a_refusal_of_the_broker_is_told_from_an_outage() {
        let refused = broken311(&rumqttc::ConnectionError::ConnectionRefused(rumqttc::ConnectReturnCode::NotAuthorized));
        assert!(refused.refused && refused.cause.contains("NotAuthorized"));
        assert!(!broken5(&v5::ConnectionError::ConnectionRefused(mqtt5::ConnectReturnCode::ServerBusy)).refused);
        assert!(!broken311(&rumqttc::ConnectionError::NetworkTimeout).refused);
    }
}
