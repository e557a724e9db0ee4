//! The name under which a `kafka` source is a member of its group (`group.instance.id`). The brokers keep a named
//! member's partitions for it as long as its session lasts, so that a process that was killed has them back at once.
//! The name contains a random number that is kept in the data directory, in a file for each source. The invariant: two
//! processes never have the same name, since a data directory is locked by one of them; only copies of it would.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use afferent_engine::component::BuildContext;
use afferent_engine::{Error, Result, durable};

/// Most letters of a pipeline's or a stage's name in the member's: Kafka allows 249 in all.
const LETTERS: usize = 80;

/// One source's membership.
#[derive(Debug)]
pub(super) struct Member {
    /// What the name begins with, for those who read the group's description.
    prefix: String,
    /// Where the random number is kept.
    file: PathBuf,
}

impl Member {
    /// That of the stage which is being built.
    pub(super) fn of(context: &BuildContext) -> Self {
        Self::at(&context.data_dir, &context.pipeline, &context.stage)
    }

    fn at(data_dir: &Path, pipeline: &str, stage: &str) -> Self {
        let (pipeline, stage) = (legal(pipeline), legal(stage));
        let file = data_dir.join("pipelines").join(&pipeline).join(format!("{stage}.kafka-member"));
        Self { prefix: format!("afferent-{pipeline}-{stage}"), file }
    }

    /// The name; the same at every start on this data directory.
    ///
    /// # Errors
    /// `Retry` when the file can neither be read nor written.
    pub(super) fn name(&self) -> Result<String> {
        let number = match std::fs::read_to_string(&self.file) {
            Ok(text) if is_number(text.trim()) => Ok(text.trim().to_owned()),
            Ok(_) => self.draw(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.draw(),
            Err(error) => Err(error),
        };
        match number {
            Ok(number) => Ok(format!("{}-{number}", self.prefix)),
            Err(error) => Err(Error::retry(error).context(format!("keeping the name in the group in {}", self.file.display()))),
        }
    }

    /// Draws a number and keeps it: whole or not at all, whenever the power fails.
    fn draw(&self) -> io::Result<String> {
        let number = format!("{:016x}", fastrand::u64(..));
        if let Some(folder) = self.file.parent() {
            durable::create_dir(folder)?;
        }
        let new = self.file.with_extension("kafka-member.new");
        let mut file = File::create(&new)?;
        file.write_all(number.as_bytes())?;
        durable::sync(&file, &new);
        durable::rename(&new, &self.file)?;
        Ok(number)
    }
}

fn is_number(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The name in the letters that Kafka allows, which are no path either.
fn legal(name: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' };
    name.chars().take(LETTERS).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_in_the_data_directory_and_belongs_to_one_source() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = |folder: &tempfile::TempDir, stage: &str| Member::at(folder.path(), "p", stage).name().unwrap();
        let first = name(&one, "a");
        assert!(first.starts_with("afferent-p-a-"), "{first}");
        assert_eq!(name(&one, "a"), first, "after a restart");
        assert_ne!(name(&one, "b"), first);
        assert_ne!(name(&other, "a"), first, "on another data directory, wherever it lies");
    }

    #[test]
    fn a_damaged_file_gives_a_new_name() {
        let folder = tempfile::tempdir().unwrap();
        let member = Member::at(folder.path(), "p", "a");
        member.name().unwrap();
        std::fs::write(&member.file, "").unwrap();
        let second = member.name().unwrap();
        assert!(second.len() > "afferent-p-a-".len());
        assert_eq!(member.name().unwrap(), second);
    }

    #[test]
    fn kafka_takes_the_name_whatever_the_stage_is_called() {
        let folder = tempfile::tempdir().unwrap();
        let name = Member::at(folder.path(), "../p q", &"é".repeat(300)).name().unwrap();
        assert!(name.len() <= 249 && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-')), "{name}");
        assert!(folder.path().join("pipelines/___p_q").is_dir());
    }
}
