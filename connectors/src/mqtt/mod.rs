//! MQTT 3.1.1 and 5: a source that acknowledges a message when everything that came of it is durable, and a sink
//! that has every message acknowledged. Both keep their connection in a task of its own.

mod ack;
mod client;
mod config;
mod inbox;
mod publisher;
mod sink;
mod source;
mod subscriber;

pub use sink::MqttSinkConfig;
pub use source::MqttSourceConfig;
