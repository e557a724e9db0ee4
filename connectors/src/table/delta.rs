//! The Delta side of a table: opened or made, appended to with a transaction id, kept small. The sink and
//! the dead letters append through it, one at a time. Invariant: an append of a writer's version takes
//! effect once, however often it is tried, and is durable when the call returns.
//!
//! Delta itself does not refuse a repeated transaction id, so the newest one is compared before each append;
//! a commit that somebody else overtook fails and is compared again. Log checkpoints, the clean-up of the
//! log and compaction keep the cost of a commit from growing with their number. History is therefore short:
//! about [`KEEP_VERSIONS`] versions, and an hour for replaced files, which queries may still be reading.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use afferent_engine::{Error, Result, durable};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use deltalake_core::kernel::engine::arrow_conversion::TryIntoKernel;
use deltalake_core::kernel::transaction::CommitProperties;
use deltalake_core::kernel::{StructField, StructType, Transaction};
use deltalake_core::operations::vacuum::VacuumMode;
use deltalake_core::protocol::SaveMode;
use deltalake_core::writer::{DeltaWriter, RecordBatchWriter};
use deltalake_core::{DeltaTable, DeltaTableBuilder, DeltaTableError, TableProperty, checkpoints};
use url::Url;

use super::schema::conform;
use super::store::{DurableStore, remove_staged};

/// Versions between two checkpoints of the log.
const CHECKPOINT_EVERY: u64 = 10;
/// Versions that stay in the log at least.
const KEEP_VERSIONS: u64 = 100;
/// New files that make a compaction worth while.
const COMPACT_FILES: usize = 50;
/// Compaction merges small files into files of the first size, enough of these into one of the second, and so on:
/// each row is rewritten once a tier, instead of all rows each time.
const TIERS: [u64; 3] = [2 << 20, 16 << 20, 128 << 20];
/// Files of one tier that make merging them into the next worth while.
const TIER_FILES: usize = 8;
/// How long replaced files stay for queries that began before.
const KEEP_REPLACED: &str = "interval 1 hours";

/// Where the Delta table lies.
pub fn table_dir(data_dir: &Path, name: &str) -> PathBuf {
    data_dir.join("tables").join(name)
}

/// Where its tail lies.
pub fn tail_dir(data_dir: &Path, name: &str) -> PathBuf {
    data_dir.join("tails").join(name)
}

/// A Delta table with its one writer.
pub struct Delta {
    table: DeltaTable,
    dir: PathBuf,
    /// Newest version of each writer that was asked for.
    versions: HashMap<String, u64>,
    /// The last call failed on the way: what is in memory may be behind.
    stale: bool,
    /// Version at the last maintenance.
    maintained: u64,
    /// Files that the last compaction left.
    settled: usize,
    /// Held for as long as anybody may write.
    _lock: File,
}

impl Delta {
    /// Opens the table, or makes it. Columns of `schema` that it lacks are added.
    ///
    /// # Errors
    /// Retry while somebody else writes the table, and for trouble with the disk. Fatal when a column has
    /// another type there.
    pub async fn open(data_dir: &Path, name: &str, schema: &SchemaRef) -> Result<Self> {
        let (dir, lock) = prepare(data_dir, name).await?;
        let wanted: StructType = Arc::clone(schema).try_into_kernel().map_err(Error::fatal)?;
        let table = match load(&dir).await? {
            Some(table) => with_columns(table, name, &dir, &wanted).await?,
            None => builder(&dir)?
                .create()
                .with_table_name(name)
                .with_columns(wanted.fields().cloned())
                .with_configuration_property(TableProperty::CheckpointInterval, Some(CHECKPOINT_EVERY.to_string()))
                .with_configuration_property(TableProperty::DeletedFileRetentionDuration, Some(KEEP_REPLACED))
                .with_save_mode(SaveMode::Ignore)
                .await
                .map_err(|e| failed("creating", &dir, e))?,
        };
        let version = table.version().unwrap_or(0);
        let maintained = version - version % CHECKPOINT_EVERY;
        Ok(Self { table, dir, versions: HashMap::new(), stale: false, maintained, settled: 0, _lock: lock })
    }

    /// The newest version of `app` that the table has; 0 when none.
    ///
    /// # Errors
    /// Retry when the log cannot be read.
    pub async fn version_of(&mut self, app: &str) -> Result<u64> {
        if self.stale {
            self.reload().await?;
        }
        if let Some(version) = self.versions.get(app) {
            return Ok(*version);
        }
        let version = transaction_version(&self.table, &self.dir, app).await?;
        self.versions.insert(app.to_owned(), version);
        Ok(version)
    }

    /// Commits the batches as `version` of `app`, unless the table has that version or a later one. Returns
    /// whether anything was committed; no rows are no commit.
    ///
    /// # Errors
    /// Retry for trouble with the disk and when somebody else committed meanwhile; the next call finds out
    /// what became of this one.
    pub async fn append(
        &mut self,
        app: &str,
        version: u64,
        batches: impl Iterator<Item = Result<RecordBatch>> + Send,
    ) -> Result<bool> {
        if self.version_of(app).await? >= version {
            return Ok(false);
        }
        self.stale = true;
        let committed = self.commit(app, version, batches).await?;
        self.stale = false;
        if committed {
            self.versions.insert(app.to_owned(), version);
        }
        Ok(committed)
    }

    async fn commit(
        &mut self,
        app: &str,
        version: u64,
        batches: impl Iterator<Item = Result<RecordBatch>> + Send,
    ) -> Result<bool> {
        let transaction = Transaction::new(app, i64::try_from(version).map_err(Error::fatal)?);
        // No retry within Delta: somebody else's commit may have been this very one.
        let properties = quiet().with_max_retries(0).with_application_transaction(transaction);
        let mut writer = RecordBatchWriter::for_table(&self.table)
            .map_err(|e| failed("writing", &self.dir, e))?
            .with_commit_properties(properties);
        let schema = writer.arrow_schema();
        let mut rows = 0;
        for batch in batches {
            let batch = conform(&batch?, &schema)
                .map_err(|e| Error::fatal(format!("converting rows for {}: {e}", self.dir.display())))?;
            if batch.num_rows() > 0 {
                rows += batch.num_rows();
                writer.write(batch).await.map_err(|e| failed("writing", &self.dir, e))?;
            }
        }
        if rows > 0 {
            writer.flush_and_commit(&mut self.table).await.map_err(|e| failed("committing to", &self.dir, e))?;
        }
        Ok(rows > 0)
    }

    /// Compacts, writes a checkpoint of the log and removes what it makes superfluous, when it is time. To be
    /// called after an append; a failure leaves the table as sound as before.
    ///
    /// # Errors
    /// As Delta says; worth a warning, not a stop.
    pub async fn maintain(&mut self) -> Result<()> {
        let version = self.table.version().unwrap_or(0);
        if version < self.maintained + CHECKPOINT_EVERY {
            return Ok(());
        }
        self.stale = true;
        self.maintained = version;
        self.tidy().await.map_err(|e| failed("tidying", &self.dir, e))?;
        // What is in memory may rest on log files that are gone now.
        self.reload().await
    }

    async fn tidy(&mut self) -> std::result::Result<(), DeltaTableError> {
        if self.table.snapshot()?.log_data().num_files() >= self.settled + COMPACT_FILES {
            let sizes =
                self.table.snapshot()?.log_data().iter().map(|file| u64::try_from(file.size()).unwrap_or(0)).collect::<Vec<_>>();
            let compaction = self.table.clone().optimize();
            let compaction = compaction.with_target_size(target(&sizes)).with_max_concurrent_tasks(1);
            let (table, _) = compaction.with_commit_properties(quiet()).await?;
            let vacuum = table.vacuum().with_mode(VacuumMode::Full).with_commit_properties(quiet());
            let (mut table, _) = vacuum.await?;
            table.update_state().await?;
            self.table = table;
            self.settled = self.table.snapshot()?.log_data().num_files();
            self.maintained = self.table.version().unwrap_or(0);
        }
        checkpoints::create_checkpoint(&self.table, None).await?;
        let keep = self.table.version().unwrap_or(0).saturating_sub(KEEP_VERSIONS);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        checkpoints::cleanup_expired_logs_for(keep, self.table.log_store().as_ref(), now, None).await?;
        Ok(())
    }

    async fn reload(&mut self) -> Result<()> {
        self.stale = true;
        let table = load(&self.dir).await?;
        self.table = table.ok_or_else(|| Error::fatal(format!("the table in {} is gone", self.dir.display())))?;
        self.versions.clear();
        self.stale = false;
        Ok(())
    }
}

/// How large a compaction of files of these sizes should make them. Larger files are left alone by it.
fn target(sizes: &[u64]) -> NonZeroU64 {
    let full = |lower: u64, tier: u64| sizes.iter().filter(|size| (lower / 2..=tier / 2).contains(*size)).count() >= TIER_FILES;
    let tier = (1..TIERS.len()).rev().find(|tier| full(TIERS[tier - 1], TIERS[*tier])).unwrap_or(0);
    NonZeroU64::new(TIERS[tier]).unwrap_or(NonZeroU64::MIN)
}

/// The table in `dir` at its newest version, if there is one.
///
/// # Errors
/// Retry when it cannot be read.
pub async fn load(dir: &Path) -> Result<Option<DeltaTable>> {
    let mut table = builder(dir)?;
    if !table.verify_deltatable_existence().await.map_err(|e| failed("looking for", dir, e))? {
        return Ok(None);
    }
    table.load().await.map_err(|e| failed("opening", dir, e))?;
    Ok(Some(table))
}

/// The newest version of `app` in a loaded table; 0 when none.
///
/// # Errors
/// Retry when the log cannot be read.
pub async fn transaction_version(table: &DeltaTable, dir: &Path, app: &str) -> Result<u64> {
    let failed = |e| failed("reading the log of", dir, e);
    let state = table.snapshot().map_err(failed)?;
    let version = state.transaction_version(table.log_store().as_ref(), app).await.map_err(failed)?;
    Ok(version.map_or(0, |version| u64::try_from(version).unwrap_or(0)))
}

/// A handle on the table in `dir`, not loaded.
fn builder(dir: &Path) -> Result<DeltaTable> {
    let absolute = std::path::absolute(dir).map_err(|e| Error::retry(format!("resolving {}: {e}", dir.display())))?;
    let url = Url::from_directory_path(&absolute)
        .map_err(|()| Error::fatal(format!("{} cannot be written as a URL", absolute.display())))?;
    DeltaTableBuilder::from_url(url.clone())
        .and_then(|builder| builder.with_storage_backend(Arc::new(DurableStore::new()), url).build())
        .map_err(|e| failed("opening", dir, e))
}

/// Makes the folders, takes the lock, and removes what a crash left half written.
async fn prepare(data_dir: &Path, name: &str) -> Result<(PathBuf, File)> {
    let (dir, tail, name) = (table_dir(data_dir, name), tail_dir(data_dir, name), name.to_owned());
    let prepared = tokio::task::spawn_blocking(move || -> Result<(PathBuf, File)> {
        let log = dir.join("_delta_log");
        let disk = |path: &Path, e: &dyn std::fmt::Display| Error::retry(format!("preparing {}: {e}", path.display()));
        durable::create_dir(&log).map_err(|e| disk(&log, &e))?;
        durable::create_dir(&tail).map_err(|e| disk(&tail, &e))?;
        let path = tail.join("lock");
        let lock = File::create(&path).map_err(|e| disk(&path, &e))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Error::retry(format!(
                "somebody else writes the table `{name}` (a sink of the same table, or a commit that is still going on)"
            )),
            TryLockError::Error(e) => disk(&path, &e),
        })?;
        remove_staged(&dir).map_err(|e| disk(&dir, &e))?;
        remove_staged(&log).map_err(|e| disk(&log, &e))?;
        Ok((dir, lock))
    });
    prepared.await.map_err(Error::fatal)?
}

/// Adds the columns that the pipeline has and the table lacks.
async fn with_columns(table: DeltaTable, name: &str, dir: &Path, wanted: &StructType) -> Result<DeltaTable> {
    let there = table.snapshot().map_err(|e| failed("opening", dir, e))?.schema();
    let added = added_columns(&there, wanted).map_err(|difference| {
        Error::fatal(format!(
            "the table `{name}` cannot take these rows: {difference}; cast or rename the column, or use another table"
        ))
    })?;
    if added.is_empty() {
        return Ok(table);
    }
    table.add_columns().with_fields(added).with_commit_properties(quiet()).await.map_err(|e| failed("adding columns to", dir, e))
}

/// What `wanted` has beyond `there`, or what contradicts it.
fn added_columns(there: &StructType, wanted: &StructType) -> std::result::Result<Vec<StructField>, String> {
    let mut added = Vec::new();
    let mut differences = Vec::new();
    for field in wanted.fields() {
        match there.fields().find(|column| column.name().eq_ignore_ascii_case(field.name())) {
            None => added.push(field.clone()),
            Some(column) if column.name() != field.name() => {
                differences.push(format!("column `{}` is called `{}` in the table", field.name(), column.name()));
            }
            Some(column) if column.data_type() != field.data_type() => differences.push(format!(
                "column `{}` is {} and in the table {}",
                field.name(),
                field.data_type(),
                column.data_type()
            )),
            Some(_) => {}
        }
    }
    if differences.is_empty() { Ok(added) } else { Err(differences.join(", ")) }
}

/// Commits that leave checkpoints and clean-up to [`Delta::maintain`].
fn quiet() -> CommitProperties {
    CommitProperties::default().with_create_checkpoint(false).with_cleanup_expired_logs(Some(false))
}

fn failed(what: &str, dir: &Path, cause: DeltaTableError) -> Error {
    let message = format!("{what} the table in {}: {cause}", dir.display());
    match cause {
        DeltaTableError::SchemaMismatch { .. } | DeltaTableError::MetadataError(_) => Error::fatal(message),
        _ => Error::retry(message),
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::Class;
    use arrow::array::{ArrayRef, Int64Array, StringArray};
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;

    fn schema(fields: &[(&str, DataType)]) -> SchemaRef {
        Arc::new(Schema::new(fields.iter().map(|(n, t)| Field::new(*n, t.clone(), true)).collect::<Vec<_>>()))
    }

    #[test]
    fn a_compaction_rewrites_the_large_files_only_when_there_are_many() {
        let mut sizes = vec![40 << 10; 50];
        assert_eq!(target(&sizes).get(), TIERS[0]);
        sizes.extend([2 << 20; TIER_FILES - 1]);
        assert_eq!(target(&sizes).get(), TIERS[0], "too few of the first tier");
        sizes.push(2 << 20);
        assert_eq!(target(&sizes).get(), TIERS[1]);
        sizes.extend([128 << 20; 20]);
        assert_eq!(target(&sizes).get(), TIERS[1], "finished files do not count");
        sizes.extend([16 << 20; TIER_FILES]);
        assert_eq!(target(&sizes).get(), TIERS[2]);
    }

    fn rows(values: &[i64]) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(values.to_vec())) as ArrayRef)]).unwrap()
    }

    async fn count(data_dir: &Path) -> usize {
        let context = datafusion::prelude::SessionContext::new();
        let table = load(&table_dir(data_dir, "t")).await.unwrap().unwrap();
        context.read_table(table.table_provider().await.unwrap()).unwrap().count().await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_version_is_appended_once() {
        let dir = tempfile::tempdir().unwrap();
        let schema = schema(&[("n", DataType::Int64)]);
        let mut delta = Delta::open(dir.path(), "t", &schema).await.unwrap();
        assert_eq!(delta.version_of("a").await.unwrap(), 0);
        assert!(delta.append("a", 5, [Ok(rows(&[1, 2]))].into_iter()).await.unwrap());
        assert!(!delta.append("a", 5, [Ok(rows(&[1, 2]))].into_iter()).await.unwrap());
        assert!(!delta.append("a", 4, [Ok(rows(&[3]))].into_iter()).await.unwrap());
        assert!(delta.append("b", 4, [Ok(rows(&[4]))].into_iter()).await.unwrap());
        assert!(!delta.append("a", 6, [Ok(rows(&[]))].into_iter()).await.unwrap());
        drop(delta);
        let mut delta = Delta::open(dir.path(), "t", &schema).await.unwrap();
        assert_eq!(delta.version_of("a").await.unwrap(), 5);
        assert!(!delta.append("a", 5, [Ok(rows(&[1, 2]))].into_iter()).await.unwrap());
        assert_eq!(count(dir.path()).await, 3);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_failed_append_leaves_nothing_and_can_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let mut delta = Delta::open(dir.path(), "t", &schema(&[("n", DataType::Int64)])).await.unwrap();
        let broken = [Ok(rows(&[1])), Err(Error::retry("the disk is gone"))];
        assert_eq!(delta.append("a", 1, broken.into_iter()).await.unwrap_err().class(), Class::Retry);
        assert!(delta.append("a", 1, [Ok(rows(&[1]))].into_iter()).await.unwrap());
        assert_eq!(count(dir.path()).await, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_table_has_one_writer() {
        let dir = tempfile::tempdir().unwrap();
        let schema = schema(&[("n", DataType::Int64)]);
        let first = Delta::open(dir.path(), "t", &schema).await.unwrap();
        let error = Delta::open(dir.path(), "t", &schema).await.err().unwrap();
        assert_eq!(error.class(), Class::Retry);
        assert!(error.to_string().contains("table `t`"), "{error}");
        drop(first);
        Delta::open(dir.path(), "t", &schema).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn columns_may_be_added_and_left_out_but_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut delta = Delta::open(dir.path(), "t", &schema(&[("n", DataType::Int64)])).await.unwrap();
        delta.append("a", 1, [Ok(rows(&[1]))].into_iter()).await.unwrap();
        drop(delta);
        let text = RecordBatch::try_from_iter([("s", Arc::new(StringArray::from(vec!["x"])) as ArrayRef)]).unwrap();
        let mut delta = Delta::open(dir.path(), "t", &schema(&[("s", DataType::Utf8)])).await.unwrap();
        assert!(delta.append("a", 2, [Ok(text)].into_iter()).await.unwrap());
        drop(delta);
        assert_eq!(count(dir.path()).await, 2);
        let error = Delta::open(dir.path(), "t", &schema(&[("n", DataType::Utf8)])).await.err().unwrap();
        assert_eq!(error.class(), Class::Fatal);
        assert!(error.to_string().contains("column `n` is string and in the table long"), "{error}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_commits_leave_few_files_and_every_row() {
        let dir = tempfile::tempdir().unwrap();
        let mut delta = Delta::open(dir.path(), "t", &schema(&[("n", DataType::Int64)])).await.unwrap();
        for version in 1..=120 {
            delta.append("a", version, [Ok(rows(&[version as i64]))].into_iter()).await.unwrap();
            delta.maintain().await.unwrap();
        }
        assert_eq!(count(dir.path()).await, 120);
        assert!(delta.table.snapshot().unwrap().log_data().num_files() < 70);
        let log = std::fs::read_dir(table_dir(dir.path(), "t").join("_delta_log")).unwrap();
        let names: Vec<String> = log.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!names.contains(&"00000000000000000000.json".to_owned()), "{names:?}");
        assert_eq!(delta.version_of("a").await.unwrap(), 120);
    }
}
