//! Drawings of a plan: as text for a terminal, and as a Mermaid flowchart for documents. Both show the plan
//! and nothing else: stages in order, what feeds them, schemas as they would be declared, queues and the guarantee
//! of each path.

use std::fmt::{self, Write};

use afferent_engine::component::Output;
use afferent_engine::config::ByteSize;
use afferent_engine::graph::Port;

use crate::guarantee::dropping;
use crate::plan::{Part, Plan, PlannedInput, PlannedStage};
use crate::spec::StageKind;
use crate::types;

/// The plan as text, a newline at the end.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _infallible = write_text(plan, &mut out);
    out
}

fn write_text(plan: &Plan, out: &mut String) -> fmt::Result {
    writeln!(out, "pipeline {}", plan.name)?;
    if !plan.description.is_empty() {
        writeln!(out, "  {}", plan.description)?;
    }
    for stage in &plan.stages {
        writeln!(out, "\n{} {}: {}{}", stage.kind().word(), stage.name, stage.component, character(&stage.part))?;
        for input in &stage.inputs {
            writeln!(out, "  <- {} ({})", input.name, queue(input))?;
        }
        for output in &stage.outputs {
            match output.name.as_str() {
                "" => writeln!(out, "  -> {}", types::columns(output.schema.fields()))?,
                name => writeln!(out, "  -> {name}: {}", types::columns(output.schema.fields()))?,
            }
        }
    }
    writeln!(out, "\ndelivery, computed")?;
    for path in &plan.guarantees {
        writeln!(out, "  {} -> {}: {} ({})", path.source, path.sink, path.guarantee.word(), path.reasons.join("; "))?;
    }
    let pace = afferent_engine::config::Interval(plan.graph.pace());
    writeln!(out, "commits are at least {pace} apart")?;
    for note in &plan.notes {
        writeln!(out, "note: {note}")?;
    }
    Ok(())
}

/// The plan as a Mermaid flowchart, a newline at the end.
pub fn mermaid(plan: &Plan) -> String {
    let mut out = String::from("flowchart LR\n");
    for (index, stage) in plan.stages.iter().enumerate() {
        let label = format!("{}<br/><i>{}</i>", stage.name, stage.component);
        let line = match stage.kind() {
            StageKind::Source => format!("  s{index}([\"{label}\"])\n"),
            StageKind::Operator => format!("  s{index}[\"{label}\"]\n"),
            StageKind::Sink => format!("  s{index}[(\"{label}\")]\n"),
        };
        out.push_str(&line);
    }
    for (index, stage) in plan.stages.iter().enumerate() {
        for input in &stage.inputs {
            let line = match edge_name(&plan.stages[input.from], input.port) {
                Some(name) => format!("  s{} -- {name} --> s{index}\n", input.from),
                None => format!("  s{} --> s{index}\n", input.from),
            };
            out.push_str(&line);
        }
    }
    out
}

fn edge_name(from: &PlannedStage, port: Port) -> Option<&str> {
    match port {
        Port::Rejected => Some("rejected"),
        Port::Output(number) => {
            from.outputs.get(number).map(|output: &Output| output.name.as_str()).filter(|name| !name.is_empty())
        }
    }
}

fn character(part: &Part) -> String {
    let mut words = Vec::new();
    match part {
        Part::Source { bounded, .. } => words.extend(bounded.then(|| "ends by itself".to_owned())),
        Part::Operator { parallelism, stateful, asynchronous } => {
            words.extend(stateful.then(|| "stateful".to_owned()));
            words.extend(asynchronous.then(|| "asynchronous".to_owned()));
            words.extend((*parallelism > 1).then(|| format!("{parallelism} in parallel")));
        }
        Part::Sink { .. } => {}
    }
    if words.is_empty() { String::new() } else { format!(" ({})", words.join(", ")) }
}

fn queue(input: &PlannedInput) -> String {
    let bytes = ByteSize(u64::try_from(input.queue.bytes).unwrap_or(u64::MAX));
    let policy = dropping(input.overflow).map_or(String::new(), |policy| format!(", {policy}"));
    format!("queue of {} rows, {bytes}{policy}", input.queue.rows)
}

#[cfg(test)]
mod tests {
    use afferent_engine::component::PlanContext;

    use super::*;
    use crate::fakes::registry;

    const PIPELINE: &str = "name: p
sources:
  a: { memory: { columns: [id], in_flight: 20 } }
operators:
  b: { split: {} }
  c: { pass: {}, inputs: [b.hot], overflow: drop_oldest, parallelism: 3 }
sinks:
  y: { memory: {}, inputs: [b.cold, b.rejected] }
  z: { memory: {} }
";

    #[test]
    fn text_and_flowchart_show_the_plan() {
        let (plan, found) = crate::check(PIPELINE, "p.yaml", &registry(), &PlanContext::default());
        let plan = plan.unwrap_or_else(|| panic!("{found:?}"));
        let shown = text(&plan);
        for part in [
            "pipeline p\n",
            "source a: memory (ends by itself)\n  -> id: utf8!\n",
            "operator b: split\n  <- a (queue of 8192 rows, ",
            "  -> hot: id: utf8!\n  -> cold: id: utf8!\n",
            "operator c: pass (3 in parallel)\n  <- b.hot (queue of 8192 rows, ",
            ", drop_oldest)\n",
            "  a -> y: exactly_once (",
            "  a -> z: at_most_once (rows are dropped in front of `c` when its queue is full (drop_oldest))\n",
            "commits are at least 50ms apart\nnote: `a` gets at most 20 messages",
        ] {
            assert!(shown.contains(part), "{part:?} is not in\n{shown}");
        }
        let chart = mermaid(&plan);
        let lines: Vec<_> = chart.lines().collect();
        assert_eq!(lines[0], "flowchart LR");
        assert!(lines.contains(&"  s0([\"a<br/><i>memory</i>\"])"), "{chart}");
        assert!(
            lines.contains(&"  s0 --> s1") && lines.contains(&"  s1 -- hot --> s2") && lines.contains(&"  s1 -- rejected --> s3"),
            "{chart}"
        );
    }
}
