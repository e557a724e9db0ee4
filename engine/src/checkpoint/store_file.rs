//! The file of a checkpoint store, as redb's storage. The store makes and opens it. The invariant: a failed sync ends
//! the process, whatever its cause, and never reaches redb; a write that fails changes nothing that is stored.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Bound;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

use crate::durable;

/// redb writes as many bytes to the beginning of a file, last of all when it makes one.
const MAGIC_BYTES: u64 = 9;

/// Makes the file unless it is there. What is left of a making that came to no end (the disk was full, the power went)
/// holds nothing, and is emptied.
pub(super) fn create(path: &Path) -> io::Result<()> {
    let fresh = !path.exists();
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    if fresh {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        durable::sync_dir(folder.unwrap_or(Path::new(".")));
    }
    let mut magic = Vec::new();
    (&mut file).take(MAGIC_BYTES).read_to_end(&mut magic)?;
    if !magic.is_empty() && magic.iter().all(|byte| *byte == 0) {
        file.set_len(0)?;
    }
    Ok(())
}

/// redb's own storage in a file, but for failed syncs.
#[derive(Debug)]
pub(super) struct StoreFile {
    file: FileBackend,
    path: PathBuf,
}

impl StoreFile {
    /// Opens a file that is there.
    pub(super) fn open(path: &Path) -> Result<Self, DatabaseError> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file: FileBackend::new(file)?, path: path.to_owned() })
    }
}

impl StorageBackend for StoreFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if let Err(cause) = self.file.sync_data() {
            durable::end(&self.path, &cause);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
