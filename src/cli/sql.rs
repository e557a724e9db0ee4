//! `afferent sql`: queries over the tables that pipelines write, one shot or at a prompt with history. Reads
//! only; works while a pipeline runs.

use std::io::IsTerminal;
use std::process::ExitCode;

use afferent_connectors::table::register_all;
use anyhow::{Context, bail};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use clap::{Args, ValueEnum};
use datafusion::prelude::{SessionConfig, SessionContext};
use rustyline::error::ReadlineError;

use super::{Places, print};

/// Query the tables that pipelines write, also while they run.
#[derive(Args)]
#[command(after_help = "Rows are visible as soon as a table's tail has them, before Delta Lake does. Those of the last
moments before a crash may be made anew afterwards. Rejected rows are in the table dead_letters.

Examples:
  afferent sql                                        # a prompt; 'show tables' lists them
  afferent sql -c 'select device, count(*) from results group by device'
  afferent sql --format csv -c 'select * from results' > results.csv")]
pub struct Sql {
    /// Run this query and exit
    #[arg(short = 'c', long, value_name = "QUERY")]
    command: Option<String>,
    /// How rows are printed [default: table on a terminal and at the prompt, csv otherwise]
    #[arg(long)]
    format: Option<Format>,
    #[command(flatten)]
    places: Places,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// Aligned columns
    Table,
    /// With a header line
    Csv,
    /// One JSON object a line
    Json,
    /// Arrow IPC stream
    Arrow,
}

impl Sql {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        match &self.command {
            Some(query) => {
                let by_place = if std::io::stdout().is_terminal() { Format::Table } else { Format::Csv };
                let (schema, rows) = runtime.block_on(self.query(query))?;
                show(&schema, &rows, self.format.unwrap_or(by_place))?;
            }
            None => self.prompt(&runtime)?,
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Tables are opened anew for each query, so that each sees what is durable by then.
    async fn query(&self, query: &str) -> anyhow::Result<(SchemaRef, Vec<RecordBatch>)> {
        let config = SessionConfig::new().with_information_schema(true);
        let context = SessionContext::new_with_config(config);
        let tables = register_all(&context, &self.places.data_dir).await?;
        if tables.is_empty() && !self.places.data_dir.exists() {
            bail!(
                "there is no data directory {}; say --data-dir, or run a pipeline with a table sink first",
                self.places.data_dir.display()
            );
        }
        let frame = context.sql(query).await.map_err(|e| match tables.as_slice() {
            [] => anyhow::anyhow!("{e}\n  there are no tables in {} yet", self.places.data_dir.display()),
            tables => anyhow::anyhow!("{e}\n  tables: {}", tables.join(", ")),
        })?;
        let schema = SchemaRef::new(frame.schema().as_arrow().clone());
        Ok((schema, frame.collect().await?))
    }

    fn prompt(&self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        let mut editor = rustyline::DefaultEditor::new()?;
        let history = self.places.data_dir.join("sql_history");
        // There is none the first time.
        let _ = editor.load_history(&history);
        let mut statement = String::new();
        loop {
            match editor.readline(if statement.is_empty() { "afferent> " } else { "      ... " }) {
                Ok(line) => {
                    statement.push_str(&line);
                    statement.push('\n');
                    let trimmed = statement.trim();
                    if trimmed.is_empty() || matches!(trimmed, "exit" | "quit" | "\\q") {
                        if !trimmed.is_empty() {
                            break;
                        }
                        statement.clear();
                        continue;
                    }
                    if !trimmed.ends_with(';') && !trimmed.eq_ignore_ascii_case("show tables") {
                        continue;
                    }
                    editor.add_history_entry(trimmed)?;
                    let result = runtime.block_on(self.query(trimmed.trim_end_matches(';')));
                    match result.and_then(|(schema, rows)| show(&schema, &rows, self.format.unwrap_or(Format::Table))) {
                        Ok(()) => {}
                        Err(error) => eprintln!("error: {error:#}"),
                    }
                    statement.clear();
                }
                Err(ReadlineError::Interrupted) => statement.clear(),
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.places.data_dir.exists() {
            editor.save_history(&history).context("saving the history of queries")?;
        }
        Ok(())
    }
}

fn show(schema: &SchemaRef, rows: &[RecordBatch], format: Format) -> anyhow::Result<()> {
    match format {
        Format::Table => {
            let text = arrow::util::pretty::pretty_format_batches_with_schema(SchemaRef::clone(schema), rows)?;
            print(&format!("{text}\n"))
        }
        Format::Csv => {
            let mut text = Vec::new();
            let mut writer = arrow::csv::WriterBuilder::new().with_header(true).build(&mut text);
            if rows.is_empty() {
                writer.write(&RecordBatch::new_empty(SchemaRef::clone(schema)))?;
            }
            for batch in rows {
                writer.write(batch)?;
            }
            drop(writer);
            print(&String::from_utf8_lossy(&text))
        }
        Format::Json => {
            let mut writer = arrow::json::LineDelimitedWriter::new(Vec::new());
            for batch in rows {
                writer.write(batch)?;
            }
            writer.finish()?;
            print(&String::from_utf8_lossy(&writer.into_inner()))
        }
        Format::Arrow => {
            use std::io::Write;
            let mut writer = arrow::ipc::writer::StreamWriter::try_new(std::io::stdout().lock(), schema)?;
            for batch in rows {
                writer.write(batch)?;
            }
            writer.finish()?;
            Ok(writer.get_mut().flush()?)
        }
    }
}
