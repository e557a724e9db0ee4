//! Making files survive a power cut. Every file that an acknowledgement rests on is synced here and
//! nowhere else, and a failed sync ends the process: after one, the kernel may have dropped the very
//! pages that were to be kept, and a second attempt would report success without them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::sabotage;

/// Exit code of a process that could not sync (`EX_IOERR` of sysexits.h).
pub const EXIT_SYNC_FAILED: i32 = 74;

/// No space is left for what was to be written (a sync that fails for that reason ends the process all the same).
/// Waiting helps: the supervisor tries again for as long as it takes, and nothing is acknowledged meanwhile. It knows
/// the error by [`is_full`], so whoever adds words to it must keep it as the source.
#[derive(Debug, thiserror::Error)]
#[error("no space left on {}", .path.display())]
pub struct StorageFull {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

impl StorageFull {
    /// `path` is what could not be written.
    pub fn new(path: &Path, cause: io::Error) -> Self {
        Self { path: path.to_owned(), cause }
    }
}

/// Whether this came about because the device, or the quota on it, is used up.
pub fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        next = match error.downcast_ref::<crate::Error>() {
            Some(error) => Some(error.cause()),
            None => error.source(),
        };
    }
    false
}

/// Writes a file's data to the disk, or ends the process.
pub fn sync(file: &File, path: &Path) {
    if sabotage::is(sabotage::NO_FSYNC) {
        return;
    }
    #[expect(clippy::disallowed_methods, reason = "the one place where syncs happen")]
    if let Err(cause) = file.sync_data() {
        end(path, &cause);
    }
}

/// Writes a directory's entries to the disk, or ends the process. A file is only there after a crash
/// when the directory that names it was synced, too.
pub fn sync_dir(path: &Path) {
    if sabotage::is(sabotage::NO_FSYNC) {
        return;
    }
    if let Err(cause) = File::open(path).and_then(|dir| dir.sync_all()) {
        end(path, &cause);
    }
}

/// Makes a directory with all its parents, each synced into the one above it.
///
/// # Errors
/// What the system says when it cannot be made.
pub fn create_dir(path: &Path) -> io::Result<()> {
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().unwrap_or(Path::new(""));
    create_dir(parent)?;
    match std::fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    Ok(())
}

/// Puts a synced file in its final place: rename, then sync of the directory.
///
/// # Errors
/// What the system says when it cannot be renamed.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    if let Some(parent) = to.parent() {
        sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    }
    Ok(())
}

/// Says why and ends the process: nothing may be acknowledged after a failed sync.
pub fn end(path: &Path, cause: &dyn std::error::Error) -> ! {
    tracing::error!(path = %path.display(), %cause, "fsync failed; ending the process, since what was written may be gone");
    std::process::exit(EXIT_SYNC_FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn a_full_disk_is_known_by_its_cause() {
        // ENOSPC, EDQUOT and EIO of Linux.
        for (number, full) in [(28, true), (122, true), (5, false)] {
            let cause = io::Error::from_raw_os_error(number);
            assert_eq!(is_full(&cause), full, "{cause}");
            let error = Error::fatal(StorageFull::new(Path::new("/data/x"), cause));
            assert_eq!(is_full(&error), full, "{error}");
            assert!(error.to_string().starts_with("no space left on /data/x: "), "{error}");
        }
        assert!(!is_full(&Error::fatal("no space left on the device")), "words prove nothing");
    }
}
