//! Tables as SQL sees them: what Delta has, and behind it the tail. `afferent sql` and the gateway register
//! them, in the pipeline's process or in another one, while it writes. Invariant: a stored row is seen once.
//! For that the tail is read first: what moves to Delta meanwhile is recognised by its epoch and left out.
//!
//! The tail also shows rows that are fsynced but whose epoch is not stored yet; after a crash they are made
//! anew from the source.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use afferent_engine::{Class, Error, Result};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::catalog::TableProvider;
use datafusion::common::TableReference;
use datafusion::datasource::MemTable;
use datafusion::prelude::SessionContext;

use super::delta::{load, table_dir, tail_dir, transaction_version};
use super::schema::conform;
use super::tail::{Epochs, TailEpoch};

/// How often a read is begun anew when files were tidied away under it.
const ATTEMPTS: usize = 3;

/// A table at one moment.
#[derive(Debug)]
pub struct TableSnapshot {
    /// Its columns.
    pub schema: SchemaRef,
    /// What Delta has; none before the table is made.
    pub delta: Option<Arc<dyn TableProvider>>,
    /// What only the tail has, in that schema.
    pub tail: Vec<RecordBatch>,
}

impl TableSnapshot {
    /// Both as one table for the queries of `context`.
    ///
    /// # Errors
    /// Fatal when DataFusion refuses the parts, which would be a fault of this module.
    pub fn into_provider(self, context: &SessionContext) -> Result<Arc<dyn TableProvider>> {
        let Self { schema, delta, tail } = self;
        match delta {
            Some(delta) if tail.is_empty() => Ok(delta),
            delta => {
                let tail = MemTable::try_new(schema, vec![tail]).map_err(Error::fatal)?;
                let tail: Arc<dyn TableProvider> = Arc::new(tail);
                let Some(delta) = delta else { return Ok(tail) };
                let tail = context.read_table(tail).map_err(Error::fatal)?;
                let both = context.read_table(delta).and_then(|delta| delta.union(tail)).map_err(Error::fatal)?;
                Ok(both.into_view())
            }
        }
    }
}

/// The names of the tables below a data directory, in order.
///
/// # Errors
/// Retry when the folder cannot be read.
pub fn names(data_dir: &Path) -> Result<Vec<String>> {
    let dir = data_dir.join("tables");
    let failed = |e: io::Error| Error::retry(format!("listing the tables in {}: {e}", dir.display()));
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        // Made, and not only begun.
        let made = std::fs::read_dir(entry.path().join("_delta_log"))
            .is_ok_and(|log| log.flatten().any(|file| file.path().extension().is_some_and(|end| end == "json")));
        if made && let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The table as it is now.
///
/// # Errors
/// Fatal when there is no such table; retry for trouble with the disk.
pub async fn snapshot(data_dir: &Path, name: &str) -> Result<TableSnapshot> {
    let mut attempt = 1;
    loop {
        match read(data_dir, name).await {
            Err(error) if error.class() == Class::Retry && attempt < ATTEMPTS => attempt += 1,
            result => return result.map_err(|error| error.context(format!("reading the table `{name}`"))),
        }
    }
}

/// Registers every table under its name, in place of what had the name. Returns the names.
///
/// # Errors
/// As [`snapshot`].
pub async fn register_all(context: &SessionContext, data_dir: &Path) -> Result<Vec<String>> {
    let names = names(data_dir)?;
    for name in &names {
        let provider = snapshot(data_dir, name).await?.into_provider(context)?;
        let reference = TableReference::bare(name.as_str());
        context.deregister_table(reference.clone()).map_err(Error::fatal)?;
        context.register_table(reference, provider).map_err(Error::fatal)?;
    }
    Ok(names)
}

async fn read(data_dir: &Path, name: &str) -> Result<TableSnapshot> {
    let (dir, folder) = (table_dir(data_dir, name), tail_dir(data_dir, name));
    let epochs = tokio::task::spawn_blocking(move || Epochs::visible(&folder)?.collect::<Result<Vec<TailEpoch>>>());
    let epochs = epochs.await.map_err(Error::fatal)??;
    let Some(table) = load(&dir).await? else {
        return without_delta(name, &epochs);
    };
    let delta: Arc<dyn TableProvider> = table.table_provider().await.map_err(Error::retry)?;
    let schema = delta.schema();
    let mut versions: HashMap<Arc<str>, u64> = HashMap::new();
    let mut tail = Vec::new();
    for epoch in epochs {
        let version = match versions.get(&epoch.owner) {
            Some(version) => *version,
            None => {
                let version = transaction_version(&table, &dir, &epoch.owner).await?;
                versions.insert(Arc::clone(&epoch.owner), version);
                version
            }
        };
        if epoch.epoch > version {
            for batch in epoch.batches()? {
                tail.push(conform(&batch, &schema).map_err(Error::fatal)?);
            }
        }
    }
    Ok(TableSnapshot { schema, delta: Some(delta), tail })
}

/// A tail whose table is gone: its rows are still there.
fn without_delta(name: &str, epochs: &[TailEpoch]) -> Result<TableSnapshot> {
    let mut tail = Vec::new();
    for epoch in epochs {
        tail.extend(epoch.batches()?);
    }
    let Some(newest) = tail.last() else {
        return Err(Error::fatal(format!("there is no table `{name}`")));
    };
    let schema = newest.schema();
    let tail = tail.iter().map(|batch| conform(batch, &schema).map_err(Error::fatal)).collect::<Result<_>>()?;
    Ok(TableSnapshot { schema, delta: None, tail })
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray, StringArray, TimestampMillisecondArray};
    use arrow::datatypes::Int64Type;

    use super::super::delta::Delta;
    use super::super::schema::mapped;
    use super::super::tail::Tail;
    use super::*;

    fn rows(names: &[&str]) -> RecordBatch {
        let times = vec![1_700_000_000_000; names.len()];
        RecordBatch::try_from_iter([
            ("name", Arc::new(StringArray::from(names.to_vec())) as ArrayRef),
            ("at", Arc::new(TimestampMillisecondArray::from(times).with_timezone("UTC")) as ArrayRef),
        ])
        .unwrap()
    }

    async fn count(data_dir: &Path) -> i64 {
        let context = SessionContext::new();
        register_all(&context, data_dir).await.unwrap();
        let query = "select count(*) from t where name like 'n%'";
        let batches = context.sql(query).await.unwrap().collect().await.unwrap();
        batches[0].column(0).as_primitive::<Int64Type>().value(0)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_tail_counts_only_where_delta_ends() {
        let dir = tempfile::tempdir().unwrap();
        let schema = mapped(&rows(&[]).schema()).unwrap();
        let mut delta = Delta::open(dir.path(), "t", &schema).await.unwrap();
        assert_eq!(count(dir.path()).await, 0);
        let mut tail = Tail::recover(&tail_dir(dir.path(), "t"), "w/1", None).unwrap();
        for epoch in 1..=3 {
            tail.append(epoch, &[conform(&rows(&["n1", "n2"]), &schema).unwrap()]).unwrap();
        }
        assert_eq!(count(dir.path()).await, 6);
        // Delta has the first two epochs, and the tail still has them, too.
        delta.append("w/1", 2, [Ok(rows(&["n1", "n2"])), Ok(rows(&["n1", "n2"]))].into_iter()).await.unwrap();
        assert_eq!(count(dir.path()).await, 6);
        // Another writer's epochs are numbered on their own.
        delta.append("w/2", 3, [Ok(rows(&["n3"]))].into_iter()).await.unwrap();
        assert_eq!(count(dir.path()).await, 7);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tables_are_named_and_missing_ones_said() {
        let dir = tempfile::tempdir().unwrap();
        assert!(names(dir.path()).unwrap().is_empty());
        std::fs::create_dir_all(dir.path().join("tables/begun/_delta_log")).unwrap();
        let schema = mapped(&rows(&[]).schema()).unwrap();
        Delta::open(dir.path(), "b", &schema).await.unwrap();
        Delta::open(dir.path(), "a", &schema).await.unwrap();
        assert_eq!(names(dir.path()).unwrap(), ["a", "b"]);
        let error = snapshot(dir.path(), "begun").await.unwrap_err();
        assert!(error.to_string().contains("there is no table `begun`"), "{error}");
        let context = SessionContext::new();
        register_all(&context, dir.path()).await.unwrap();
        assert_eq!(register_all(&context, dir.path()).await.unwrap(), ["a", "b"]);
    }
}
