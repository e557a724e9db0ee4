//! A disk in memory that can lose power: what was not synced is then gone. The checkpoint store runs on
//! it in the simulation, so that a crash there takes what a real one would take.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

#[derive(Debug, Default, Clone)]
struct Content {
    cached: Vec<u8>,
    synced: Vec<u8>,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct Disk(Arc<Mutex<Content>>);

impl Disk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// A redb storage on this disk.
    pub fn backend(&self) -> impl StorageBackend + use<> {
        Backend(self.clone())
    }

    /// Another disk that holds what this one would hold had the power failed just now.
    #[must_use]
    pub fn after_power_cut(&self) -> Disk {
        let synced = self.lock().synced.clone();
        Disk(Arc::new(Mutex::new(Content { cached: synced.clone(), synced })))
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Backend(Disk);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let content = self.0.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = content.cached.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().cached.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.0.lock();
        content.synced = content.cached.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.0.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let place = content.cached.get_mut(start..start + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        place.copy_from_slice(data);
        Ok(())
    }
}
