//! Which partitions are ours and where we stand in each. Values without I/O: the consumer thread tells them what
//! the group decided, the source what has become durable, and they say where to begin and what may be committed.
//!
//! Offsets are always those of the *next* record, one behind the last: that is what Kafka stores, too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The next offset in each partition of each topic: the source's position.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offsets(BTreeMap<String, BTreeMap<i32, i64>>);

impl Offsets {
    pub(super) fn get(&self, topic: &str, partition: i32) -> Option<i64> {
        self.0.get(topic)?.get(&partition).copied()
    }

    /// Without an allocation when the topic is known.
    pub(super) fn set(&mut self, topic: &str, partition: i32, next: i64) {
        if let Some(partitions) = self.0.get_mut(topic) {
            partitions.insert(partition, next);
        } else {
            self.0.insert(topic.to_owned(), BTreeMap::from([(partition, next)]));
        }
    }

    pub(super) fn remove(&mut self, topic: &str, partition: i32) -> Option<i64> {
        let partitions = self.0.get_mut(topic)?;
        let next = partitions.remove(&partition);
        if partitions.is_empty() {
            self.0.remove(topic);
        }
        next
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, i32, i64)> {
        self.0
            .iter()
            .flat_map(|(topic, partitions)| partitions.iter().map(move |(partition, next)| (topic.as_str(), *partition, *next)))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    /// Takes over everything of `newer`.
    pub(super) fn advance(&mut self, newer: &Offsets) {
        for (topic, partition, next) in newer.iter() {
            self.set(topic, partition, next);
        }
    }
}

/// What this process has to do with its partitions.
#[derive(Debug, Default)]
pub(super) struct Ownership {
    /// Ours, each with the offset at which this ownership of it began.
    owned: Offsets,
    /// From the last stored epoch; each counts once, for the first time that we get the partition.
    stored: Offsets,
    /// Handed to the engine.
    delivered: Offsets,
    /// Stored by the engine.
    durable: Offsets,
    /// Told to Kafka.
    committed: Offsets,
    /// Ours until this rebalance, and nobody else's in between.
    kept: Offsets,
    /// True from the first assignment on, also of no partitions.
    pub assigned: bool,
}

impl Ownership {
    /// Begins with what the last stored epoch says.
    pub(super) fn resuming(stored: Offsets) -> Self {
        Self { stored, ..Self::default() }
    }

    /// Where to begin in a partition that we get: where we were when the group merely reshuffled; else where the
    /// stored epoch stands, which wins over what the group has committed, since the state and the sinks of this
    /// pipeline belong to it; else not known here.
    pub(super) fn beginning(&mut self, topic: &str, partition: i32) -> Option<i64> {
        let stored = self.stored.remove(topic, partition);
        self.kept.remove(topic, partition).or(stored)
    }

    /// These partitions are ours from these offsets on.
    pub(super) fn assign(&mut self, begin: &Offsets) {
        self.owned.advance(begin);
        self.kept = Offsets::default();
        self.assigned = true;
    }

    /// A partition is not ours any more. `lost`: it may have been somebody else's for a while already.
    pub(super) fn revoke(&mut self, topic: &str, partition: i32, lost: bool) {
        let begin = self.owned.remove(topic, partition);
        let delivered = self.delivered.remove(topic, partition);
        self.committed.remove(topic, partition);
        // What is still to become durable of it must not be committed for whoever has it now.
        self.durable.remove(topic, partition);
        if !lost && let Some(next) = delivered.or(begin) {
            self.kept.set(topic, partition, next);
        }
    }

    /// Rows up to these offsets were handed to the engine.
    pub(super) fn delivered(&mut self, upto: &Offsets) {
        for (topic, partition, next) in upto.iter() {
            if self.owned.get(topic, partition).is_some() {
                self.delivered.set(topic, partition, next);
            }
        }
    }

    /// The engine has stored an epoch with this position.
    pub(super) fn durable(&mut self, position: &Offsets) {
        for (topic, partition, next) in position.iter() {
            // A position from an earlier ownership would set the group back behind what others did in between.
            if self.owned.get(topic, partition).is_some_and(|begin| next >= begin) {
                self.durable.set(topic, partition, next);
            }
        }
    }

    /// What Kafka is to be told now: durable, ours, and not told yet. It counts as told from now on.
    pub(super) fn take_committable(&mut self) -> Offsets {
        let mut news = Offsets::default();
        for (topic, partition, next) in self.durable.iter() {
            if self.committed.get(topic, partition) != Some(next) {
                news.set(topic, partition, next);
            }
        }
        self.committed.advance(&news);
        news
    }

    /// Everything that was handed to the engine from our partitions is durable.
    pub(super) fn drained(&self) -> bool {
        self.delivered
            .iter()
            .all(|(topic, partition, next)| self.durable.get(topic, partition).is_some_and(|durable| durable >= next))
    }

    /// The position of an engine that has pulled up to `pulled`: only of partitions that are ours, and at least
    /// where each of them began, so that a partition is resumed there even if nothing was read from it. Before the
    /// group has decided anything it is what was stored: an epoch of that time must not forget it.
    pub(super) fn position(&self, pulled: &Offsets) -> Offsets {
        if !self.assigned {
            return self.stored.clone();
        }
        let mut position = Offsets::default();
        for (topic, partition, begin) in self.owned.iter() {
            position.set(topic, partition, pulled.get(topic, partition).map_or(begin, |next| next.max(begin)));
        }
        position
    }

    /// Whether anything was handed to the engine in this run.
    pub(super) fn has_delivered(&self) -> bool {
        !self.delivered.is_empty()
    }

    /// Partitions that are ours.
    pub(super) fn owned(&self) -> &Offsets {
        &self.owned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(list: &[(i32, i64)]) -> Offsets {
        let mut offsets = Offsets::default();
        for (partition, next) in list {
            offsets.set("t", *partition, *next);
        }
        offsets
    }

    #[test]
    fn a_position_survives_being_stored() {
        let mut position = offsets(&[(0, 5), (12, 7)]);
        position.set("u", 0, 1);
        let json = serde_json::to_value(&position).unwrap();
        assert_eq!(json["t"]["12"], 7);
        assert_eq!(serde_json::from_value::<Offsets>(json).unwrap(), position);
        assert_eq!(position.len(), 3);
        assert_eq!(position.remove("u", 0), Some(1));
        assert!(position.get("u", 0).is_none());
    }

    #[test]
    fn the_stored_position_counts_once_and_only_for_the_first_assignment() {
        let mut ownership = Ownership::resuming(offsets(&[(0, 100)]));
        assert_eq!(ownership.beginning("t", 0), Some(100));
        assert_eq!(ownership.beginning("t", 1), None);
        ownership.assign(&offsets(&[(0, 100), (1, 3)]));
        ownership.revoke("t", 0, true);
        assert_eq!(ownership.beginning("t", 0), None, "others may have gone on from there");
    }

    #[test]
    fn only_what_is_durable_and_ours_is_committed_and_only_once() {
        let mut ownership = Ownership::default();
        ownership.assign(&offsets(&[(0, 10), (1, 10)]));
        ownership.delivered(&offsets(&[(0, 20), (1, 20)]));
        assert!(ownership.take_committable().is_empty());
        ownership.durable(&offsets(&[(0, 15), (1, 20), (2, 99)]));
        assert_eq!(ownership.take_committable(), offsets(&[(0, 15), (1, 20)]));
        assert!(ownership.take_committable().is_empty());
        assert!(!ownership.drained());
        ownership.durable(&offsets(&[(0, 20)]));
        assert!(ownership.drained());
        assert_eq!(ownership.take_committable(), offsets(&[(0, 20)]));
    }

    #[test]
    fn nothing_is_committed_for_a_lost_partition_even_when_it_comes_back() {
        let mut ownership = Ownership::default();
        ownership.assign(&offsets(&[(0, 10)]));
        ownership.delivered(&offsets(&[(0, 120)]));
        ownership.revoke("t", 0, true);
        ownership.durable(&offsets(&[(0, 120)]));
        assert!(ownership.take_committable().is_empty());
        ownership.assign(&offsets(&[(0, 500)]));
        ownership.durable(&offsets(&[(0, 120)]));
        assert!(ownership.take_committable().is_empty(), "it would set the group back");
        assert_eq!(ownership.position(&offsets(&[(0, 120)])), offsets(&[(0, 500)]));
    }

    #[test]
    fn a_reshuffle_that_gives_a_partition_back_goes_on_where_it_was() {
        let mut ownership = Ownership::default();
        ownership.assign(&offsets(&[(0, 10), (1, 10)]));
        ownership.delivered(&offsets(&[(0, 50)]));
        ownership.revoke("t", 0, false);
        ownership.revoke("t", 1, false);
        assert_eq!(ownership.beginning("t", 0), Some(50));
        ownership.assign(&offsets(&[(0, 50)]));
        assert_eq!(ownership.beginning("t", 1), None, "partition 1 went to somebody else");
    }

    #[test]
    fn a_partition_without_a_record_is_resumed_where_it_began() {
        let mut ownership = Ownership::default();
        ownership.assign(&offsets(&[(0, 10), (1, 30)]));
        assert_eq!(ownership.position(&offsets(&[(0, 12), (7, 1)])), offsets(&[(0, 12), (1, 30)]));
    }

    #[test]
    fn before_the_first_assignment_the_position_is_the_stored_one() {
        let mut ownership = Ownership::resuming(offsets(&[(0, 100)]));
        assert_eq!(ownership.position(&Offsets::default()), offsets(&[(0, 100)]));
        let begin = ownership.beginning("t", 0).unwrap();
        ownership.assign(&offsets(&[(0, begin)]));
        assert_eq!(ownership.position(&Offsets::default()), offsets(&[(0, 100)]));
    }
}
