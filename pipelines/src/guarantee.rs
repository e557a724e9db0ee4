//! What each path from a source to a sink really gives, worked out from what the source replays, what the
//! sink makes of a second time, and where rows may be dropped on the way. Nothing here is declared: a
//! declaration is only compared with it. Also which operators hold rows of a source that may lose them to another
//! process, which the planner refuses.

use std::collections::BTreeSet;
use std::time::Duration;

use afferent_engine::component::{Delivery, Replay};
use afferent_engine::graph::Overflow;
use serde::Serialize;

use crate::plan::{Part, PlannedStage};
use crate::spec::Guarantee;

/// The guarantee from one source to one sink, over all the ways between them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PathGuarantee {
    /// The source's name.
    pub source: String,
    /// The sink's name.
    pub sink: String,
    /// What a reader of the sink can count on.
    pub guarantee: Guarantee,
    /// Why it is that and not more, in words; why it is that, when there is no more.
    pub reasons: Vec<String>,
}

/// The guarantees of all pairs that are connected, in the order of the stages.
pub fn paths(stages: &[PlannedStage]) -> Vec<PathGuarantee> {
    let mut paths = Vec::new();
    for (index, source) in stages.iter().enumerate() {
        let Part::Source { replay, .. } = &source.part else { continue };
        let reached = reach(stages, index);
        for (sink, droppers) in stages.iter().zip(reached) {
            if let (Part::Sink { delivery, .. }, Some(droppers)) = (&sink.part, droppers) {
                let (guarantee, reasons) = combine(replay, delivery, &droppers);
                paths.push(PathGuarantee { source: source.name.clone(), sink: sink.name.clone(), guarantee, reasons });
            }
        }
    }
    paths
}

/// For each stage that rows of `source` reach: what drops rows on some way there.
fn reach(stages: &[PlannedStage], source: usize) -> Vec<Option<BTreeSet<String>>> {
    let mut reached: Vec<Option<BTreeSet<String>>> = vec![None; stages.len()];
    reached[source] = Some(BTreeSet::new());
    for (index, stage) in stages.iter().enumerate() {
        for input in &stage.inputs {
            let Some(mut droppers) = reached[input.from].clone() else { continue };
            if let Some(policy) = dropping(input.overflow) {
                droppers.insert(format!("rows are dropped in front of `{}` when its queue is full ({policy})", stage.name));
            }
            reached[index].get_or_insert_default().extend(droppers);
        }
    }
    reached
}

/// An operator that holds rows of a source whose parts may move to another process while it runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stranded<'p> {
    /// The operator's name.
    pub(crate) operator: &'p str,
    /// The source's name.
    pub(crate) source: &'p str,
    /// What to write at the source.
    pub(crate) help: &'p str,
}

/// The first operators that hold rows behind each source whose parts may move; what holds rows behind those is mended
/// with them.
pub(crate) fn stranded(stages: &[PlannedStage]) -> Vec<Stranded<'_>> {
    let mut found = Vec::new();
    for (index, source) in stages.iter().enumerate() {
        let Part::Source { moves: Some(help), .. } = &source.part else { continue };
        let mut reached = vec![false; stages.len()];
        reached[index] = true;
        for (index, stage) in stages.iter().enumerate() {
            if !stage.inputs.iter().any(|input| reached[input.from]) {
                continue;
            }
            if matches!(stage.part, Part::Operator { stateful: true, .. }) {
                found.push(Stranded { operator: &stage.name, source: &source.name, help });
            } else {
                reached[index] = true;
            }
        }
    }
    found
}

/// The word of a policy that drops rows.
pub(crate) fn dropping(overflow: Overflow) -> Option<&'static str> {
    match overflow {
        Overflow::Block => None,
        Overflow::DropOldest => Some("drop_oldest"),
        Overflow::DropNewest => Some("drop_newest"),
    }
}

fn combine(replay: &Replay, delivery: &Delivery, droppers: &BTreeSet<String>) -> (Guarantee, Vec<String>) {
    let mut losses: Vec<String> = Vec::new();
    if let Replay::Lost(why) = replay {
        losses.push(format!("the source cannot repeat rows: {why}"));
    }
    losses.extend(droppers.iter().cloned());
    if let Delivery::AtMostOnce(why) = delivery {
        losses.push(format!("the sink may lose rows: {why}"));
    }
    if !losses.is_empty() {
        return (Guarantee::AtMostOnce, losses);
    }
    let mut repeats = Vec::new();
    if let Replay::Redelivered(condition) = replay {
        repeats.push(format!("the source may send rows twice: {condition}"));
    }
    if let Delivery::AtLeastOnce(why) = delivery {
        repeats.push(format!("the sink may write rows twice: {why}"));
    }
    if repeats.is_empty() {
        let reason = "the source goes back to a stored position, and the sink commits with it".to_owned();
        return (Guarantee::ExactlyOnce, vec![reason]);
    }
    (Guarantee::AtLeastOnce, repeats)
}

/// What limits the rate of a source whose peer waits for acknowledgements, in words. `pace` is the least
/// time between two commits.
pub fn rate_note(stage: &str, in_flight: u64, why: &str, pace: Duration) -> String {
    let pace = afferent_engine::config::Interval(pace);
    format!(
        "`{stage}` gets at most {in_flight} messages ahead of their acknowledgement ({why}): its rate is at most {in_flight} per commit \
         round trip; a commit starts as soon as that window is full and does not wait for the interval of {pace}"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use afferent_engine::graph::{Port, QueueLimit};
    use arrow::datatypes::Schema;

    use super::*;
    use crate::plan::PlannedInput;

    /// A stage that reads those with these indexes.
    fn stage(name: &str, from: &[usize], part: Part) -> PlannedStage {
        let input = |from: &usize| PlannedInput {
            name: from.to_string(),
            from: *from,
            port: Port::Output(0),
            schema: Arc::new(Schema::empty()),
            queue: QueueLimit::default(),
            overflow: Overflow::Block,
        };
        let inputs = from.iter().map(input).collect();
        PlannedStage { name: name.into(), component: "c".into(), inputs, outputs: Vec::new(), part }
    }

    fn source(moves: Option<&str>) -> Part {
        Part::Source { replay: Replay::Exact, bounded: false, in_flight: None, moves: moves.map(str::to_owned) }
    }

    fn operator(stateful: bool) -> Part {
        Part::Operator { parallelism: 1, stateful, asynchronous: false }
    }

    #[test]
    fn the_first_operators_that_hold_rows_behind_a_group_are_found() {
        let stages = [
            stage("group", &[], source(Some("hold it"))),
            stage("file", &[], source(None)),
            stage("decoded", &[0], operator(false)),
            stage("frames", &[2], operator(true)),
            stage("batches", &[3], operator(true)),
            stage("own", &[1], operator(true)),
            stage("both", &[5, 2], operator(true)),
        ];
        let found: Vec<(&str, &str, &str)> = stranded(&stages).iter().map(|s| (s.operator, s.source, s.help)).collect();
        assert_eq!(found, [("frames", "group", "hold it"), ("both", "group", "hold it")]);
        assert!(stranded(&stages[1..2]).is_empty());
    }

    fn of(replay: Replay, delivery: Delivery, droppers: &[&str]) -> Guarantee {
        let droppers = droppers.iter().map(|text| (*text).to_owned()).collect();
        let (guarantee, reasons) = combine(&replay, &delivery, &droppers);
        assert!(!reasons.is_empty());
        guarantee
    }

    #[test]
    fn the_weakest_part_decides() {
        let redelivered = || Replay::Redelivered("the broker keeps the session".into());
        let twice = || Delivery::AtLeastOnce("by its id".into());
        assert_eq!(of(Replay::Exact, Delivery::Once, &[]), Guarantee::ExactlyOnce);
        assert_eq!(of(Replay::Exact, twice(), &[]), Guarantee::AtLeastOnce);
        assert_eq!(of(redelivered(), Delivery::Once, &[]), Guarantee::AtLeastOnce);
        assert_eq!(of(redelivered(), twice(), &[]), Guarantee::AtLeastOnce);
        assert_eq!(of(Replay::Lost("qos 0".into()), Delivery::Once, &[]), Guarantee::AtMostOnce);
        assert_eq!(of(Replay::Exact, Delivery::AtMostOnce("a terminal".into()), &[]), Guarantee::AtMostOnce);
        assert_eq!(of(Replay::Exact, Delivery::Once, &["dropped"]), Guarantee::AtMostOnce);
    }

    #[test]
    fn the_rate_note_names_window_and_pace() {
        let note = rate_note("vibration", 20, "receive maximum of the broker", Duration::from_millis(50));
        assert!(note.contains("20 per commit round trip") && note.contains("50ms") && note.contains("receive maximum"), "{note}");
    }
}
