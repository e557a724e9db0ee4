//! Which partitions are ours and where we stand in each. Values without I/O: the consumer thread tells them what
//! the group decided, the source what it has pulled and what has become durable, and they say where to begin, what
//! may be committed, and what the source's position is.
//!
//! *Nothing is forgotten.* The position names every partition that this pipeline has ever had to do with, whoever
//! owns it now: a crash may come between losing a partition and getting it back, when Kafka knows less than we do.
//! *Nothing stale wins.* Where others have committed more than we know, they made it durable, and we go on there.
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
}

/// What this process has to do with its partitions.
#[derive(Debug, Default)]
pub(super) struct Ownership {
    /// Ours, each with the offset at which this ownership of it began.
    owned: Offsets,
    /// Not ours now: how far this pipeline had got when it had them last, as far as it remembers.
    known: Offsets,
    /// Of ours, handed to the engine's side of the channel.
    delivered: Offsets,
    /// Of ours, pulled by the engine.
    pulled: Offsets,
    /// Of ours, stored by the engine.
    durable: Offsets,
    /// Of ours, told to Kafka.
    committed: Offsets,
    /// True from the first assignment on, also of no partitions.
    pub assigned: bool,
}

impl Ownership {
    /// Begins with what the last stored epoch says.
    pub(super) fn resuming(stored: Offsets) -> Self {
        Self { known: stored, ..Self::default() }
    }

    /// Where to begin in a partition that we get, where the group has committed `group`: at the further of that and
    /// what we know. Ours is further after a crash between storing an epoch and telling Kafka, and the state and the
    /// sinks of this pipeline belong to it. The group's is further when another process had the partition meanwhile,
    /// which has committed only what is durable there. Where neither is known, the configuration says it.
    pub(super) fn beginning(&self, topic: &str, partition: i32, group: Option<i64>) -> Option<i64> {
        self.known.get(topic, partition).max(group)
    }

    /// These partitions are ours from these offsets on.
    pub(super) fn assign(&mut self, begin: &Offsets) {
        for (topic, partition, next) in begin.iter() {
            self.known.remove(topic, partition);
            self.owned.set(topic, partition, next);
        }
        self.assigned = true;
    }

    /// A partition is not ours any more.
    pub(super) fn revoke(&mut self, topic: &str, partition: i32) {
        self.delivered.remove(topic, partition);
        self.committed.remove(topic, partition);
        // What is still to become durable of it must not be committed for whoever has it now.
        self.durable.remove(topic, partition);
        let begin = self.owned.remove(topic, partition);
        if let Some(next) = self.pulled.remove(topic, partition).or(begin) {
            self.known.set(topic, partition, next);
        }
    }

    /// Rows up to these offsets are on their way to the engine.
    pub(super) fn delivered(&mut self, upto: &Offsets) {
        for (topic, partition, next) in upto.iter() {
            if self.owned.get(topic, partition).is_some() {
                self.delivered.set(topic, partition, next);
            }
        }
    }

    /// The engine has pulled rows up to these offsets; also of partitions that went away under way, because an
    /// epoch that holds the rows must have a position behind them.
    pub(super) fn pulled(&mut self, upto: &Offsets) {
        for (topic, partition, next) in upto.iter() {
            let ours = self.owned.get(topic, partition).is_some();
            let place = if ours { &mut self.pulled } else { &mut self.known };
            place.set(topic, partition, next);
        }
    }

    /// The engine has stored an epoch with this position.
    pub(super) fn durable(&mut self, position: &Offsets) {
        for (topic, partition, next) in position.iter() {
            let Some(begin) = self.owned.get(topic, partition) else { continue };
            let pulled = self.pulled.get(topic, partition).unwrap_or(begin);
            let durable = self.durable.get(topic, partition).unwrap_or(begin);
            // A position from an earlier ownership would set the group back behind what others did in between.
            if (durable..=pulled).contains(&next) {
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
        for (topic, partition, next) in news.iter() {
            self.committed.set(topic, partition, next);
        }
        news
    }

    /// Everything that was handed to the engine from our partitions is durable.
    pub(super) fn drained(&self) -> bool {
        self.delivered
            .iter()
            .all(|(topic, partition, next)| self.durable.get(topic, partition).is_some_and(|durable| durable >= next))
    }

    /// Just behind the last row that the engine has pulled, in every partition that we know: in ours at least where
    /// each began, so that a partition is resumed there even if nothing was read from it; in the others where we were.
    pub(super) fn position(&self) -> Offsets {
        let mut position = self.known.clone();
        for (topic, partition, begin) in self.owned.iter() {
            position.set(topic, partition, self.pulled.get(topic, partition).unwrap_or(begin));
        }
        position
    }

    /// Whether anything was handed to the engine from partitions that are ours.
    pub(super) fn has_delivered(&self) -> bool {
        !self.delivered.is_empty()
    }

    /// Partitions that are ours.
    pub(super) fn owned(&self) -> &Offsets {
        &self.owned
    }
}

/// What to do when a partition does not hold the offset at which to begin: librdkafka's `auto.offset.reset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    Fail,
    Earliest,
    Latest,
}

impl Reset {
    /// From librdkafka's words for it; what is not known here, librdkafka has refused.
    pub(super) fn of(option: Option<&str>) -> Self {
        match option.unwrap_or_default().to_ascii_lowercase().as_str() {
            "smallest" | "earliest" | "beginning" => Self::Earliest,
            "largest" | "latest" | "end" => Self::Latest,
            _ => Self::Fail,
        }
    }

    /// Where to begin in a partition that holds the offsets from `low` to before `high` when it should be at `next`,
    /// and how many records nobody will read because of it, at most. The error says why it cannot be.
    pub(super) fn apply(self, next: i64, low: i64, high: i64) -> Result<(i64, u64), String> {
        if (low..=high).contains(&next) {
            return Ok((next, 0));
        }
        // Ends before: the topic was made anew, and is read from its beginning. Begins behind: only the rest is there.
        let unread = if next > high { low } else { next };
        let begin = match (self, next > high) {
            (Self::Earliest, _) => low,
            (Self::Latest, _) => high,
            (Self::Fail, true) => {
                return Err(format!(
                    "it ends at offset {high}, and this pipeline or its group had got to {next}: the topic was made anew, or \
                     it has lost records; `options: {{ auto.offset.reset: earliest }}` reads what it holds now"
                ));
            }
            (Self::Fail, false) => {
                return Err(format!(
                    "it begins at offset {low}, and this pipeline or its group had got to {next}: records were deleted \
                     before they were read; `options: {{ auto.offset.reset: earliest }}` goes on behind the gap"
                ));
            }
        };
        Ok((begin, u64::try_from(begin - unread).unwrap_or(0)))
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

    /// Owns these partitions from these offsets on, and nobody has committed anything.
    fn owning(list: &[(i32, i64)]) -> Ownership {
        let mut ownership = Ownership::default();
        ownership.assign(&offsets(list));
        ownership
    }

    /// The engine gets rows up to there.
    fn flow(ownership: &mut Ownership, list: &[(i32, i64)]) {
        ownership.delivered(&offsets(list));
        ownership.pulled(&offsets(list));
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
    fn it_begins_at_the_further_of_what_we_know_and_what_the_group_has() {
        let ownership = Ownership::resuming(offsets(&[(0, 100)]));
        assert_eq!(ownership.beginning("t", 0, None), Some(100));
        assert_eq!(ownership.beginning("t", 0, Some(80)), Some(100), "a crash before Kafka was told");
        assert_eq!(ownership.beginning("t", 0, Some(150)), Some(150), "another process went on");
        assert_eq!(ownership.beginning("t", 1, Some(3)), Some(3));
        assert_eq!(ownership.beginning("t", 1, None), None);
    }

    #[test]
    fn only_what_is_durable_and_ours_is_committed_and_only_once() {
        let mut ownership = owning(&[(0, 10), (1, 10)]);
        flow(&mut ownership, &[(0, 20), (1, 20)]);
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
        let mut ownership = owning(&[(0, 10)]);
        flow(&mut ownership, &[(0, 120)]);
        ownership.revoke("t", 0);
        ownership.durable(&offsets(&[(0, 120)]));
        assert!(ownership.take_committable().is_empty());
        ownership.assign(&offsets(&[(0, 500)]));
        ownership.durable(&offsets(&[(0, 120)]));
        assert!(ownership.take_committable().is_empty(), "it would set the group back");
        assert_eq!(ownership.position(), offsets(&[(0, 500)]));
    }

    #[test]
    fn what_was_pulled_and_is_not_durable_is_not_committed_by_a_reassignment() {
        let mut ownership = owning(&[(0, 10)]);
        flow(&mut ownership, &[(0, 50)]);
        ownership.revoke("t", 0);
        ownership.assign(&offsets(&[(0, 50)]));
        assert!(ownership.take_committable().is_empty());
    }

    #[test]
    fn a_partition_that_comes_back_goes_on_where_it_was_or_where_others_got_to() {
        let mut ownership = owning(&[(0, 10), (1, 10)]);
        flow(&mut ownership, &[(0, 50)]);
        ownership.durable(&offsets(&[(0, 50)]));
        ownership.revoke("t", 0);
        ownership.revoke("t", 1);
        assert_eq!(ownership.beginning("t", 0, Some(50)), Some(50));
        assert_eq!(ownership.beginning("t", 1, Some(30)), Some(30), "partition 1 was somebody else's");
    }

    #[test]
    fn between_revoke_and_assign_the_position_forgets_nothing() {
        let mut ownership = Ownership::resuming(offsets(&[(0, 100), (1, 50)]));
        assert_eq!(ownership.position(), offsets(&[(0, 100), (1, 50)]), "before the group has decided anything");
        // At first the group gives us one of the two only, and nothing is read from it.
        ownership.assign(&offsets(&[(0, 100)]));
        assert_eq!(ownership.position(), offsets(&[(0, 100), (1, 50)]));
        flow(&mut ownership, &[(0, 120)]);
        assert_eq!(ownership.position(), offsets(&[(0, 120), (1, 50)]));
        ownership.durable(&offsets(&[(0, 120), (1, 50)]));
        ownership.revoke("t", 0);
        assert_eq!(ownership.position(), offsets(&[(0, 120), (1, 50)]), "nothing is ours");
        ownership.assign(&offsets(&[(1, 70)]));
        assert_eq!(ownership.position(), offsets(&[(0, 120), (1, 70)]));
    }

    #[test]
    fn the_position_is_neither_ahead_of_nor_behind_what_was_pulled_when_a_partition_goes_away_under_way() {
        let mut ownership = owning(&[(0, 10)]);
        ownership.delivered(&offsets(&[(0, 40)]));
        ownership.pulled(&offsets(&[(0, 20)]));
        ownership.revoke("t", 0);
        assert_eq!(ownership.position(), offsets(&[(0, 20)]), "rows to 40 are still in the channel");
        ownership.pulled(&offsets(&[(0, 40)]));
        assert_eq!(ownership.position(), offsets(&[(0, 40)]));
    }

    #[test]
    fn a_partition_without_a_record_is_resumed_where_it_began() {
        let mut ownership = owning(&[(0, 10), (1, 30)]);
        flow(&mut ownership, &[(0, 12)]);
        assert_eq!(ownership.position(), offsets(&[(0, 12), (1, 30)]));
        ownership.revoke("t", 1);
        assert_eq!(ownership.position(), offsets(&[(0, 12), (1, 30)]));
    }

    #[test]
    fn a_topic_that_was_made_anew_leaves_nothing_of_the_old_one() {
        let mut ownership = Ownership::resuming(offsets(&[(0, 1000)]));
        ownership.assign(&offsets(&[(0, 0)]));
        assert_eq!(ownership.position(), offsets(&[(0, 0)]));
        ownership.durable(&offsets(&[(0, 1000)]));
        assert!(ownership.take_committable().is_empty(), "that is an offset of the old one");
        flow(&mut ownership, &[(0, 10)]);
        ownership.durable(&offsets(&[(0, 10)]));
        assert_eq!(ownership.take_committable(), offsets(&[(0, 10)]));
    }

    #[test]
    fn an_offset_that_the_partition_does_not_hold_is_an_error_or_counted() {
        for reset in [Reset::Fail, Reset::Earliest, Reset::Latest] {
            for next in [20, 25, 30] {
                assert_eq!(reset.apply(next, 20, 30), Ok((next, 0)));
            }
        }
        assert!(Reset::Fail.apply(5, 20, 30).is_err_and(|e| e.contains("deleted")));
        assert!(Reset::Fail.apply(1000, 0, 10).is_err_and(|e| e.contains("anew")));
        assert_eq!(Reset::Earliest.apply(5, 20, 30), Ok((20, 15)));
        assert_eq!(Reset::Latest.apply(5, 20, 30), Ok((30, 25)));
        assert_eq!(Reset::Earliest.apply(1000, 0, 10), Ok((0, 0)));
        assert_eq!(Reset::Latest.apply(1000, 0, 10), Ok((10, 10)));
    }

    #[test]
    fn librdkafkas_words_for_a_reset_are_known() {
        assert_eq!(Reset::of(None), Reset::Fail);
        assert_eq!(Reset::of(Some("error")), Reset::Fail);
        assert_eq!(Reset::of(Some("smallest")), Reset::Earliest);
        assert_eq!(Reset::of(Some("end")), Reset::Latest);
    }
}
