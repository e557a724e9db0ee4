//! Sources and sinks: one noun, one file (or folder). A connector knows its protocol and nothing of
//! other connectors, of operators or of YAML; the engine owns its loop.

mod file;
mod generate;
mod kafka;
mod messages;
mod mqtt;
mod null;
mod payloads;
mod refused;
mod stdout;
pub mod table;
mod tls;
mod topic;

use afferent_engine::registry::Registry;

/// Makes every connector known.
pub fn register(registry: &mut Registry) {
    registry.source::<file::FileSourceConfig>();
    registry.source::<generate::GenerateConfig>();
    registry.source::<kafka::KafkaSourceConfig>();
    registry.source::<mqtt::MqttSourceConfig>();
    registry.sink::<file::FileSinkConfig>();
    registry.sink::<kafka::KafkaSinkConfig>();
    registry.sink::<mqtt::MqttSinkConfig>();
    registry.sink::<null::DiscardConfig>();
    registry.sink::<stdout::StdoutConfig>();
    registry.sink::<table::TableConfig>();
}
