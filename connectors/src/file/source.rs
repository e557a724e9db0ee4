//! The configuration of the `file` source, and its plan: which files, which format, which schema. Called by the
//! planner. The invariant: everything that can be known of the files without reading their rows is settled here; the
//! only I/O is the listing of the folder and, for formats that carry a schema, the first file's own.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use afferent_engine::component::{BuildContext, PlanContext, Planned, Problem, Replay, SourceConfig, SourcePlan};
use afferent_engine::{Error, Source};
use afferent_formats::{CsvDecoder, Declaration, FileFormat, FileReader, FormatError, Limits, Policy, ReadOptions};
use arrow::datatypes::{DataType, SchemaRef};
use schemars::JsonSchema;
use serde::Deserialize;

use super::format::{CsvLayout, EXTENSIONS, by_extension};
use super::pace::Pace;
use super::reading::{FileSource, Found, Input, list};

/// Reads rows from files: JSON lines, CSV, Parquet or Arrow IPC. The files that `path` matches are read in the order
/// of their names and then the source ends; after a restart it goes on at the very row. Lines that cannot be read
/// are rejected with their bytes. The list of files must not change before the pipeline is done with it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct FileSourceConfig {
    /// The file, or a pattern such as `data/*.parquet` (`*`, `?`, `[..]`, `**`), seen from the pipeline file's folder.
    path: String,
    /// The format of the files. Without it the extension tells: `.jsonl`, `.ndjson`, `.csv`, `.parquet`, `.arrow`,
    /// `.arrows`, `.ipc`, `.feather`.
    format: Option<FileFormat>,
    /// Column names and types. JSON lines and CSV must have it; of Parquet and Arrow it selects columns and casts
    /// them, and without it the first file's own schema holds for all.
    schema: Option<Declaration>,
    /// The column that says when each row was recorded: a timestamp.
    event_time: Option<String>,
    /// How fast rows are emitted: all at once, as they were recorded, or some times faster. Counted by `event_time`
    /// from the first row after the start.
    #[serde(default)]
    pace: Pace,
    /// Most rows in one batch.
    #[serde(default = "default_batch_rows")]
    batch_rows: NonZeroUsize,
    /// How CSV files are laid out.
    #[serde(default)]
    csv: CsvLayout,
}

fn default_batch_rows() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(1023)
}

impl FileSourceConfig {
    /// The files, or what is wrong with the pattern.
    fn files(&self, base: &Path) -> Result<Vec<Found>, Problem> {
        let files = list(base, &self.path).map_err(|error| Problem::new("bad-value", "/path", error))?;
        if !files.is_empty() {
            return Ok(files);
        }
        let problem = Problem::new("no-such-file", "/path", format!("no file matches `{}`", self.path));
        let whole = base.join(&self.path);
        Err(if whole.is_dir() {
            problem.help(format!("it is a folder; write for example {}/*.parquet", self.path.trim_end_matches('/')))
        } else {
            problem.help(format!("looked for {}; relative paths start at the pipeline file's folder", whole.display()))
        })
    }

    /// The one format of all files.
    fn format(&self, files: &[Found]) -> Result<FileFormat, Problem> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        let mut format = by_extension(Path::new(&self.path));
        for file in files {
            let found = by_extension(&file.path);
            match (format, found) {
                (Some(known), Some(other)) if known != other => {
                    let problem = Problem::new(
                        "ambiguous-format",
                        "/path",
                        format!("`{}` matches files of several formats: {} and {}", self.path, known.name(), other.name()),
                    );
                    return Err(problem.help("narrow the pattern, or write `format`"));
                }
                _ => format = format.or(found),
            }
        }
        format.ok_or_else(|| {
            Problem::new("missing-format", "", format!("the extension of `{}` does not tell its format", self.path))
                .help(format!("write `format: json_lines`, `csv`, `parquet` or `arrow`; known extensions are {EXTENSIONS}"))
        })
    }

    /// The schema of every batch.
    fn schema(&self, format: FileFormat, files: &[Found]) -> Result<SchemaRef, Problem> {
        let declared = self.schema.as_ref().map(Declaration::to_arrow);
        match (format, declared) {
            (FileFormat::JsonLines | FileFormat::Csv, None) => {
                let problem = Problem::new("missing-schema", "", format!("{} files say nothing of types", format.name()));
                Err(problem.help(format!("write `schema`; `afferent infer-schema {}` makes one from the file", self.path)))
            }
            (FileFormat::JsonLines, Some(schema)) => Ok(schema),
            (FileFormat::Csv, Some(schema)) => {
                CsvDecoder::new(Arc::clone(&schema), self.csv.into(), Policy::default(), Limits::default())
                    .map_err(|error| Problem::new("bad-value", "/csv/delimiter", error.to_string()))?;
                Ok(schema)
            }
            (FileFormat::Parquet | FileFormat::Arrow, declared) => {
                // Without a file there is a problem already.
                let Some(first) = files.first() else {
                    return declared.ok_or_else(|| Problem::new("no-such-file", "/path", "there is no file to tell the schema"));
                };
                let reader = FileReader::open(&first.path, format, declared, self.batch_rows.get(), 0).map_err(|error| {
                    let place = if matches!(error, FormatError::SchemaMismatch { .. }) { "/schema" } else { "/path" };
                    Problem::new("unreadable-file", place, format!("{}: {}", first.name, Error::fatal(error)))
                })?;
                Ok(Arc::clone(reader.schema()))
            }
        }
    }

    /// The index of the event time's column.
    fn event_time(&self, schema: &SchemaRef) -> Result<Option<usize>, Problem> {
        let Some(name) = &self.event_time else {
            return match self.pace {
                Pace::Max => Ok(None),
                pace => Err(Problem::new(
                    "missing-event-time",
                    "/pace",
                    format!("a pace of {pace} needs to know when rows were recorded"),
                )
                .help("write `event_time` with the name of a timestamp column")),
            };
        };
        let Some((index, field)) = schema.column_with_name(name) else {
            let problem = Problem::new("unknown-column", "/event_time", format!("there is no column `{name}`"));
            let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            let near = names.iter().find(|known| strsim::osa_distance(name, known) <= 2);
            return Err(problem.help(match near {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("the columns are {}", names.join(", ")),
            }));
        };
        if !matches!(field.data_type(), DataType::Timestamp(..)) {
            let message = format!("`{name}` is {} and no timestamp", field.data_type());
            return Err(
                Problem::new("wrong-type", "/event_time", message).help("declare it in `schema`, for example as timestamp_ms")
            );
        }
        Ok(Some(index))
    }
}

impl SourceConfig for FileSourceConfig {
    const NAME: &'static str = "file";
    const EXAMPLE: &'static str =
        "file: { path: \"data/*.jsonl\", schema: { ts: timestamp_ms, ax: float32 }, event_time: ts, pace: realtime }";

    fn plan(self, context: &PlanContext) -> Planned<SourcePlan> {
        let mut problems = Vec::new();
        let files = self.files(&context.base).unwrap_or_else(|problem| {
            problems.push(problem);
            Vec::new()
        });
        let settled = self.format(&files).and_then(|format| {
            let schema = self.schema(format, &files)?;
            let event_time = self.event_time(&schema)?;
            Ok((format, schema, event_time))
        });
        let (format, schema, event_time) = match settled {
            Ok(settled) if problems.is_empty() => settled,
            Ok(_) => return Err(problems),
            Err(problem) => {
                // That a file is missing is said once.
                if problems.iter().all(|known| known.code != problem.code) {
                    problems.push(problem);
                }
                return Err(problems);
            }
        };
        let input = Arc::new(Input {
            base: context.base.clone(),
            pattern: self.path,
            format,
            schema: Arc::clone(&schema),
            options: ReadOptions { csv: self.csv.into(), ..ReadOptions::default() },
            batch_rows: self.batch_rows.get(),
            pace: match (self.pace, event_time) {
                (Pace::Times(factor), Some(column)) => Some((factor, column)),
                _ => None,
            },
        });
        Ok(SourcePlan {
            schema,
            replay: Replay::Exact,
            bounded: true,
            in_flight: None,
            moves: None,
            build: Arc::new(move |_: &BuildContext| -> afferent_engine::Result<Box<dyn Source>> {
                Ok(Box::new(FileSource::new(Arc::clone(&input))))
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use afferent_engine::metrics::Metrics;
    use afferent_engine::rejected::Given;
    use afferent_engine::{Class, Position, Pulled, Rejected};
    use afferent_formats::FileWriter;
    use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
    use arrow::datatypes::Int64Type;
    use tempfile::TempDir;
    use tokio::time::Instant;

    use super::*;

    fn plan(dir: &TempDir, config: &str) -> Planned<SourcePlan> {
        let context = PlanContext::at(dir.path(), "");
        serde_json::from_str::<FileSourceConfig>(config).unwrap().plan(&context)
    }

    fn source(dir: &TempDir, config: &str) -> Box<dyn Source> {
        let context = BuildContext {
            pipeline: "p".into(),
            stage: "s".into(),
            data_dir: dir.path().to_owned(),
            run: 1,
            metrics: Metrics::new().unwrap().stage("p", "s"),
        };
        let plan = plan(dir, config).unwrap_or_else(|problems| panic!("{problems:?}"));
        (plan.build)(&context).unwrap()
    }

    fn problems(dir: &TempDir, config: &str) -> Vec<(&'static str, String)> {
        let problems = plan(dir, config).err().unwrap_or_default();
        problems.into_iter().map(|problem| (problem.code, problem.path)).collect()
    }

    /// The numbers in column `n`, and the rejected lines, of one pull; nothing at the end.
    async fn pull(source: &mut dyn Source) -> Option<(Vec<i64>, Vec<Rejected>)> {
        let (batch, rejected) = match source.next().await.unwrap() {
            Pulled::End => return None,
            Pulled::Batch(batch) => (Some(batch), Vec::new()),
            Pulled::Mixed(batch, rejected) => (Some(batch), rejected),
            Pulled::Rejected(rejected) => (None, rejected),
        };
        let numbers = batch.map_or_else(Vec::new, |batch| {
            batch.records().column_by_name("n").unwrap().as_primitive::<Int64Type>().values().to_vec()
        });
        Some((numbers, rejected))
    }

    async fn drain(source: &mut dyn Source) -> (Vec<i64>, Vec<Rejected>) {
        let mut all = (Vec::new(), Vec::new());
        while let Some((numbers, rejected)) = pull(source).await {
            all.0.extend(numbers);
            all.1.extend(rejected);
        }
        all
    }

    /// Three files of JSON lines: 30 lines with bad and blank ones among them, none, and five.
    fn lines() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let text: String = (0..30)
            .map(|n| match n {
                3 | 17 | 29 => "{\"n\":\n".to_owned(),
                8 => "\n".to_owned(),
                _ => format!("{{\"n\":{n},\"ts\":{}}}\n", n * 100),
            })
            .collect();
        fs::write(dir.path().join("a.jsonl"), text).unwrap();
        fs::write(dir.path().join("b.jsonl"), "").unwrap();
        let text: String = (30..35).map(|n| format!("{{\"n\":{n},\"ts\":{}}}\n", n * 100)).collect();
        fs::write(dir.path().join("c.jsonl"), text).unwrap();
        fs::write(dir.path().join(".hidden.jsonl"), "{\"n\":99,\"ts\":0}").unwrap();
        dir
    }

    const LINES: &str = r#"{"path":"*.jsonl","schema":{"n":"int64","ts":"timestamp_ms"},"event_time":"ts","batch_rows":4"#;

    #[tokio::test]
    async fn files_are_read_in_order_and_bad_lines_rejected_in_place() {
        let dir = lines();
        let mut source = source(&dir, &format!("{LINES}}}"));
        source.open(None).await.unwrap();
        let (numbers, rejected) = drain(&mut *source).await;
        assert_eq!(numbers, (0..35).filter(|n| ![3, 8, 17, 29].contains(n)).collect::<Vec<i64>>());
        let places: Vec<&str> = rejected.iter().map(|rejected| rejected.position.as_str()).collect();
        assert_eq!(places, ["a.jsonl:4", "a.jsonl:18", "a.jsonl:30"]);
        assert_eq!(rejected[0].given, Given::Bytes(b"{\"n\":".to_vec()));
        assert!(matches!(source.next().await.unwrap(), Pulled::End), "the end stays the end");
    }

    #[tokio::test(start_paused = true)]
    async fn resumes_after_every_pull_paced_or_not() {
        let dir = lines();
        for pace in ["max", "10x"] {
            let config = format!("{LINES},\"pace\":\"{pace}\"}}");
            let mut whole = source(&dir, &config);
            whole.open(None).await.unwrap();
            let expected = drain(&mut *whole).await;
            for pulls in 0..40 {
                let mut first = source(&dir, &config);
                first.open(None).await.unwrap();
                let (mut numbers, mut rejected) = (Vec::new(), Vec::new());
                for _ in 0..pulls {
                    let Some(pulled) = pull(&mut *first).await else { break };
                    numbers.extend(pulled.0);
                    rejected.extend(pulled.1);
                }
                let mut second = source(&dir, &config);
                second.open(Some(&first.position())).await.unwrap();
                let rest = drain(&mut *second).await;
                numbers.extend(rest.0);
                rejected.extend(rest.1);
                assert_eq!((numbers, rejected), expected, "{pace}, after {pulls} pulls");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_recorded_pace_and_starts_at_once_wherever_it_resumes() {
        let dir = lines();
        let config = format!("{LINES},\"pace\":\"10x\"}}");
        let mut first = source(&dir, &config);
        first.open(None).await.unwrap();
        let start = Instant::now();
        assert_eq!(pull(&mut *first).await.unwrap().0, [0]);
        assert!(start.elapsed() < Duration::from_millis(5));
        assert_eq!(pull(&mut *first).await.unwrap().0, [1]);
        assert_eq!(pull(&mut *first).await.unwrap().0, [2], "rows are cut where the next is not yet due");
        let position = first.position();
        assert!((20..25).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());

        let mut second = source(&dir, &config);
        second.open(Some(&position)).await.unwrap();
        let start = Instant::now();
        assert_eq!(pull(&mut *second).await.unwrap().0, [4]);
        assert!(start.elapsed() < Duration::from_millis(5));
        drain(&mut *second).await;
        assert!((300..320).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_pull_may_be_dropped_at_any_time() {
        let dir = lines();
        let mut source = source(&dir, &format!("{LINES}}}"));
        source.open(None).await.unwrap();
        let mut numbers = Vec::<i64>::new();
        loop {
            let dropped = tokio::time::timeout(Duration::ZERO, source.next()).await;
            let pulled = match dropped {
                Ok(pulled) => pulled.unwrap(),
                Err(_) => source.next().await.unwrap(),
            };
            match pulled {
                Pulled::Batch(batch) | Pulled::Mixed(batch, _) => {
                    numbers.extend(batch.records().column(0).as_primitive::<Int64Type>().values().iter());
                }
                Pulled::Rejected(_) => {}
                Pulled::End => break,
            }
        }
        assert_eq!(numbers, (0..35).filter(|n| ![3, 8, 17, 29].contains(n)).collect::<Vec<i64>>());
    }

    #[tokio::test]
    async fn a_changed_list_of_files_is_noticed() {
        let dir = lines();
        let config = format!("{LINES}}}");
        let mut first = source(&dir, &config);
        first.open(None).await.unwrap();
        drain(&mut *first).await;
        let position: Position = first.position();
        fs::write(dir.path().join("aa.jsonl"), "").unwrap();
        let error = source(&dir, &config).open(Some(&position)).await.unwrap_err();
        assert_eq!(error.class(), Class::Fatal);
        assert!(error.to_string().contains("other files stand ahead"), "{error}");
        fs::remove_file(dir.path().join("c.jsonl")).unwrap();
        let error = source(&dir, &config).open(Some(&position)).await.unwrap_err();
        assert!(error.to_string().contains("c.jsonl: `*.jsonl` does not match it any more"), "{error}");
    }

    #[tokio::test]
    async fn columnar_files_bring_their_schema() {
        let dir = tempfile::tempdir().unwrap();
        let column = Arc::new(Int64Array::from(vec![1, 2, 3])) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
        for name in ["part-0.parquet", "part-1.parquet"] {
            let file = fs::File::create(dir.path().join(name)).unwrap();
            let mut writer = FileWriter::create(file, FileFormat::Parquet, batch.schema()).unwrap();
            writer.write(&batch).unwrap();
            writer.finish().unwrap();
        }
        let config = r#"{"path":"part-*.parquet"}"#;
        let planned = plan(&dir, config).map_err(|p| format!("{p:?}")).unwrap().schema;
        assert_eq!(planned.fields(), batch.schema().fields());
        let mut source = source(&dir, config);
        source.open(None).await.unwrap();
        assert_eq!(drain(&mut *source).await.0, [1, 2, 3, 1, 2, 3]);
        let other = r#"{"path":"part-*.parquet","schema":{"m":"int64!"}}"#;
        assert_eq!(problems(&dir, other), [("unreadable-file", "/schema".to_owned())]);
    }

    #[test]
    fn faults_are_found_while_planning() {
        let dir = lines();
        fs::write(dir.path().join("x.csv"), "n\n1\n").unwrap();
        fs::write(dir.path().join("x.parquet"), "no parquet").unwrap();
        for (config, code, path) in [
            (r#"{"path":"*.parquets"}"#, "no-such-file", "/path"),
            (r#"{"path":"a[.jsonl"}"#, "bad-value", "/path"),
            (r#"{"path":"x.*"}"#, "ambiguous-format", "/path"),
            (r#"{"path":"*.jsonl"}"#, "missing-schema", ""),
            (r#"{"path":"x.parquet"}"#, "unreadable-file", "/path"),
            (r#"{"path":"x.csv","schema":{"n":"int64"},"csv":{"delimiter":"é"}}"#, "bad-value", "/csv/delimiter"),
            (r#"{"path":"*.jsonl","schema":{"n":"int64"},"pace":"2x"}"#, "missing-event-time", "/pace"),
            (r#"{"path":"*.jsonl","schema":{"n":"int64"},"event_time":"n"}"#, "wrong-type", "/event_time"),
            (r#"{"path":"*.jsonl","schema":{"time":"timestamp_ms"},"event_time":"tiem"}"#, "unknown-column", "/event_time"),
        ] {
            let found = problems(&dir, config);
            assert!(found.contains(&(code, path.to_owned())), "{config}: {found:?}");
        }
        let config = r#"{"path":"*.jsonl","schema":{"time":"timestamp_ms"},"event_time":"tiem"}"#;
        let help = plan(&dir, config).err().unwrap().remove(0).help.unwrap();
        assert_eq!(help, "did you mean `time`?");
    }

    #[test]
    fn the_example_plans_where_its_files_are() {
        let stage: std::collections::BTreeMap<String, FileSourceConfig> =
            serde_saphyr::from_str(FileSourceConfig::EXAMPLE).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("data/a.jsonl"), "").unwrap();
        let context = PlanContext::at(dir.path(), "");
        let plan = stage["file"].clone().plan(&context).map_err(|p| format!("{p:?}")).unwrap();
        assert!(plan.bounded && plan.replay == Replay::Exact);
        assert!(serde_json::from_str::<FileSourceConfig>(r#"{"path":"a.csv","formt":"csv"}"#).is_err());
    }
}
