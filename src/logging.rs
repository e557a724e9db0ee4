//! Structured logs on standard error: text for people, JSON for collectors. `AFFERENT_LOG` sets the level
//! in the words of tracing's `EnvFilter`.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::cli::colours;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text an event.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

/// Starts logging into `writer`. Called once, before anything logs.
pub fn start(format: LogFormat, writer: BoxMakeWriter) {
    let filter = EnvFilter::try_from_env("AFFERENT_LOG").unwrap_or_else(|_| {
        EnvFilter::new(
            "info,delta_kernel=warn,deltalake_core=error,parquet=error,buoyant_kernel=warn,tract_onnx=warn,rumqttd=off,ort=warn",
        )
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(colours(&std::io::stderr()));
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        // The list begins with the span of the stage, also where a library has entered spans of its own within.
        LogFormat::Json => builder.json().with_current_span(false).with_span_list(true).init(),
    }
}
