//! Operators: one verb, one file. An operator transforms batches; it knows nothing of acknowledgement,
//! of protocols or of the stages around it.

mod batch;
mod columns;
mod decode;
mod encode;
mod infer;
mod llm;
mod route;
mod sql;
mod state;
#[cfg(test)]
mod testing;
mod window;

use afferent_engine::registry::Registry;

pub use batch::BatchConfig;
pub use decode::DecodeConfig;
pub use encode::EncodeConfig;
pub use infer::{InferConfig, ModelServer, NanPolicy, OutputConfig, Served, Stack};
pub use llm::{LlmConfig, PromptSource, ResponseFormat};
pub use route::{Conditions, Mode, RouteConfig};
pub use sql::SqlConfig;
pub use window::{Incomplete, WindowConfig};

/// Makes every operator known.
pub fn register(registry: &mut Registry) {
    registry.operator::<BatchConfig>();
    registry.operator::<DecodeConfig>();
    registry.operator::<EncodeConfig>();
    registry.operator::<InferConfig>();
    registry.operator::<LlmConfig>();
    registry.operator::<RouteConfig>();
    registry.operator::<SqlConfig>();
    registry.operator::<WindowConfig>();
}
