//! A disk in memory that can lose power: what was not synced is then gone; and that can be full: it then takes no
//! write. The checkpoint store runs on it in the simulation, so that a crash there takes what a real one would take.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

#[derive(Debug, Default, Clone)]
struct Content {
    cached: Vec<u8>,
    synced: Vec<u8>,
}

/// The disk. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    content: Arc<Mutex<Content>>,
    /// Shared with what is left after a power cut, as the next: it is the same device.
    full: Arc<AtomicBool>,
    refusals: Arc<AtomicUsize>,
}

impl Disk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// A redb storage on this disk. Clones are the same storage.
    pub fn backend(&self) -> impl StorageBackend + Clone + use<> {
        Backend(self.clone())
    }

    /// Another disk that holds what this one would hold had the power failed just now.
    #[must_use]
    pub fn after_power_cut(&self) -> Disk {
        let synced = self.lock().synced.clone();
        let content = Arc::new(Mutex::new(Content { cached: synced.clone(), synced }));
        Disk { content, full: Arc::clone(&self.full), refusals: Arc::clone(&self.refusals) }
    }

    /// From now on there is no space left, or there is some again.
    pub fn fill(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    /// How often it has refused something for want of space.
    pub fn refusals(&self) -> usize {
        self.refusals.load(Ordering::SeqCst)
    }

    fn check_space(&self) -> io::Result<()> {
        if !self.full.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.refusals.fetch_add(1, Ordering::SeqCst);
        Err(io::ErrorKind::StorageFull.into())
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Clone, Debug)]
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
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if len > self.0.lock().cached.len() {
            self.0.check_space()?;
        }
        self.0.lock().cached.resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.0.lock();
        content.synced = content.cached.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.check_space()?;
        let mut content = self.0.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let place = content.cached.get_mut(start..start + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        place.copy_from_slice(data);
        Ok(())
    }
}
