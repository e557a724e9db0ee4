//! Kafka: a source that reads as a member of a consumer group, or the partitions that it is told, and commits what
//! is durable; and a sink that has every record's delivery confirmed. Both use librdkafka through `rdkafka`.

mod config;
mod consumer;
mod event_id;
mod member;
mod ownership;
mod partitions;
mod reach;
mod sink;
mod source;

pub use sink::KafkaSinkConfig;
pub use source::KafkaSourceConfig;
