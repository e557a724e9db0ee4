//! The configuration of the `file` sink, and its plan: lines appended to one file, or a folder of parts. Called by
//! the planner. The invariant: a format or a schema that cannot be written is refused here, before anything runs.

use std::path::Path;
use std::sync::Arc;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, Problem, SinkConfig, SinkPlan};
use afferent_engine::{Result, Sink};
use afferent_formats::{FileFormat, FileWriter};
use arrow::datatypes::{Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::Deserialize;

use super::append::{self, Append};
use super::format::{EXTENSIONS, by_extension};
use super::parts::{self, Parts};

/// Writes rows to files: JSON lines, CSV, Parquet or Arrow IPC. Each row is there exactly once, also after a crash.
///
/// JSON lines and CSV are appended to one file. What stands in it at a fresh start stays, and the rows follow it.
/// What was written after the last durable point is cut off again when the pipeline restarts after a crash: who
/// follows the file as it grows may see a row that is taken back and written again.
///
/// Parquet and Arrow, and any format when `path` ends with `/`, fill a folder: one part for every second with rows,
/// named `part-` and a number that grows. A part appears when it is complete and is never changed; while it is
/// being written its name begins with a dot. The folder must have no other writer.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct FileSinkConfig {
    /// The file, or the folder of parts, seen from the pipeline file's folder. Made, with its parents, when it is
    /// not there.
    path: String,
    /// The format. Without it the extension tells: `.jsonl`, `.ndjson`, `.csv`, `.parquet`, `.arrow`, `.arrows`, `.ipc`,
    /// `.feather`.
    format: Option<FileFormat>,
}

impl SinkConfig for FileSinkConfig {
    const NAME: &'static str = "file";
    const EXAMPLE: &'static str = "file: { path: \"out/results.jsonl\" }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        self.written_format().err().into_iter().collect()
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<SinkPlan> {
        let format = self.written_format().map_err(|problem| vec![problem])?;
        let schema = one_schema(inputs).map_err(|problem| vec![problem])?;
        FileWriter::create(Vec::<u8>::new(), format, Arc::clone(&schema)).map_err(|error| {
            let problem =
                Problem::new("unsupported-type", "", format!("cannot write {} to `{}`: {error}", format.name(), self.path));
            vec![problem.help("choose another `format`, or leave the column out with an sql stage")]
        })?;
        let (written, path) = (self.path.clone(), context.path(&self.path));
        let lines = matches!(format, FileFormat::JsonLines | FileFormat::Csv) && !self.path.ends_with('/');
        Ok(SinkPlan {
            delivery: Delivery::Once,
            commit_interval: if lines { append::COMMIT_INTERVAL } else { parts::COMMIT_INTERVAL },
            build: Arc::new(move |context: &BuildContext| -> Result<Box<dyn Sink>> {
                let schema = Arc::clone(&schema);
                let sink: Box<dyn Sink> = if lines {
                    Box::new(Append::new(written.clone(), path.clone(), format, schema)?)
                } else {
                    Box::new(Parts::new(path.clone(), context.run, format, schema))
                };
                Ok(sink)
            }),
        })
    }
}

impl FileSinkConfig {
    /// The format that is written, or that the extension tells.
    fn written_format(&self) -> std::result::Result<FileFormat, Problem> {
        if self.path.trim().is_empty() {
            return Err(Problem::new("bad-value", "/path", "the path is empty"));
        }
        self.format.or_else(|| by_extension(Path::new(&self.path))).ok_or_else(|| {
            let message = format!("the extension of `{}` does not tell its format", self.path);
            let help = format!("write `format: json_lines`, `csv`, `parquet` or `arrow`; known extensions are {EXTENSIONS}");
            Problem::new("missing-format", "", message).help(help)
        })
    }
}

/// The schema that all inputs have; a column may be null where it may be in one of them.
fn one_schema(inputs: &[Input]) -> std::result::Result<SchemaRef, Problem> {
    let Some((first, others)) = inputs.split_first() else {
        return Err(Problem::new("missing-input", "", "nothing is written to this file"));
    };
    let mut fields: Vec<Field> = first.schema.fields().iter().map(|field| field.as_ref().clone()).collect();
    for other in others {
        let same = fields.len() == other.schema.fields().len()
            && fields.iter().zip(other.schema.fields()).all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
        if !same {
            let message =
                format!("the inputs `{}` and `{}` have different columns, and a file has one schema", first.name, other.name);
            return Err(Problem::new("schema-mismatch", "", message)
                .help("write them to two files, or make them alike with an sql stage"));
        }
        for (field, another) in fields.iter_mut().zip(other.schema.fields()) {
            field.set_nullable(field.is_nullable() || another.is_nullable());
        }
    }
    Ok(Arc::new(Schema::new(fields)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use arrow::datatypes::DataType;

    use super::*;

    fn input(name: &str, column: &str, nullable: bool) -> Input {
        Input { name: name.into(), schema: Arc::new(Schema::new(vec![Field::new(column, DataType::Int64, nullable)])) }
    }

    fn plan(config: &str, inputs: &[Input]) -> Planned<SinkPlan> {
        serde_json::from_str::<FileSinkConfig>(config).unwrap().plan(inputs, &PlanContext::default())
    }

    #[test]
    fn the_example_plans() {
        let stage: std::collections::BTreeMap<String, FileSinkConfig> = serde_saphyr::from_str(FileSinkConfig::EXAMPLE).unwrap();
        let plan =
            stage["file"].clone().plan(&[input("a", "n", true)], &PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        assert_eq!(plan.delivery, Delivery::Once);
    }

    #[test]
    fn lines_are_appended_often_and_parts_made_seldom() {
        for (config, interval) in [
            (r#"{"path":"a.csv"}"#, 50),
            (r#"{"path":"a/","format":"csv"}"#, 1000),
            (r#"{"path":"a.parquet"}"#, 1000),
            (r#"{"path":"a","format":"arrow"}"#, 1000),
        ] {
            let plan = plan(config, &[input("a", "n", true)]).map_err(|p| format!("{p:?}")).unwrap();
            assert_eq!(plan.commit_interval, Duration::from_millis(interval), "{config}");
        }
    }

    #[test]
    fn faults_are_found_while_planning() {
        let one = [input("a", "n", false)];
        for (config, code) in [
            (r#"{"path":""}"#, "bad-value"),
            (r#"{"path":"out/"}"#, "missing-format"),
            (r#"{"path":"a.json"}"#, "missing-format"),
        ] {
            assert_eq!(plan(config, &one).err().unwrap()[0].code, code, "{config}");
        }
        let two = [input("a", "n", false), input("b", "m", false)];
        assert_eq!(plan(r#"{"path":"a.csv"}"#, &two).err().unwrap()[0].code, "schema-mismatch");
        assert!(serde_json::from_str::<FileSinkConfig>(r#"{"path":"a.csv","fromat":"csv"}"#).is_err());
    }

    #[test]
    fn a_column_may_be_null_where_one_input_allows_it() {
        let inputs = [input("a", "n", false), input("b", "n", true)];
        assert!(one_schema(&inputs).unwrap().field(0).is_nullable());
        assert!(!one_schema(&inputs[..1]).unwrap().field(0).is_nullable());
    }
}
