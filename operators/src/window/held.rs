//! The rows that keys hold until their next window is full. Called by the operator alone; the invariants: a push
//! that is undone leaves no trace, each key holds fewer than `rows` rows between batches, and what is written for a
//! checkpoint does not depend on hashing.
//!
//! Rows are not stored key by key. Batches are kept as they came, as *chunks*, and a key holds only the places of its
//! rows; all windows that a batch completes are gathered from the chunks at once. Chunks are rewritten when less than
//! half of their rows is held, so that the cost of a row stays constant and no small remainder keeps much alive.

use std::collections::{BTreeSet, HashMap, HashSet};

use afferent_engine::{Error, Result, State, StateDelta};
use arrow::array::RecordBatch;
use arrow::compute::{concat_batches, interleave_record_batch};
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;

use super::aggregate::Windows;
use crate::state;

/// A chunk of up to so many rows takes up the next batch: a quiet input must not make a chunk of every row.
const SMALL: usize = 1_024;
/// Rows of a rewritten chunk.
const REWRITTEN: usize = 65_536;
/// So many rows that nobody holds are no reason to rewrite.
const SLACK: usize = 8_192;
/// The first byte of a key's stored state.
const VERSION: u8 = 1;

/// A chunk and a row in it.
type Place = (usize, usize);

/// When windows are due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rhythm {
    /// Rows of a window.
    pub(super) rows: usize,
    /// Rows from one window to the next; at most `rows`.
    pub(super) step: usize,
    /// Keys that may hold rows at once.
    pub(super) max_keys: usize,
}

/// What one batch did.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    /// The rows of all windows that it completed, in the order in which it completed them.
    pub(super) places: Vec<Place>,
    pub(super) windows: Windows,
    /// Rows of keys for which there was no room.
    pub(super) refused: Vec<usize>,
    touched: Vec<usize>,
    keys_before: usize,
    rows_before: usize,
}

#[derive(Debug, Default)]
struct Key {
    bytes: Box<[u8]>,
    places: Vec<Place>,
    /// How many of `places` are no longer held, while a batch is under way.
    passed: usize,
    /// How many `places` there were before the batch under way.
    before: usize,
    touched: bool,
    /// Whether a window of this key has left, so that the rows it shares with the next one were in it.
    emitted: bool,
}

impl Key {
    fn len(&self) -> usize {
        self.places.len() - self.passed
    }
}

#[derive(Debug)]
pub(super) struct Held {
    schema: SchemaRef,
    rhythm: Rhythm,
    slots: HashMap<Box<[u8]>, usize>,
    keys: Vec<Key>,
    free: Vec<usize>,
    chunks: Vec<RecordBatch>,
    /// Keys that hold rows.
    holding: usize,
    /// Rows that are held.
    rows: usize,
    /// Keys that changed since the last snapshot, in order.
    changed: BTreeSet<Box<[u8]>>,
    /// Keys of the stored state.
    stored: HashSet<Box<[u8]>>,
}

impl Held {
    pub(super) fn new(schema: SchemaRef, rhythm: Rhythm) -> Self {
        Self {
            schema,
            rhythm,
            slots: HashMap::new(),
            keys: Vec::new(),
            free: Vec::new(),
            chunks: Vec::new(),
            holding: 0,
            rows: 0,
            changed: BTreeSet::new(),
            stored: HashSet::new(),
        }
    }

    /// Takes rows up, in order. Must be followed by [`Held::keep`] or [`Held::undo`].
    pub(super) fn push<'k>(
        &mut self,
        rows: RecordBatch,
        key_of: impl Fn(usize) -> &'k [u8],
    ) -> std::result::Result<Pushed, ArrowError> {
        let count = rows.num_rows();
        let (chunk, first) = self.add_chunk(rows)?;
        let mut pushed = Pushed { keys_before: self.holding, rows_before: self.rows, ..Pushed::default() };
        for row in 0..count {
            let bytes = key_of(row);
            let slot = self.slots.get(bytes).copied();
            if slot.is_none_or(|slot| self.keys[slot].len() == 0) {
                if self.holding == self.rhythm.max_keys {
                    pushed.refused.push(row);
                    continue;
                }
                self.holding += 1;
            }
            let slot = slot.unwrap_or_else(|| self.open(bytes));
            let key = &mut self.keys[slot];
            if !key.touched {
                key.touched = true;
                key.before = key.places.len();
                pushed.touched.push(slot);
            }
            key.places.push((chunk, first + row));
            self.rows += 1;
            if key.len() == self.rhythm.rows {
                pushed.places.extend_from_slice(&key.places[key.passed..]);
                pushed.windows.push(self.rhythm.rows);
                key.passed += self.rhythm.step;
                self.rows -= self.rhythm.step;
                if key.len() == 0 {
                    self.holding -= 1;
                }
            }
        }
        Ok(pushed)
    }

    /// Makes a push final.
    pub(super) fn keep(&mut self, pushed: Pushed) {
        for slot in pushed.touched {
            let key = &mut self.keys[slot];
            key.touched = false;
            key.emitted |= key.passed > 0;
            key.places.drain(..std::mem::take(&mut key.passed));
            if !self.changed.contains(&key.bytes) {
                self.changed.insert(key.bytes.clone());
            }
            if self.keys[slot].places.is_empty() {
                self.close(slot);
            }
        }
        self.rewrite_if_worthwhile();
    }

    /// Takes a push back.
    pub(super) fn undo(&mut self, pushed: Pushed) {
        for slot in pushed.touched {
            let key = &mut self.keys[slot];
            key.touched = false;
            key.passed = 0;
            key.places.truncate(key.before);
            if key.places.is_empty() {
                self.close(slot);
            }
        }
        self.holding = pushed.keys_before;
        self.rows = pushed.rows_before;
    }

    fn open(&mut self, bytes: &[u8]) -> usize {
        let key = Key { bytes: bytes.into(), ..Key::default() };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.keys[slot] = key;
                slot
            }
            None => {
                self.keys.push(key);
                self.keys.len() - 1
            }
        };
        self.slots.insert(bytes.into(), slot);
        slot
    }

    fn close(&mut self, slot: usize) {
        let key = std::mem::take(&mut self.keys[slot]);
        self.slots.remove(&key.bytes);
        self.free.push(slot);
    }

    /// The chunk that now has these rows, and the row in it where they begin.
    fn add_chunk(&mut self, rows: RecordBatch) -> std::result::Result<Place, ArrowError> {
        let last = self.chunks.len().checked_sub(1);
        if let Some(last) = last.filter(|last| self.chunks[*last].num_rows() + rows.num_rows() <= SMALL) {
            let first = self.chunks[last].num_rows();
            self.chunks[last] = concat_batches(&self.schema, [&self.chunks[last], &rows])?;
            return Ok((last, first));
        }
        self.chunks.push(rows);
        Ok((self.chunks.len() - 1, 0))
    }

    /// The rows at these places, in this order.
    pub(super) fn gather(&self, places: &[Place]) -> std::result::Result<RecordBatch, ArrowError> {
        if places.is_empty() {
            return Ok(RecordBatch::new_empty(self.schema.clone()));
        }
        let chunks: Vec<&RecordBatch> = self.chunks.iter().collect();
        interleave_record_batch(&chunks, places)
    }

    fn rewrite_if_worthwhile(&mut self) {
        let stored: usize = self.chunks.iter().map(RecordBatch::num_rows).sum();
        if stored <= 2 * self.rows + SLACK {
            return;
        }
        let places: Vec<Place> = self.keys.iter().flat_map(|key| key.places.iter().copied()).collect();
        let rewritten: std::result::Result<Vec<_>, _> = places.chunks(REWRITTEN).map(|places| self.gather(places)).collect();
        // Values too large for one chunk stay where they are: that costs memory and loses nothing.
        let Ok(rewritten) = rewritten else {
            return;
        };
        self.chunks = rewritten;
        let places = self.keys.iter_mut().flat_map(|key| &mut key.places);
        for (row, place) in places.enumerate() {
            *place = (row / REWRITTEN, row % REWRITTEN);
        }
    }

    /// For each key, in the order of their bytes: the places of its rows, and how many of these were in no window.
    pub(super) fn incomplete(&self) -> Vec<(&[Place], usize)> {
        let mut keys: Vec<&Key> = self.keys.iter().filter(|key| !key.places.is_empty()).collect();
        keys.sort_unstable_by(|a, b| a.bytes.cmp(&b.bytes));
        let shared = self.rhythm.rows - self.rhythm.step;
        let seen = |key: &Key| if key.emitted { shared } else { 0 };
        keys.into_iter().map(|key| (key.places.as_slice(), key.places.len() - seen(key))).collect()
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.changed.extend(self.slots.drain().map(|(bytes, _)| bytes));
        self.keys.clear();
        self.free.clear();
        self.chunks.clear();
        self.holding = 0;
        self.rows = 0;
    }

    /// The keys that changed since the last call, each with its rows.
    ///
    /// # Errors
    /// Fatal when the rows cannot be written.
    pub(super) fn snapshot(&mut self) -> Result<StateDelta> {
        let mut delta = StateDelta::default();
        let (mut places, mut kept) = (Vec::new(), Vec::new());
        for bytes in std::mem::take(&mut self.changed) {
            if let Some(slot) = self.slots.get(&bytes) {
                let key = &self.keys[*slot];
                places.extend_from_slice(&key.places);
                kept.push((bytes, key.places.len(), key.emitted));
            } else if self.stored.remove(&bytes) {
                delta.deletes.push(bytes.into_vec());
            }
        }
        let rows = self.gather(&places).map_err(Error::fatal)?;
        let mut start = 0;
        for (bytes, count, emitted) in kept {
            let mut value = vec![VERSION, u8::from(emitted)];
            state::write(&rows.slice(start, count), &mut value)?;
            start += count;
            self.stored.insert(bytes.clone());
            delta.puts.push((bytes.into_vec(), value));
        }
        Ok(delta)
    }

    /// Takes up stored keys. `key_of` makes the key of a batch's first row: a key that does not come out as it was
    /// stored would silently begin a second life, and is refused.
    ///
    /// # Errors
    /// Fatal when the state is not readable under this configuration.
    pub(super) fn restore(&mut self, state: State, key_of: impl Fn(&RecordBatch) -> Result<Box<[u8]>>) -> Result<()> {
        let unreadable = || Error::fatal("the stored state of a window stage is not readable");
        let mut waiting: Vec<RecordBatch> = Vec::new();
        let mut waiting_rows = 0;
        for (bytes, value) in state {
            let [VERSION, emitted @ (0 | 1), rows @ ..] = value.as_slice() else {
                return Err(unreadable());
            };
            let rows = state::read(&self.schema, rows)?;
            let count = rows.num_rows();
            let shared = if *emitted == 1 { self.rhythm.rows - self.rhythm.step } else { 0 };
            let plausible = count > 0 && count >= shared && count < self.rhythm.rows;
            if !plausible || *key_of(&rows)? != *bytes {
                return Err(unreadable());
            }
            let chunk = self.chunks.len();
            let slot = self.open(&bytes);
            let key = &mut self.keys[slot];
            key.emitted = *emitted == 1;
            key.places = (waiting_rows..waiting_rows + count).map(|row| (chunk, row)).collect();
            self.stored.insert(bytes.into());
            self.holding += 1;
            self.rows += count;
            waiting.push(rows);
            waiting_rows += count;
            if waiting_rows >= REWRITTEN {
                self.chunks.push(concat_batches(&self.schema, &waiting).map_err(Error::fatal)?);
                waiting.clear();
                waiting_rows = 0;
            }
        }
        if !waiting.is_empty() {
            self.chunks.push(concat_batches(&self.schema, &waiting).map_err(Error::fatal)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, AsArray, Int32Array};
    use arrow::datatypes::Int32Type;

    use super::*;

    fn rows(numbers: impl IntoIterator<Item = i32>) -> RecordBatch {
        let n: ArrayRef = Arc::new(Int32Array::from_iter_values(numbers));
        RecordBatch::try_from_iter([("n", n)]).unwrap()
    }

    fn held(rows_each: usize, step: usize, max_keys: usize) -> Held {
        Held::new(rows([]).schema(), Rhythm { rows: rows_each, step, max_keys })
    }

    /// Keys are single bytes here.
    fn push(held: &mut Held, numbers: &[i32], keys: &[u8]) -> Pushed {
        let key_of = move |row: usize| std::slice::from_ref(&keys[row]);
        held.push(rows(numbers.iter().copied()), key_of).unwrap()
    }

    fn numbers(held: &Held, places: &[Place]) -> Vec<i32> {
        held.gather(places).unwrap().column(0).as_primitive::<Int32Type>().values().to_vec()
    }

    fn keep(held: &mut Held, numbers_in: &[i32], keys: &[u8]) -> Vec<i32> {
        let pushed = push(held, numbers_in, keys);
        let out = numbers(held, &pushed.places);
        held.keep(pushed);
        out
    }

    fn key(bytes: &'static [u8]) -> impl Fn(&RecordBatch) -> Result<Box<[u8]>> {
        move |_| Ok(bytes.into())
    }

    #[test]
    fn windows_leave_in_the_order_in_which_they_are_full() {
        let mut held = held(3, 2, 9);
        assert!(keep(&mut held, &[1, 10, 2], b"aba").is_empty());
        assert_eq!(keep(&mut held, &[11, 12, 3, 4, 5], b"bbaaa"), [10, 11, 12, 1, 2, 3, 3, 4, 5]);
        let incomplete = held.incomplete();
        let incomplete: Vec<_> = incomplete.iter().map(|(places, unseen)| (numbers(&held, places), *unseen)).collect();
        assert_eq!(incomplete, [(vec![5], 0), (vec![12], 0)]);
    }

    #[test]
    fn an_undone_push_leaves_no_trace() {
        let mut held = held(3, 3, 2);
        keep(&mut held, &[1, 2], b"aa");
        let before = held.snapshot().unwrap();
        let pushed = push(&mut held, &[3, 4, 5, 6], b"aabc");
        assert_eq!(pushed.windows.len(), 1);
        assert_eq!(pushed.refused, [3]);
        held.undo(pushed);
        assert!(held.snapshot().unwrap().is_empty());
        assert_eq!(keep(&mut held, &[3], b"a"), [1, 2, 3]);
        assert_eq!(held.snapshot().unwrap().deletes, [before.puts[0].0.clone()]);
        assert_eq!((held.holding, held.rows, held.slots.len()), (0, 0, 0));
    }

    #[test]
    fn a_key_that_holds_nothing_makes_room_within_a_batch() {
        let mut held = held(2, 2, 1);
        let pushed = push(&mut held, &[1, 2, 3, 4, 5], b"abacc");
        assert_eq!(pushed.refused, [1]);
        assert_eq!(numbers(&held, &pushed.places), [1, 3, 4, 5]);
        held.keep(pushed);
        assert!(held.snapshot().unwrap().is_empty());
    }

    #[test]
    fn chunks_are_joined_while_small_and_rewritten_when_mostly_passed() {
        let mut held = held(2, 2, 9);
        assert!(keep(&mut held, &[7], b"z").is_empty());
        for round in 0..600 {
            assert_eq!(keep(&mut held, &[round, -round], b"aa"), [round, -round]);
        }
        assert_eq!(held.chunks.len(), 2);
        for round in 0..20 {
            let many: Vec<i32> = (0..1_000).map(|n| n + round).collect();
            assert_eq!(keep(&mut held, &many, &[b'a'; 1_000]), many);
        }
        let stored: usize = held.chunks.iter().map(RecordBatch::num_rows).sum();
        assert!(stored <= SLACK + 1_000, "{stored}");
        assert_eq!(keep(&mut held, &[8], b"z"), [7, 8]);
    }

    #[test]
    fn a_snapshot_has_what_changed_in_order_and_is_taken_up_again() {
        let mut first = held(4, 2, 9);
        keep(&mut first, &[1, 2, 3, 4, 10, 20], b"aaaabc");
        let delta = first.snapshot().unwrap();
        let keys: Vec<_> = delta.puts.iter().map(|(key, _)| key.as_slice()).collect();
        assert_eq!(keys, [b"a", b"b", b"c"]);
        keep(&mut first, &[11], b"b");
        assert_eq!(first.snapshot().unwrap().puts.len(), 1);

        let mut second = held(4, 2, 9);
        second.restore(delta.puts[..1].to_vec(), key(b"a")).unwrap();
        assert_eq!(keep(&mut second, &[5, 6], b"aa"), [3, 4, 5, 6]);
        assert!(held(4, 2, 9).restore(delta.puts[1..2].to_vec(), key(b"other")).is_err());
        assert!(held(4, 2, 9).restore(vec![(b"a".to_vec(), vec![9])], key(b"a")).is_err());
    }

    #[test]
    fn nothing_is_left_after_the_end() {
        let mut held = held(3, 1, 9);
        keep(&mut held, &[1, 2], b"ab");
        assert_eq!(held.snapshot().unwrap().puts.len(), 2);
        held.clear();
        assert_eq!(held.snapshot().unwrap().deletes, [b"a".to_vec(), b"b".to_vec()]);
        assert!(held.incomplete().is_empty());
    }
}
