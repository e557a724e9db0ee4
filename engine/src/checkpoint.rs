//! The checkpoint store: one redb file a pipeline. One transaction holds all that an epoch is: positions,
//! state changes, what the sinks prepared, and the rejected rows. State is kept by key, so that a delta
//! costs what changed; the copy-on-write tree is the compaction.
//!
//! A full disk leaves the newest stored epoch as it is. redb takes nothing more after such an error, so the next call
//! opens the file anew; a call of an earlier start that comes after that is refused as ever, by the count of starts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::durable::{self, StorageFull};
use crate::error::{Error, Result};
use crate::operator::{State, StateDelta};
use crate::position::{Epoch, Position};
use crate::sink::Prepared;

mod store_file;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SOURCES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sources");
const SINKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sinks");
const STATE: TableDefinition<'_, (&str, &[u8]), &[u8]> = TableDefinition::new("state");
const FINGERPRINTS: TableDefinition<'_, &str, u64> = TableDefinition::new("fingerprints");
const REJECTED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("rejected");

/// Version of this layout; a store of another version is refused rather than guessed at.
const LAYOUT: u64 = 1;
/// Page cache of the store. State is read once at start; positions and deltas are small.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

/// Where a source stood, and whether it had ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceMark {
    /// Its position; `None` before it was ever opened.
    pub position: Option<Position>,
    /// A bounded source that has ended is remembered as ended.
    pub ended: bool,
}

/// Everything of one epoch, collected from the stages.
#[derive(Debug, Default)]
pub(crate) struct Record {
    pub(crate) sources: Vec<(String, SourceMark)>,
    pub(crate) deltas: Vec<(String, StateDelta)>,
    pub(crate) sinks: Vec<(String, Prepared)>,
    /// Rejected rows as Arrow IPC streams in the dead-letter schema.
    pub(crate) rejected: Vec<Vec<u8>>,
}

/// What the store holds of the newest epoch, but for the operators' state.
#[derive(Debug, Default)]
pub(crate) struct Restored {
    pub(crate) epoch: Option<Epoch>,
    pub(crate) sources: BTreeMap<String, SourceMark>,
    pub(crate) sinks: BTreeMap<String, Prepared>,
}

/// Opens the storage of a store: at first, and again after a failure.
type Open = Box<dyn Fn() -> std::result::Result<Database, redb::Error> + Send + Sync>;

/// The store.
pub struct Checkpoints {
    /// `None` while it cannot be opened.
    database: RwLock<Option<Database>>,
    open: Open,
    /// An I/O error has happened: the database must be opened anew.
    broken: AtomicBool,
    /// It happened for want of space.
    full: AtomicBool,
    path: PathBuf,
    /// 0 before it is known.
    identity: u64,
    delay: Option<Box<dyn Fn() -> Duration + Send + Sync>>,
}

impl Checkpoints {
    /// Opens or makes the store in a file; its folder is made, too, and synced.
    ///
    /// # Errors
    /// Fatal when it cannot be opened, is damaged beyond redb's repair, or is of another layout.
    pub fn open(path: &Path) -> Result<Self> {
        let made = |e: std::io::Error| Error::fatal(format!("making the checkpoint store {}: {e}", path.display()));
        let folder = path.parent().unwrap_or(Path::new(""));
        durable::create_dir(folder).map_err(made)?;
        store_file::create(path).map_err(made)?;
        let file = path.to_owned();
        let open = move || -> std::result::Result<Database, redb::Error> {
            Ok(Self::builder().create_with_backend(store_file::StoreFile::open(&file)?)?)
        };
        Self::prepare(Box::new(open), path)
    }

    /// Opens or makes the store on any storage, of which a clone is the same storage; for the simulation.
    ///
    /// # Errors
    /// As [`Checkpoints::open`].
    pub fn with_backend(backend: impl StorageBackend + Clone) -> Result<Self> {
        let open =
            move || -> std::result::Result<Database, redb::Error> { Ok(Self::builder().create_with_backend(backend.clone())?) };
        Self::prepare(Box::new(open), Path::new("memory"))
    }

    /// On virtual time, a call of a running pipeline takes as long as `delay` says at each.
    pub(crate) fn dawdling(self, delay: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { delay: Some(Box::new(delay)), ..self }
    }

    /// How long the next call takes on virtual time.
    pub(crate) fn delay(&self) -> Duration {
        self.delay.as_ref().map_or(Duration::ZERO, |delay| delay())
    }

    fn builder() -> redb::Builder {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        builder
    }

    fn prepare(open: Open, path: &Path) -> Result<Self> {
        let mut store = Self {
            database: RwLock::new(None),
            open,
            broken: AtomicBool::new(true),
            full: AtomicBool::new(false),
            path: path.to_owned(),
            identity: 0,
            delay: None,
        };
        let (layout, identity) = store.write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            let layout = meta.get("layout")?.map(|value| value.value());
            if layout.is_none() {
                meta.insert("layout", LAYOUT)?;
            }
            let stored = meta.get("identity")?.map(|value| value.value());
            let identity = stored.unwrap_or_else(|| fastrand::u64(1..));
            meta.insert("identity", identity)?;
            for table in [SOURCES, SINKS] {
                transaction.open_table(table)?;
            }
            transaction.open_table(STATE)?;
            transaction.open_table(FINGERPRINTS)?;
            transaction.open_table(REJECTED)?;
            Ok((layout, identity))
        })?;
        store.identity = identity;
        match layout {
            Some(other) if other != LAYOUT => Err(Error::fatal(format!(
                "the checkpoint store has layout {other}, this version reads {LAYOUT}; run the version that wrote it, or start over with --fresh"
            ))),
            _ => Ok(store),
        }
    }

    /// Tells this store from another that was made for the same pipeline (after this one was deleted, say),
    /// whose numbers start again.
    pub(crate) fn identity(&self) -> u64 {
        self.identity
    }

    /// The database, opened anew when an earlier call has broken it; calls that are under way end first.
    fn database(&self) -> Result<RwLockReadGuard<'_, Option<Database>>> {
        if self.broken.load(Ordering::Acquire) {
            let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
            if self.broken.load(Ordering::Acquire) {
                // The old one lets go of its lock first.
                *database = None;
                let opened = (self.open)().map_err(|error| self.failed(error))?;
                let identity = identity_of(&opened).map_err(|error| self.failed(error))?;
                if self.identity != 0 && identity != Some(self.identity) {
                    let path = self.path.display();
                    return Err(Error::fatal(format!("the checkpoint store {path} was replaced while the pipeline ran")));
                }
                *database = Some(opened);
                self.full.store(false, Ordering::Release);
                self.broken.store(false, Ordering::Release);
            }
        }
        Ok(self.database.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What an error means for this store. After one of the storage the next call opens it anew.
    fn failed(&self, error: redb::Error) -> Error {
        let path = self.path.display();
        match error {
            redb::Error::Io(cause) if durable::is_full(&cause) => {
                self.full.store(true, Ordering::Release);
                self.broken.store(true, Ordering::Release);
                Error::fatal(StorageFull::new(&self.path, cause))
            }
            redb::Error::Io(_) | redb::Error::PreviousIo | redb::Error::DatabaseClosed => {
                self.broken.store(true, Ordering::Release);
                if self.full.load(Ordering::Acquire) {
                    // Another call has met the full disk, and this one what came of it.
                    return Error::fatal(StorageFull::new(&self.path, std::io::ErrorKind::StorageFull.into()));
                }
                Error::fatal(format!("the checkpoint store {path}: {error}"))
            }
            error => Error::fatal(format!("the checkpoint store {path}: {error}")),
        }
    }

    /// Runs one transaction. A failed sync has ended the process by then (see [`store_file`]), and so does a commit
    /// that failed for another reason than a full disk: what is on the disk is then unknown.
    fn write<T>(&self, work: impl FnOnce(&redb::WriteTransaction) -> std::result::Result<T, redb::Error>) -> Result<T> {
        // Held to the end: nobody opens the database anew in the middle of a transaction.
        let database = self.database()?;
        let database = database.as_ref().ok_or_else(|| self.failed(redb::Error::PreviousIo))?;
        let transaction = database.begin_write().map_err(|error| self.failed(error.into()))?;
        let value = work(&transaction).map_err(|error| self.failed(error))?;
        match transaction.commit().map_err(redb::Error::from) {
            Ok(()) => Ok(value),
            Err(redb::Error::Io(cause)) if !durable::is_full(&cause) => durable::end(&self.path, &cause),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn read<T>(&self, work: impl FnOnce(&redb::ReadTransaction) -> std::result::Result<T, redb::Error>) -> Result<T> {
        let database = self.database()?;
        let database = database.as_ref().ok_or_else(|| self.failed(redb::Error::PreviousIo))?;
        let transaction = database.begin_read().map_err(|error| self.failed(error.into()))?;
        work(&transaction).map_err(|error| self.failed(error))
    }

    /// Counts a start of the pipeline; its epochs come after all of earlier starts.
    ///
    /// # Errors
    /// Fatal when the store cannot be written.
    pub(crate) fn start(&self) -> Result<u32> {
        let run = self.write(|transaction| {
            let mut meta = transaction.open_table(META)?;
            let run = meta.get("run")?.map_or(0, |value| value.value()) + 1;
            meta.insert("run", run)?;
            Ok(run)
        })?;
        u32::try_from(run).map_err(Error::fatal)
    }

    /// What the newest epoch holds, but for the operators' state.
    pub(crate) fn restored(&self) -> Result<Restored> {
        self.read(|transaction| {
            let mut restored = Restored {
                epoch: transaction.open_table(META)?.get("epoch")?.map(|value| Epoch::from_u64(value.value())),
                ..Restored::default()
            };
            for item in transaction.open_table(SOURCES)?.iter()? {
                let (stage, mark) = item?;
                restored.sources.insert(stage.value().to_owned(), from_json(mark.value())?);
            }
            for item in transaction.open_table(SINKS)?.iter()? {
                let (stage, prepared) = item?;
                restored.sinks.insert(stage.value().to_owned(), from_json(prepared.value())?);
            }
            Ok(restored)
        })
    }

    /// One stage's state, keys in order.
    pub(crate) fn state(&self, stage: &str) -> Result<State> {
        self.read(|transaction| {
            let table = transaction.open_table(STATE)?;
            let mut state = State::new();
            for item in table.range((stage, [].as_slice())..)? {
                let (key, value) = item?;
                let (owner, key) = key.value();
                if owner != stage {
                    break;
                }
                state.push((key.to_vec(), value.value().to_vec()));
            }
            Ok(state)
        })
    }

    /// Stores an epoch. When this returns, it is on the disk.
    pub(crate) fn store(&self, epoch: Epoch, record: &Record) -> Result<()> {
        let stored = self.write(|transaction| {
            let run = transaction.open_table(META)?.get("run")?.map_or(0, |value| value.value());
            if run > u64::from(epoch.run()) {
                // This call was still under way when the pipeline began again, and that start knows nothing of it.
                return Ok(false);
            }
            transaction.open_table(META)?.insert("epoch", epoch.as_u64())?;
            let mut sources = transaction.open_table(SOURCES)?;
            for (stage, mark) in &record.sources {
                sources.insert(stage.as_str(), to_json(mark)?.as_slice())?;
            }
            let mut sinks = transaction.open_table(SINKS)?;
            for (stage, prepared) in &record.sinks {
                sinks.insert(stage.as_str(), to_json(prepared)?.as_slice())?;
            }
            let mut state = transaction.open_table(STATE)?;
            for (stage, delta) in &record.deltas {
                for key in &delta.deletes {
                    state.remove((stage.as_str(), key.as_slice()))?;
                }
                for (key, value) in &delta.puts {
                    state.insert((stage.as_str(), key.as_slice()), value.as_slice())?;
                }
            }
            if !record.rejected.is_empty() {
                let mut meta = transaction.open_table(META)?;
                // Numbers of rejects are never reused, so that moving them twice can be recognised.
                let mut number = meta.get("rejected")?.map_or(0, |value| value.value());
                let mut rejected = transaction.open_table(REJECTED)?;
                for rows in &record.rejected {
                    number += 1;
                    rejected.insert(number, rows.as_slice())?;
                }
                meta.insert("rejected", number)?;
            }
            Ok(true)
        })?;
        if stored { Ok(()) } else { Err(Error::fatal(format!("epoch {epoch} belongs to an earlier start"))) }
    }

    /// The oldest rejected rows that have not been moved to the dead-letter table yet: number and Arrow
    /// IPC stream, up to about `bytes` bytes.
    pub(crate) fn rejected(&self, bytes: usize) -> Result<Vec<(u64, Vec<u8>)>> {
        self.read(|transaction| {
            let mut taken = 0;
            let mut rows = Vec::new();
            for item in transaction.open_table(REJECTED)?.iter()? {
                let (number, stream) = item?;
                taken += stream.value().len();
                rows.push((number.value(), stream.value().to_vec()));
                if taken >= bytes {
                    break;
                }
            }
            Ok(rows)
        })
    }

    /// The rejected rows up to this number are durable elsewhere.
    pub(crate) fn forget_rejected(&self, through: u64) -> Result<()> {
        self.write(|transaction| {
            let mut rejected = transaction.open_table(REJECTED)?;
            rejected.retain_in(..=through, |_, _| false)?;
            Ok(())
        })
    }

    /// The fingerprint each stage had when the pipeline last started.
    pub(crate) fn fingerprints(&self) -> Result<BTreeMap<String, u64>> {
        self.read(|transaction| {
            let mut fingerprints = BTreeMap::new();
            for item in transaction.open_table(FINGERPRINTS)?.iter()? {
                let (stage, fingerprint) = item?;
                fingerprints.insert(stage.value().to_owned(), fingerprint.value());
            }
            Ok(fingerprints)
        })
    }

    /// The stages for which something is stored: a position, a prepared commit or state.
    pub(crate) fn stages(&self) -> Result<Vec<String>> {
        self.read(|transaction| {
            let mut stages = Vec::new();
            for table in [SOURCES, SINKS] {
                for item in transaction.open_table(table)?.iter()? {
                    stages.push(item?.0.value().to_owned());
                }
            }
            for item in transaction.open_table(STATE)?.iter()? {
                let stage = item?.0.value().0.to_owned();
                if stages.last() != Some(&stage) {
                    stages.push(stage);
                }
            }
            stages.sort();
            stages.dedup();
            Ok(stages)
        })
    }

    /// Forgets positions and state of the stages in `forget`, and takes down the fingerprints of the pipeline as it
    /// is now. What a sink has prepared stays: its epoch is stored, and the sink finishes it.
    pub(crate) fn adopt(&self, forget: &[String], fingerprints: &[(String, u64)]) -> Result<()> {
        self.write(|transaction| {
            let mut sources = transaction.open_table(SOURCES)?;
            let mut state = transaction.open_table(STATE)?;
            for stage in forget {
                sources.remove(stage.as_str())?;
                state.retain(|(owner, _), _| owner != stage)?;
            }
            let mut stored = transaction.open_table(FINGERPRINTS)?;
            stored.retain(|_, _| false)?;
            for (stage, fingerprint) in fingerprints {
                stored.insert(stage.as_str(), fingerprint)?;
            }
            Ok(())
        })
    }
}

/// The identity of the store in this database; `None` when there is none in it.
fn identity_of(database: &Database) -> std::result::Result<Option<u64>, redb::Error> {
    match database.begin_read()?.open_table(META) {
        Ok(meta) => Ok(meta.get("identity")?.map(|value| value.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn to_json(value: &impl Serialize) -> std::result::Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|e| redb::Error::Corrupted(format!("cannot be written as JSON: {e}")))
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, redb::Error> {
    serde_json::from_slice(bytes).map_err(|e| redb::Error::Corrupted(format!("stored JSON is not readable: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::disk::Disk;

    fn delta(puts: &[(&str, &str)], deletes: &[&str]) -> StateDelta {
        StateDelta {
            puts: puts.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec())).collect(),
            deletes: deletes.iter().map(|k| k.as_bytes().to_vec()).collect(),
        }
    }

    #[test]
    fn an_epoch_is_there_after_a_power_cut_and_a_later_unstored_one_is_not() {
        let disk = Disk::new();
        let store = Checkpoints::with_backend(disk.backend()).unwrap();
        let run = store.start().unwrap();
        let epoch = Epoch::start(run).next();
        let mark = SourceMark { position: Some(Position(serde_json::json!(7))), ended: false };
        let record = Record {
            sources: vec![("s".into(), mark.clone())],
            deltas: vec![("w".into(), delta(&[("a", "1"), ("b", "2")], &[])), ("w2".into(), delta(&[("z", "9")], &[]))],
            sinks: vec![("out".into(), serde_json::json!({"length": 3}))],
            rejected: vec![vec![1, 2, 3]],
        };
        store.store(epoch, &record).unwrap();
        store
            .store(epoch.next(), &Record { deltas: vec![("w".into(), delta(&[("b", "3")], &["a"]))], ..Record::default() })
            .unwrap();
        drop(store);

        let store = Checkpoints::with_backend(disk.after_power_cut().backend()).unwrap();
        let restored = store.restored().unwrap();
        assert_eq!(restored.epoch, Some(epoch.next()));
        assert_eq!(restored.sources["s"], mark);
        assert_eq!(store.state("w").unwrap(), vec![(b"b".to_vec(), b"3".to_vec())]);
        assert_eq!(store.state("w2").unwrap().len(), 1);
        assert_eq!(store.rejected(1 << 20).unwrap(), vec![(1, vec![1, 2, 3])]);
        store.forget_rejected(1).unwrap();
        assert!(store.rejected(1 << 20).unwrap().is_empty());
        assert!(store.start().unwrap() > run, "starts are counted, so epochs are never reused");
    }

    #[test]
    fn forgetting_a_stage_leaves_the_others() {
        let store = Checkpoints::with_backend(Disk::new().backend()).unwrap();
        let record = Record {
            deltas: vec![("a".into(), delta(&[("k", "1")], &[])), ("b".into(), delta(&[("k", "2")], &[]))],
            ..Record::default()
        };
        store.store(Epoch::start(1), &record).unwrap();
        store.adopt(&["a".into()], &[("b".into(), 5)]).unwrap();
        assert_eq!(store.stages().unwrap(), ["b"]);
        assert_eq!(store.fingerprints().unwrap()["b"], 5);
    }

    /// A stored epoch whose source stands at `position`.
    fn at(position: u64) -> Record {
        let mark = SourceMark { position: Some(Position(serde_json::json!(position))), ended: false };
        Record { sources: vec![("s".into(), mark)], ..Record::default() }
    }

    #[test]
    fn a_full_disk_keeps_what_is_stored_and_is_used_again_when_there_is_space() {
        let disk = Disk::new();
        let store = Checkpoints::with_backend(disk.backend()).unwrap();
        let epoch = Epoch::start(store.start().unwrap()).next();
        store.store(epoch, &at(1)).unwrap();
        disk.fill(true);
        for _ in 0..3 {
            let error = store.store(epoch.next(), &at(2)).unwrap_err();
            assert!(durable::is_full(&error), "{error}");
            assert!(error.to_string().starts_with("no space left on memory"), "{error}");
        }
        assert!(durable::is_full(&store.start().unwrap_err()));
        disk.fill(false);
        let restored = store.restored().unwrap();
        assert_eq!((restored.epoch, &restored.sources["s"]), (Some(epoch), &at(1).sources[0].1));
        let next = Epoch::start(store.start().unwrap()).next();
        assert!(next > epoch);
        store.store(next, &at(2)).unwrap();
        drop(store);
        let store = Checkpoints::with_backend(disk.after_power_cut().backend()).unwrap();
        assert_eq!(store.restored().unwrap().epoch, Some(next));
    }

    #[test]
    fn what_an_earlier_start_stores_late_is_refused_also_after_a_full_disk() {
        let disk = Disk::new();
        let store = Checkpoints::with_backend(disk.backend()).unwrap();
        let identity = store.identity();
        let early = Epoch::start(store.start().unwrap()).next();
        disk.fill(true);
        store.store(early, &at(1)).unwrap_err();
        disk.fill(false);
        store.start().unwrap();
        let error = store.store(early, &at(1)).unwrap_err();
        assert!(error.to_string().contains("earlier start"), "{error}");
        assert_eq!(store.restored().unwrap().epoch, None);
        assert_eq!(store.identity(), identity);
    }

    #[test]
    fn a_file_whose_making_was_cut_short_is_made_anew() {
        let dir = std::env::temp_dir().join(format!("afferent-checkpoint-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("checkpoint.redb");
        // What redb leaves when the disk is full, or the power gone, before it has written its first page.
        std::fs::write(&path, vec![0; 1 << 16]).unwrap();
        let store = Checkpoints::open(&path).unwrap();
        let run = store.start().unwrap();
        let identity = store.identity();
        assert!(Checkpoints::open(&path).is_err(), "one process has it");
        drop(store);
        let store = Checkpoints::open(&path).unwrap();
        assert!(store.start().unwrap() > run, "what has been made is not made anew");
        assert_eq!(store.identity(), identity);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
