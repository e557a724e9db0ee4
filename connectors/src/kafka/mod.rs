//! Kafka: a source that reads as a member of a consumer group and commits what is durable, and a sink that has
//! every record's delivery confirmed. Both use librdkafka through `rdkafka`.

mod config;
mod consumer;
mod event_id;
mod ownership;
mod reach;
mod sink;
mod source;

pub use sink::KafkaSinkConfig;
pub use source::KafkaSourceConfig;
