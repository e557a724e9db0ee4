//! The `llm` operator: one row, one question to a language model, its answer in typed columns. `config` is what an
//! author writes and how it is planned, `prompt` makes the question of a row, `client` speaks to the provider,
//! `answer` makes columns of what it says, `operator` keeps several rows under way.

mod answer;
mod client;
mod config;
mod operator;
mod prompt;

pub use config::{LlmConfig, PromptSource, ResponseFormat};
