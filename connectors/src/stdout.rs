//! The `stdout` sink: rows for people and for pipes. The engine calls it. The invariant: nothing of an epoch is still
//! in a buffer of ours when the epoch is prepared; and no value can steer the terminal.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, Problem, SinkConfig, SinkPlan};
use afferent_engine::{Batch, Epoch, Error, Prepared, Rejected, Result, Sink};
use afferent_formats::{Encoder, Format};
use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

const COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes that are collected before they are printed.
const BUFFER: usize = 64 << 10;

/// Rows of a table between two headers: about a screen.
const ROWS_PER_HEADER: usize = 40;

/// Characters of a cell; longer values are cut.
const WIDEST: usize = 48;

/// Prints rows: an aligned table when standard output is a terminal, JSON lines otherwise.
///
/// What is printed cannot be taken back: after a crash, the rows since the last durable point are printed again.
/// When the reader at the other end of a pipe goes away, the pipeline ends.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct StdoutConfig {
    /// How rows are printed.
    #[serde(default)]
    format: Layout,
}

/// How rows are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "StdoutFormat")]
enum Layout {
    /// A table on a terminal, JSON lines elsewhere.
    #[default]
    Auto,
    /// Aligned columns with a header; long values are cut.
    Table,
    /// One JSON object a line; nulls are left out.
    JsonLines,
}

impl SinkConfig for StdoutConfig {
    const NAME: &'static str = "stdout";
    const EXAMPLE: &'static str = "stdout: { format: json_lines }";

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<SinkPlan> {
        let mut problems = Vec::new();
        for input in inputs {
            // A table has a form for every type, JSON has not.
            if let (Layout::Auto | Layout::JsonLines, Err(error)) =
                (self.format, Encoder::new(Format::Json, Arc::clone(&input.schema)))
            {
                let message = format!("cannot print the rows of `{}` as JSON: {error}", input.name);
                problems.push(Problem::new("unsupported-type", "/format", message).help("write `format: table`"));
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let inputs = inputs.to_vec();
        Ok(SinkPlan {
            delivery: Delivery::AtLeastOnce("printed lines cannot be taken back".to_owned()),
            commit_interval: COMMIT_INTERVAL,
            build: Arc::new(move |_: &BuildContext| -> Result<Box<dyn Sink>> {
                let table = match self.format {
                    Layout::Auto => io::stdout().is_terminal(),
                    Layout::Table => true,
                    Layout::JsonLines => false,
                };
                let form = if table { Form::Table(Table::new(&inputs)) } else { Form::json(&inputs)? };
                Ok(Box::new(Stdout { form, pending: Vec::new(), output: Arc::new(Mutex::new(io::stdout())) }))
            }),
        })
    }
}

/// How rows become text.
enum Form {
    Table(Table),
    /// An encoder for each input.
    Json(Vec<Encoder>),
}

impl Form {
    fn json(inputs: &[Input]) -> Result<Self> {
        let encoders: std::result::Result<Vec<Encoder>, _> =
            inputs.iter().map(|input| Encoder::new(Format::Json, Arc::clone(&input.schema))).collect();
        Ok(Form::Json(encoders.map_err(Error::fatal)?))
    }

    /// Appends the text of a batch.
    fn print(&mut self, input: usize, batch: &RecordBatch, text: &mut Vec<u8>) -> Result<()> {
        match self {
            Form::Table(table) => table.print(input, batch, text).map_err(Error::fatal),
            Form::Json(encoders) => {
                let encoder = encoders.get(input).ok_or_else(|| Error::fatal(format!("there is no input number {input}")))?;
                let encoded = encoder.encode(batch).map_err(Error::fatal)?;
                for line in encoded.payloads.iter().flatten() {
                    text.extend_from_slice(line);
                    text.push(b'\n');
                }
                Ok(())
            }
        }
    }
}

/// A table without an end: the columns of an input only ever grow, and the header comes again with every screen.
struct Table {
    /// Names of the inputs; shown when there are several.
    names: Vec<String>,
    /// The input whose header is above the next row.
    shown: Option<usize>,
    /// For each input the columns as wide as anything printed of them so far.
    columns: Vec<Vec<Width>>,
    rows_since_header: usize,
}

/// How wide a column is, in characters.
#[derive(Clone, Copy, Default)]
struct Width {
    /// All of a cell.
    cell: usize,
    /// Of a number the part behind the point, with it: points stand below each other.
    fraction: usize,
}

impl Table {
    fn new(inputs: &[Input]) -> Self {
        let names = inputs.iter().map(|input| input.name.clone()).collect();
        Self { names, shown: None, columns: vec![Vec::new(); inputs.len()], rows_since_header: 0 }
    }

    fn print(&mut self, input: usize, batch: &RecordBatch, text: &mut Vec<u8>) -> std::result::Result<(), ArrowError> {
        let options = FormatOptions::default().with_display_error(true).with_null("null");
        let schema = batch.schema();
        let widths = self.columns.get_mut(input);
        let widths = widths.ok_or_else(|| ArrowError::InvalidArgumentError(format!("there is no input number {input}")))?;
        widths.resize(batch.num_columns(), Width::default());
        let mut columns: Vec<Vec<String>> = Vec::with_capacity(batch.num_columns());
        for ((field, array), width) in schema.fields().iter().zip(batch.columns()).zip(&mut *widths) {
            let formatter = ArrayFormatter::try_new(array.as_ref(), &options)?;
            let mut cells: Vec<String> = (0..batch.num_rows()).map(|row| cell(&formatter.value(row).to_string())).collect();
            if field.data_type().is_floating() {
                width.fraction = cells.iter().map(|cell| fraction(cell)).max().unwrap_or(0).max(width.fraction);
                for cell in &mut cells {
                    let missing = width.fraction - fraction(cell);
                    cell.push_str(&" ".repeat(missing));
                }
            }
            cells.insert(0, cell(field.name()));
            let widest = cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0);
            width.cell = width.cell.max(widest);
            columns.push(cells);
        }
        if self.shown != Some(input) {
            self.shown = Some(input);
            self.rows_since_header = ROWS_PER_HEADER;
        }
        let numeric = schema.fields().iter().map(|field| field.data_type().is_numeric());
        let layout: Vec<(usize, bool)> = widths.iter().map(|width| width.cell).zip(numeric).collect();
        let name = self.names.get(input).filter(|_| self.names.len() > 1);
        for row in 1..=batch.num_rows() {
            if self.rows_since_header >= ROWS_PER_HEADER {
                if let Some(name) = name {
                    text.extend_from_slice(format!("\n{name}\n").as_bytes());
                }
                line(columns.iter().map(|cells| cells[0].as_str()), &layout, text);
                let rules: Vec<String> = layout.iter().map(|(width, _)| "-".repeat(*width)).collect();
                line(rules.iter().map(String::as_str), &layout, text);
                self.rows_since_header = 0;
            }
            line(columns.iter().map(|cells| cells[row].as_str()), &layout, text);
            self.rows_since_header += 1;
        }
        Ok(())
    }
}

/// Characters of a number from its point on; an exponent counts.
fn fraction(number: &str) -> usize {
    number.find('.').map_or(0, |point| number[point..].chars().count())
}

/// Prints cells, each padded to its width and aligned at the right where that is said.
fn line<'a>(cells: impl Iterator<Item = &'a str>, layout: &[(usize, bool)], text: &mut Vec<u8>) {
    let mut line = String::new();
    for (number, (cell, (width, right))) in cells.zip(layout).enumerate() {
        let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
        let (before, after) = if *right { (padding.as_str(), "") } else { ("", padding.as_str()) };
        if number > 0 {
            line.push_str("  ");
        }
        line.push_str(before);
        line.push_str(cell);
        line.push_str(after);
    }
    text.extend_from_slice(line.trim_end().as_bytes());
    text.push(b'\n');
}

/// A value on one line, cut to a bearable width. What a sensor sends must not steer the terminal of who looks at it.
fn cell(value: &str) -> String {
    let mut characters = value.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character });
    let mut cell: String = characters.by_ref().take(WIDEST).collect();
    if characters.next().is_some() {
        cell.pop();
        cell.push('…');
    }
    cell
}

/// The running sink.
struct Stdout<W> {
    form: Form,
    /// Text that is not printed yet.
    pending: Vec<u8>,
    output: Arc<Mutex<W>>,
}

impl<W: Write + Send + 'static> Stdout<W> {
    /// Prints what is pending, where a slow reader holds up nobody else.
    async fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (text, output) = (std::mem::take(&mut self.pending), Arc::clone(&self.output));
        let printed = spawn_blocking(move || {
            let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
            output.write_all(&text).and_then(|()| output.flush())
        });
        // Some of it may be out already: there is no second try.
        printed.await.map_err(Error::fatal)?.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Error::fatal("the reader of standard output has gone away"),
            _ => Error::fatal(error).context("printing to standard output"),
        })
    }
}

#[async_trait]
impl<W: Write + Send + 'static> Sink for Stdout<W> {
    async fn open(&mut self, _: Option<(Epoch, &Prepared)>) -> Result<()> {
        Ok(())
    }

    async fn write(&mut self, input: usize, batch: Batch) -> Result<Vec<Rejected>> {
        self.form.print(input, batch.records(), &mut self.pending)?;
        if self.pending.len() >= BUFFER {
            self.flush().await?;
        }
        Ok(Vec::new())
    }

    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        self.flush().await?;
        Ok((Prepared::Null, Vec::new()))
    }

    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        Ok(())
    }

    fn commit_interval(&self) -> Duration {
        COMMIT_INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::Class;
    use arrow::array::{ArrayRef, Float64Array, StringArray};

    use super::*;

    fn batch(texts: &[Option<&str>]) -> RecordBatch {
        let numbers: Vec<f64> = (0..texts.len()).map(|row| row as f64 * 10.5).collect();
        let texts = Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
        let numbers = Arc::new(Float64Array::from(numbers)) as ArrayRef;
        RecordBatch::try_from_iter_with_nullable([("device", texts, true), ("value", numbers, false)]).unwrap()
    }

    fn inputs(names: &[&str]) -> Vec<Input> {
        names.iter().map(|name| Input { name: (*name).to_owned(), schema: batch(&[]).schema() }).collect()
    }

    fn table(table: &mut Table, input: usize, texts: &[Option<&str>]) -> String {
        let mut text = Vec::new();
        table.print(input, &batch(texts), &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn columns_are_aligned_across_batches_and_only_a_new_screen_brings_a_header() {
        let mut growing = Table::new(&inputs(&["a"]));
        let text = table(&mut growing, 0, &[Some("pump"), None]);
        assert_eq!(text, "device  value\n------  -----\npump      0.0\nnull     10.5\n");
        assert_eq!(table(&mut growing, 0, &[Some("fan")]), "fan       0.0\n");
        assert_eq!(table(&mut growing, 0, &[Some("compressor")]), "compressor    0.0\n", "growth brings no header");
        assert_eq!(table(&mut growing, 0, &[Some("fan")]), "fan           0.0\n", "and what has grown stays");
        let many = table(&mut growing, 0, &[Some("x"); 100]);
        assert_eq!(many.matches("device").count(), 2, "one header for every screen: after 35 rows and after 75");
        assert!(many.contains("device       value\n----------  ------\n"), "it has the widths of now: {many}");
    }

    #[test]
    fn points_of_floats_stand_below_each_other_whatever_came_before() {
        let mut points = Table::new(&inputs(&["a"]));
        let print = |points: &mut Table, values: &[f64]| {
            let values = Arc::new(Float64Array::from(values.to_vec())) as ArrayRef;
            let mut text = Vec::new();
            points.print(0, &RecordBatch::try_from_iter([("v", values)]).unwrap(), &mut text).unwrap();
            String::from_utf8(text).unwrap()
        };
        assert_eq!(print(&mut points, &[1.25, -20.5, f64::NAN]), "     v\n------\n  1.25\n-20.5\nNaN\n");
        assert_eq!(print(&mut points, &[7.0]), "  7.0\n", "a later batch keeps the place of the point");
    }

    #[test]
    fn each_input_keeps_its_widths() {
        let mut both = Table::new(&inputs(&["a", "b"]));
        table(&mut both, 0, &[Some("compressor")]);
        assert!(table(&mut both, 1, &[Some("x")]).ends_with("\nx         0.0\n"));
        assert!(table(&mut both, 0, &[Some("x")]).ends_with("\nx             0.0\n"));
    }

    #[test]
    fn each_of_several_inputs_has_its_header_with_its_name() {
        let mut both = Table::new(&inputs(&["a", "b"]));
        assert!(table(&mut both, 0, &[Some("x")]).starts_with("\na\ndevice"));
        assert!(table(&mut both, 1, &[Some("x")]).starts_with("\nb\ndevice"));
        assert_eq!(table(&mut both, 1, &[Some("y")]).lines().count(), 1);
        assert_eq!(table(&mut both, 0, &[]), "", "no header without rows");
    }

    #[test]
    fn a_value_cannot_steer_the_terminal_or_break_the_line() {
        let text = table(&mut Table::new(&inputs(&["a"])), 0, &[Some("\u{1b}[2J\n\u{9b}A")]);
        assert_eq!(text.lines().count(), 3);
        assert!(!text.contains(['\u{1b}', '\u{9b}']), "{text:?}");
        let long = cell(&"é".repeat(500));
        assert!(long.chars().count() == WIDEST && long.ends_with('…'));
        assert_eq!(cell(&"é".repeat(WIDEST)), "é".repeat(WIDEST));
    }

    fn json<W: Write + Send + 'static>(output: W) -> Stdout<W> {
        Stdout { form: Form::json(&inputs(&["a"])).unwrap(), pending: Vec::new(), output: Arc::new(Mutex::new(output)) }
    }

    #[tokio::test]
    async fn everything_is_out_when_an_epoch_is_prepared() {
        let mut sink = json(Vec::<u8>::new());
        sink.open(None).await.unwrap();
        sink.write(0, Batch::new(batch(&[Some("pump"), None]))).await.unwrap();
        sink.prepare(Epoch::start(1).next()).await.unwrap();
        let printed = sink.output.lock().unwrap().clone();
        assert_eq!(String::from_utf8(printed).unwrap(), "{\"device\":\"pump\",\"value\":0.0}\n{\"value\":10.5}\n");
    }

    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_closed_pipe_ends_the_pipeline_in_plain_words() {
        let mut sink = json(Closed);
        sink.write(0, Batch::new(batch(&[None]))).await.unwrap();
        let error = sink.prepare(Epoch::start(1).next()).await.unwrap_err();
        assert_eq!(error.class(), Class::Fatal);
        assert_eq!(error.to_string(), "the reader of standard output has gone away");
    }

    #[test]
    fn the_example_plans_and_what_is_not_known_is_refused() {
        let stage: std::collections::BTreeMap<String, StdoutConfig> = serde_saphyr::from_str(StdoutConfig::EXAMPLE).unwrap();
        let plan = stage["stdout"].clone().plan(&inputs(&["a"]), &PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        assert!(matches!(plan.delivery, Delivery::AtLeastOnce(_)));
        assert!(serde_json::from_str::<StdoutConfig>("{}").is_ok());
        assert!(serde_json::from_str::<StdoutConfig>(r#"{"format":"csv"}"#).is_err());
    }
}
