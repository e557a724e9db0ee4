//! The verbs of the command line, and what they have in common.

use std::ffi::OsStr;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use super::{broker, check, demo, explain, infer_schema, list, run, schema, sql};
use crate::catalog::Shared;

/// Exit code when problems were found or a pipeline failed.
pub const FAILED: u8 = 1;

/// Dataflow stream engine and model server in one process.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Examples:
  afferent check pipeline.yaml
  afferent run pipeline.yaml
  afferent sql -c 'select * from results limit 10'
  afferent demo"
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run pipelines until their input ends or Ctrl-C drains them.
    Run(run::Run),
    /// Find every problem of pipeline files without running them.
    Check(check::Check),
    /// Draw the planned graph with its schemas and guarantees.
    Explain(explain::Explain),
    /// Query the tables that pipelines write, also while they run.
    Sql(sql::Sql),
    /// List the components, or show one with its options.
    List(list::List),
    /// Print the JSON Schema of pipeline files, for editors.
    Schema(schema::SchemaCommand),
    /// Sample a file and write the schema declaration for it.
    InferSchema(infer_schema::InferSchema),
    /// Start the embedded MQTT broker for trials.
    Broker(broker::Broker),
    /// See it work: simulated devices, a model, tables and SQL, for about a minute.
    Demo(demo::Demo),
}

/// Where data are.
#[derive(Args, Clone, Debug)]
pub struct DataDir {
    /// Checkpoints, tables, tails and dead letters
    #[arg(long, value_name = "DIR", default_value = ".afferent", env = "AFFERENT_DATA_DIR")]
    pub data_dir: PathBuf,
}

/// Where things are.
#[derive(Args, Clone, Debug)]
pub struct Places {
    /// Where data are.
    #[command(flatten)]
    pub data: DataDir,
    /// Model repository [default: `models` beside the pipeline, then in the working directory]
    #[arg(long, value_name = "DIR")]
    pub models: Option<PathBuf>,
}

impl Places {
    /// What the pipelines of this process share.
    pub fn shared(&self) -> Shared {
        Shared::new(&self.data.data_dir, self.models.as_deref())
    }
}

impl Cli {
    /// Runs the verb; errors go to standard error in one line.
    pub fn run(self) -> ExitCode {
        let result = match self.verb {
            Verb::Run(verb) => verb.run(),
            Verb::Check(verb) => verb.run(),
            Verb::Explain(verb) => verb.run(),
            Verb::Sql(verb) => verb.run(),
            Verb::List(verb) => verb.run(),
            Verb::Schema(verb) => verb.run(),
            Verb::InferSchema(verb) => verb.run(),
            Verb::Broker(verb) => verb.run(),
            Verb::Demo(verb) => verb.run(),
        };
        result.unwrap_or_else(|error| {
            if is_broken_pipe(&error) {
                return ExitCode::SUCCESS;
            }
            eprintln!("error: {error:#}");
            ExitCode::from(FAILED)
        })
    }
}

/// Whoever reads our output has seen enough (`| head`): not an error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

/// Whether to write colours there: a person looks, and has not set `NO_COLOR` (no-color.org).
pub fn colours(stream: &impl IsTerminal) -> bool {
    wants_colours(stream.is_terminal(), std::env::var_os("NO_COLOR").as_deref())
}

fn wants_colours(terminal: bool, no_color: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Writes to standard output; `println!` would panic when the reader is gone.
pub fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_of_people_who_want_them() {
        for (terminal, no_color, wanted) in
            [(true, None, true), (true, Some(""), true), (true, Some("1"), false), (false, None, false), (false, Some(""), false)]
        {
            assert_eq!(wants_colours(terminal, no_color.map(OsStr::new)), wanted, "{terminal} {no_color:?}");
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
