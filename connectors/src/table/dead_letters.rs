//! The table of rejected rows. The engine stores rejects with the epoch and moves them here later, so that
//! they pace no pipeline; one process has one writer, which all its pipelines share. Invariant: what
//! `append` returned for is in Delta for good, and once.

use std::path::{Path, PathBuf};

use afferent_engine::supervisor::DeadLetters;
use afferent_engine::{Error, Result, rejected};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;

use super::delta::Delta;
use super::schema::{conform, mapped};

/// Its name, which no sink may take.
pub const DEAD_LETTERS: &str = "dead_letters";

/// The writer of the table of rejected rows. Opened at the first reject, so that a pipeline without any has
/// no such table. Each append is a commit to Delta: rows should be collected before, to about one call a second.
pub struct DeadLetterTable {
    data_dir: PathBuf,
    open: Option<(Delta, SchemaRef)>,
}

impl DeadLetterTable {
    /// For the table below `data_dir`.
    pub fn new(data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned(), open: None }
    }

    async fn delta(&mut self) -> Result<&mut (Delta, SchemaRef)> {
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let schema = mapped(&rejected::schema()).map_err(|errors| {
                    let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
                    Error::fatal(errors.join(", "))
                })?;
                (Delta::open(&self.data_dir, DEAD_LETTERS, &schema).await?, schema)
            }
        };
        Ok(self.open.insert(open))
    }
}

#[async_trait]
impl DeadLetters for DeadLetterTable {
    async fn newest(&mut self, origin: &str) -> Result<u64> {
        self.delta().await?.0.version_of(&application(origin)).await
    }

    async fn append(&mut self, origin: &str, number: u64, rows: RecordBatch) -> Result<()> {
        let (delta, schema) = self.delta().await?;
        let rows = conform(&rows, schema).map_err(Error::fatal)?;
        let appended = delta.append(&application(origin), number, std::iter::once(Ok(rows))).await?;
        if appended && let Err(cause) = delta.maintain().await {
            tracing::warn!(%cause, "the table of dead letters could not be tidied; trying again later");
        }
        Ok(())
    }
}

/// The Delta application id under which an origin's numbers count.
fn application(origin: &str) -> String {
    format!("afferent/{DEAD_LETTERS}/{origin}")
}

#[cfg(test)]
mod tests {
    use afferent_engine::{Given, Rejected};
    use datafusion::prelude::SessionContext;

    use super::super::reader;
    use super::*;

    fn batch(pipeline: &str, reason: &str) -> RecordBatch {
        let given = Given::Bytes(vec![0xff, 0]);
        let row = Rejected { code: "malformed", reason: reason.into(), position: "t/0@1".into(), given };
        rejected::to_batch(pipeline, "readings", 1_700_000_000_000, &[row]).unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn each_number_is_stored_once_for_each_pipeline() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = DeadLetterTable::new(dir.path());
        table.append("p", 1, batch("p", "first")).await.unwrap();
        table.append("p", 1, batch("p", "first")).await.unwrap();
        table.append("q", 1, batch("q", "other")).await.unwrap();
        drop(table);
        let mut table = DeadLetterTable::new(dir.path());
        table.append("p", 1, batch("p", "first")).await.unwrap();
        table.append("p", 2, batch("p", "second")).await.unwrap();
        assert_eq!((table.newest("p").await.unwrap(), table.newest("r").await.unwrap()), (2, 0));
        let context = SessionContext::new();
        assert_eq!(reader::register_all(&context, dir.path()).await.unwrap(), [DEAD_LETTERS]);
        let query = "select pipeline, reason from dead_letters where code = 'malformed' order by pipeline, reason";
        let batches = context.sql(query).await.unwrap().collect().await.unwrap();
        let shown = arrow::util::pretty::pretty_format_batches(&batches).unwrap().to_string();
        let rows: Vec<&str> = shown.lines().filter(|line| line.starts_with("| ") && !line.contains("pipeline")).collect();
        assert_eq!(rows, ["| p        | first  |", "| p        | second |", "| q        | other  |"]);
    }
}
