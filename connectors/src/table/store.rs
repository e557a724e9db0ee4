//! The storage that Delta writes through: the local file system with every object fsynced before it gets its
//! name, and its folder after. Delta's own local storage syncs nothing, so a power cut could take a commit
//! that was reported, or leave half a log entry, which makes a table unreadable. Invariant: an object is
//! there whole or not at all, and once a call returned it stays.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};

use afferent_engine::durable;
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};

/// How objects are called until they are whole. Delta readers take no notice of names that begin so.
const STAGED: &str = "_staged_";
const NAME: &str = "DurableStore";

/// A file system rooted at `/`, as Delta's storage.
#[derive(Debug, Default)]
pub struct DurableStore {
    inner: LocalFileSystem,
}

impl DurableStore {
    /// Of this machine.
    pub fn new() -> Self {
        Self { inner: LocalFileSystem::new() }
    }

    /// Where an object is written before it gets its name: in the same folder.
    fn stage(&self, location: &Path) -> Result<Staged> {
        let name = location.filename().unwrap_or_default();
        let token = fastrand::u64(..);
        let mut parts: Vec<_> = location.parts().collect();
        parts.pop();
        parts.push(format!("{STAGED}{token:016x}_{name}").into());
        let location_staged: Path = parts.into_iter().collect();
        let final_path = self.inner.path_to_filesystem(location)?;
        let staged_path = self.inner.path_to_filesystem(&location_staged)?;
        Ok(Staged { location: location_staged, staged_path, final_path })
    }
}

/// Removes what a crash left half written in `dir`. Only while nobody writes there.
pub fn remove_staged(dir: &FilePath) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(STAGED)) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// An object on its way.
#[derive(Clone, Debug)]
struct Staged {
    location: Path,
    staged_path: PathBuf,
    final_path: PathBuf,
}

impl Staged {
    /// Syncs it and gives it its name; with `create`, only if nobody has the name.
    async fn publish(self, create: bool) -> Result<()> {
        blocking(move || {
            let published = self.publish_now(create);
            if published.is_err() {
                // Best effort: recovery removes what stays.
                let _ = std::fs::remove_file(&self.staged_path);
            }
            published
        })
        .await
    }

    fn publish_now(&self, create: bool) -> Result<()> {
        let file = File::open(&self.staged_path).map_err(|e| failed("opening", &self.staged_path, e))?;
        durable::sync(&file, &self.staged_path);
        if create {
            std::fs::hard_link(&self.staged_path, &self.final_path).map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => {
                    Error::AlreadyExists { path: self.final_path.display().to_string(), source: Box::new(e) }
                }
                _ => failed("linking", &self.final_path, e),
            })?;
            let _ = std::fs::remove_file(&self.staged_path);
        } else {
            std::fs::rename(&self.staged_path, &self.final_path).map_err(|e| failed("renaming", &self.final_path, e))?;
        }
        sync_parent(&self.final_path);
        Ok(())
    }
}

/// A large object, written in parts.
#[derive(Debug)]
struct StagedUpload {
    inner: Box<dyn MultipartUpload>,
    staged: Staged,
}

#[async_trait]
impl MultipartUpload for StagedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        self.staged.clone().publish(false).await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[async_trait]
impl ObjectStore for DurableStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let create = match opts.mode {
            PutMode::Overwrite => false,
            PutMode::Create => true,
            // The local file system knows no conditional updates and says so.
            PutMode::Update(_) => return self.inner.put_opts(location, payload, opts).await,
        };
        let staged = self.stage(location)?;
        make_parent(&staged.final_path).await?;
        let opts = PutOptions { mode: PutMode::Overwrite, ..opts };
        let result = self.inner.put_opts(&staged.location, payload, opts).await?;
        staged.publish(create).await?;
        Ok(result)
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let staged = self.stage(location)?;
        make_parent(&staged.final_path).await?;
        let inner = self.inner.put_multipart_opts(&staged.location, opts).await?;
        Ok(Box::new(StagedUpload { inner, staged }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    /// Deletions are not synced: what comes back after a power cut is deleted again.
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    /// Only a name is made: what it names is synced already.
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let target = self.inner.path_to_filesystem(to)?;
        make_parent(&target).await?;
        self.inner.copy_opts(from, to, options).await?;
        blocking(move || {
            sync_parent(&target);
            Ok(())
        })
        .await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let (source, target) = (self.inner.path_to_filesystem(from)?, self.inner.path_to_filesystem(to)?);
        make_parent(&target).await?;
        self.inner.rename_opts(from, to, options).await?;
        blocking(move || {
            sync_parent(&target);
            sync_parent(&source);
            Ok(())
        })
        .await
    }
}

impl fmt::Display for DurableStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{NAME}({})", self.inner)
    }
}

async fn make_parent(path: &FilePath) -> Result<()> {
    let Some(parent) = path.parent().map(FilePath::to_owned) else { return Ok(()) };
    blocking(move || durable::create_dir(&parent).map_err(|e| failed("creating", &parent, e))).await
}

fn sync_parent(path: &FilePath) {
    if let Some(parent) = path.parent() {
        durable::sync_dir(parent);
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

fn failed(what: &str, path: &FilePath, cause: io::Error) -> Error {
    Error::Generic { store: NAME, source: format!("{what} {}: {cause}", path.display()).into() }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;

    fn names(dir: &FilePath) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn at(dir: &FilePath, name: &str) -> Path {
        Path::from_absolute_path(dir.join(name)).unwrap()
    }

    #[tokio::test]
    async fn objects_get_their_name_when_they_are_whole_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = DurableStore::new();
        store.put(&at(dir.path(), "sub/a"), "1".into()).await.unwrap();
        store.put(&at(dir.path(), "sub/a"), "2".into()).await.unwrap();
        let create = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let taken = store.put_opts(&at(dir.path(), "sub/a"), "3".into(), create.clone()).await.unwrap_err();
        assert!(matches!(taken, Error::AlreadyExists { .. }), "{taken}");
        store.put_opts(&at(dir.path(), "sub/b"), "3".into(), create).await.unwrap();
        store.copy(&at(dir.path(), "sub/b"), &at(dir.path(), "sub/c")).await.unwrap();
        store.rename(&at(dir.path(), "sub/b"), &at(dir.path(), "sub/d")).await.unwrap();
        assert_eq!(names(&dir.path().join("sub")), ["a", "c", "d"]);
        assert_eq!(store.get(&at(dir.path(), "sub/a")).await.unwrap().bytes().await.unwrap(), "2");
        store.delete(&at(dir.path(), "sub/a")).await.unwrap();
        assert!(matches!(store.head(&at(dir.path(), "sub/a")).await.unwrap_err(), Error::NotFound { .. }));
    }

    #[tokio::test]
    async fn an_upload_is_seen_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let store = DurableStore::new();
        let mut upload = store.put_multipart(&at(dir.path(), "big")).await.unwrap();
        upload.put_part("12".into()).await.unwrap();
        upload.put_part("34".into()).await.unwrap();
        assert!(!dir.path().join("big").exists());
        upload.complete().await.unwrap();
        assert_eq!(names(dir.path()), ["big"]);
        assert_eq!(std::fs::read(dir.path().join("big")).unwrap(), b"1234");
    }

    #[test]
    fn what_a_crash_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("_staged_00_a.json"), "half").unwrap();
        std::fs::write(dir.path().join("a.json"), "whole").unwrap();
        remove_staged(dir.path()).unwrap();
        assert_eq!(names(dir.path()), ["a.json"]);
    }
}
