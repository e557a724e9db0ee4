//! `afferent sql`: queries over the tables that pipelines write, one shot or at a prompt with history. Reads
//! only; works while a pipeline runs.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;

use afferent_connectors::table::{DEAD_LETTERS, register_all};
use afferent_engine::rejected;
use anyhow::bail;
use arrow::array::{ArrayRef, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use clap::{Args, ValueEnum};
use datafusion::catalog::empty::EmptyTable;
use datafusion::error::DataFusionError;
use datafusion::prelude::{SQLOptions, SessionConfig, SessionContext};
use rustyline::error::ReadlineError;
use tokio::runtime::Runtime;

use super::{DataDir, print};

/// What one must know at the prompt.
const HELP: &str = "Statements end with `;`. `show tables;` lists the tables, `describe TABLE;` the columns of one.\n\
                    `exit` or Ctrl-D leaves.\n";

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
    place: DataDir,
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
        let data_dir = &self.place.data_dir;
        if !data_dir.is_dir() {
            bail!("there is no data directory {}; say --data-dir, or run a pipeline with a table sink first", data_dir.display());
        }
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
        let tables = register_all(&context, &self.place.data_dir).await?;
        // DataFusion would show its own tables among those of the user.
        if asks_for_tables(query) {
            return list(&tables);
        }
        if !tables.iter().any(|table| table == DEAD_LETTERS) {
            // Nothing was rejected so far: there are none, which is no fault of the query.
            context.register_table(DEAD_LETTERS, Arc::new(EmptyTable::new(rejected::schema())))?;
        }
        let failed = |error: DataFusionError| {
            let text = told(&error);
            match (text.starts_with("table '"), tables.as_slice()) {
                (false, _) => anyhow::anyhow!("{text}"),
                (true, []) => anyhow::anyhow!("{text}\n  there are no tables in {} yet", self.place.data_dir.display()),
                (true, tables) => anyhow::anyhow!("{text}\n  tables: {}", tables.join(", ")),
            }
        };
        let plan = context.state().create_logical_plan(query).await.map_err(failed)?;
        // Tables belong to the pipelines that write them.
        let reading = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        if let Err(refused) = reading.verify_plan(&plan) {
            bail!("this is for reading: {}", told(&refused));
        }
        let frame = context.execute_logical_plan(plan).await.map_err(failed)?;
        let schema = SchemaRef::new(frame.schema().as_arrow().clone());
        Ok((schema, frame.collect().await.map_err(failed)?))
    }

    fn prompt(&self, runtime: &Runtime) -> anyhow::Result<()> {
        let person = std::io::stdin().is_terminal();
        if person {
            print(HELP)?;
        }
        let mut editor = rustyline::DefaultEditor::new()?;
        let history = self.place.data_dir.join("sql_history");
        // There is none the first time.
        let _ = editor.load_history(&history);
        let mut statement = String::new();
        loop {
            match editor.readline(if statement.is_empty() { "afferent> " } else { "      ... " }) {
                Ok(line) => {
                    statement.push_str(&line);
                    statement.push('\n');
                    let trimmed = statement.trim();
                    match trimmed.trim_end_matches(';') {
                        "exit" | "quit" | "\\q" => break,
                        "help" | "\\?" | "\\h" => print(HELP)?,
                        "" => {}
                        _ if trimmed.ends_with(';') || asks_for_tables(trimmed) => {
                            editor.add_history_entry(trimmed)?;
                            self.answer(runtime, trimmed);
                        }
                        _ => continue,
                    }
                    statement.clear();
                }
                Err(ReadlineError::Interrupted) => statement.clear(),
                Err(ReadlineError::Eof) => {
                    // From a pipe or a file the last statement may lack its `;`.
                    if !person && !statement.trim().is_empty() {
                        self.answer(runtime, &statement);
                    }
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        // A convenience: whoever may only read the data directory has none.
        let _ = editor.save_history(&history);
        Ok(())
    }

    /// Asks and shows; what goes wrong is told, and the next statement may be better.
    fn answer(&self, runtime: &Runtime, statement: &str) {
        let query = statement.trim().trim_end_matches(';');
        let result = runtime.block_on(self.query(query));
        if let Err(error) = result.and_then(|(schema, rows)| show(&schema, &rows, self.format.unwrap_or(Format::Table))) {
            eprintln!("error: {error:#}");
        }
    }
}

/// Whether a statement is `show tables`.
fn asks_for_tables(statement: &str) -> bool {
    let words = statement.trim().trim_end_matches(';').split_whitespace();
    words.map(str::to_lowercase).eq(["show", "tables"])
}

/// The names of tables as the rows of one.
fn list(tables: &[String]) -> anyhow::Result<(SchemaRef, Vec<RecordBatch>)> {
    let schema = SchemaRef::new(Schema::new(vec![Field::new("table_name", DataType::Utf8, false)]));
    let names: ArrayRef = Arc::new(StringArray::from_iter_values(tables));
    let rows = RecordBatch::try_new(Arc::clone(&schema), vec![names])?;
    Ok((schema, vec![rows]))
}

/// What DataFusion says, without its names for kinds of errors and for the only catalog there is.
fn told(error: &DataFusionError) -> String {
    let text = match error.find_root() {
        DataFusionError::SQL(syntax, _) => syntax.to_string(),
        root => root.message().into_owned(),
    };
    text.replace("datafusion.public.", "")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn show_tables_is_known_however_it_is_written() {
        for statement in ["show tables", "SHOW  Tables;", " show\ttables ;\n"] {
            assert!(asks_for_tables(statement), "{statement:?}");
        }
        for statement in ["show tables from x", "show", "select 1", ""] {
            assert!(!asks_for_tables(statement), "{statement:?}");
        }
    }

    #[test]
    fn errors_are_told_without_the_words_of_the_engine() {
        let plan = DataFusionError::Plan("table 'datafusion.public.ot' not found".to_owned());
        assert_eq!(told(&plan.context("planning")), "table 'ot' not found");
    }
}
