//! The `afferent` command. Parses the command line, sets up logging and hands over to one file a verb.

mod broker;
mod catalog;
mod cli;
mod live;
mod logging;
mod metrics_listener;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::Cli::parse().run()
}
