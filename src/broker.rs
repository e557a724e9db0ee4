//! The embedded MQTT broker for trials and demos: rumqttd, in memory only. It serves MQTT 3.1.1 and 5 on
//! one port: rumqttd wants a port for each, so a small front looks at the protocol level in the CONNECT
//! packet and passes the connection on.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::time::Duration;

use anyhow::Context;
use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// The largest payload it takes: that of our own `mqtt` source.
const MAX_PAYLOAD: usize = 16 * 1024 * 1024;
/// Messages kept for a subscriber that is away: ten segments of 100 MiB at most, oldest dropped.
const SEGMENT_BYTES: usize = 100 * 1024 * 1024;
const SEGMENTS: usize = 10;
/// MQTT 5 in the CONNECT packet's protocol level; 4 is 3.1.1.
const LEVEL_5: u8 = 5;

/// Starts it, listening on `address` (port 0: any free one), and returns where. It has no stop; it ends
/// with the process.
///
/// # Errors
/// When the address cannot be bound.
pub async fn start(address: SocketAddr) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}; if another broker runs there, use it or choose another port"))?;
    let bound = listener.local_addr()?;
    let (v4, v5) = (free_port()?, free_port()?);
    let mut broker = Broker::new(config(v4, v5));
    std::thread::Builder::new().name("broker".to_owned()).spawn(move || {
        if let Err(error) = broker.start() {
            tracing::error!(%error, "the embedded broker ended");
        }
    })?;
    wait_for(v4).await?;
    wait_for(v5).await?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(pass_on(client, v4, v5))),
                Err(error) => {
                    tracing::warn!(%error, "the embedded broker could not accept a connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(bound)
}

async fn pass_on(mut client: TcpStream, v4: SocketAddr, v5: SocketAddr) {
    let server = match protocol_level(&client).await {
        Some(LEVEL_5) => v5,
        Some(_) => v4,
        None => return,
    };
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    // Small packets both ways: waiting to fill a segment would add 40 ms to each.
    let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
    // An error here is one side closing the connection, which is how connections end.
    let _ = copy_bidirectional(&mut client, &mut server).await;
}

/// The protocol level of the CONNECT packet that opens the connection, without consuming it: fixed
/// header (1 byte and a length of 1 to 4), then the name "MQTT" behind its two-byte length, then the level.
async fn protocol_level(client: &TcpStream) -> Option<u8> {
    let mut head = [0; 12];
    for _ in 0..100 {
        let seen = client.peek(&mut head).await.ok()?;
        if seen == 0 {
            return None;
        }
        let length_bytes = head[1..5].iter().position(|byte| byte & 0x80 == 0)? + 1;
        let level_at = 1 + length_bytes + 2 + 4;
        if seen > level_at {
            return Some(head[level_at]);
        }
        sleep(Duration::from_millis(10)).await;
    }
    None
}

fn config(v4: SocketAddr, v5: SocketAddr) -> Config {
    let server = |name: &str, listen| {
        let settings = ServerSettings {
            name: name.to_owned(),
            listen,
            tls: None,
            next_connection_delay_ms: 1,
            connections: ConnectionSettings {
                connection_timeout_ms: 10_000,
                max_payload_size: MAX_PAYLOAD,
                max_inflight_count: 1000,
                auth: None,
                external_auth: None,
                dynamic_filters: true,
            },
        };
        Some(HashMap::from([(name.to_owned(), settings)]))
    };
    Config {
        id: 0,
        router: RouterConfig {
            max_connections: 10_000,
            max_outgoing_packet_count: 1000,
            max_segment_size: SEGMENT_BYTES,
            max_segment_count: SEGMENTS,
            custom_segment: None,
            initialized_filters: None,
            shared_subscriptions_strategy: Default::default(),
        },
        v4: server("mqtt-3.1.1", v4),
        v5: server("mqtt-5", v5),
        ws: None,
        cluster: None,
        console: None,
        bridge: None,
        prometheus: None,
        metrics: None,
    }
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(StdListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

async fn wait_for(server: SocketAddr) -> anyhow::Result<()> {
    for _ in 0..500 {
        if TcpStream::connect(server).await.is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("the embedded broker did not start")
}
