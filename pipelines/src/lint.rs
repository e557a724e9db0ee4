//! The check of a pipeline file. It never fails: it gives back a plan, or everything that is wrong with the
//! file at once. Each step goes on with what the step before it could make sense of, and is silent about
//! what only follows from an earlier fault.

use afferent_engine::component::PlanContext;
use afferent_engine::registry::Registry;

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document;
use crate::plan::Plan;
use crate::{planner, stage, wiring};

/// Checks the text of a pipeline file. `file` is how it is called in diagnostics; `context` says where
/// relative paths start and what the components of this process share. There is a plan exactly when no
/// diagnostic is an error; the diagnostics come in the order of the file.
pub fn check(text: &str, file: &str, registry: &Registry, context: &PlanContext) -> (Option<Plan>, Vec<Diagnostic>) {
    let mut diagnostics = Diagnostics::new();
    let plan = document::parse(text, &mut diagnostics).and_then(|root| {
        let read = stage::read(&root, text, registry, &mut diagnostics);
        let wiring = wiring::wire(&read.stages, registry, text, &mut diagnostics);
        planner::plan(&read, &wiring, registry, context, text, &mut diagnostics)
    });
    (plan, diagnostics.finish(text, file))
}

#[cfg(test)]
mod tests {
    use afferent_engine::graph::{Overflow, Port, Role};
    use serde_json::Value;

    use super::*;
    use crate::diagnostic::Severity;
    use crate::fakes::registry;
    use crate::schema::pipeline_schema;
    use crate::spec::Guarantee;

    const HEAD: &str = "name: p\nsources:\n  a: { memory: { columns: [id, text] } }\n";
    const TAIL: &str = "sinks:\n  z: { memory: {} }\n";

    fn lint(text: &str) -> Vec<Diagnostic> {
        let (plan, found) = check(text, "p.yaml", &registry(), &PlanContext::default());
        assert_eq!(plan.is_none(), found.iter().any(|d| d.severity == Severity::Error), "{found:?}");
        found
    }

    /// Code, line and column of all that is found.
    fn places(text: &str) -> Vec<(&'static str, usize, usize)> {
        lint(text).iter().map(|d| (d.code, d.line, d.column)).collect()
    }

    fn planned(text: &str) -> Plan {
        let (plan, found) = check(text, "p.yaml", &registry(), &PlanContext::default());
        plan.unwrap_or_else(|| panic!("{found:?}"))
    }

    /// Whether the JSON Schema of pipeline files accepts it.
    fn schema_accepts(text: &str) -> bool {
        let root = document::parse(text, &mut Diagnostics::new()).map_or(Value::Null, |root| root.to_value());
        jsonschema::validator_for(&pipeline_schema(&registry())).unwrap().is_valid(&root)
    }

    /// A file with these operators between the source `a` and the sink `z`.
    fn with(operators: &str) -> String {
        format!("{HEAD}operators:\n{operators}{TAIL}")
    }

    #[test]
    fn a_chain_is_planned_with_the_stage_above_as_input() {
        let text = with(
            "  b: { pass: { expects: id }, queue: { rows: 5 }, overflow: drop_newest }\n  c: { pass: {}, parallelism: 2 }\n",
        );
        assert!(schema_accepts(&text));
        let plan = planned(&text);
        let names: Vec<_> = plan.graph.nodes.iter().map(|node| (node.name.as_str(), node.component.as_str())).collect();
        assert_eq!(names, [("a", "memory"), ("b", "pass"), ("c", "pass"), ("z", "memory")]);
        let b = &plan.graph.nodes[1].inputs[0];
        assert_eq!((b.from, b.port, b.queue.rows, b.overflow), (0, Port::Output(0), 5, Overflow::DropNewest));
        assert!(matches!(plan.graph.nodes[2].role, Role::Operator { parallelism: 2, .. }));
        assert_eq!(plan.graph.nodes[3].inputs[0].from, 2);
        assert_eq!(plan.stages[3].inputs[0].schema.field(1).name(), "text");
        assert_ne!(plan.graph.nodes[1].fingerprint, plan.graph.nodes[2].fingerprint);
        assert_eq!(plan.guarantees[0].guarantee, Guarantee::AtMostOnce);
        assert!(plan.guarantees[0].reasons[0].contains("drop_newest"));
    }

    #[test]
    fn operators_may_stand_in_any_order_when_their_inputs_are_written() {
        let plan = planned(
            &with("  c: { pass: {}, inputs: [b] }\n  b: { pass: {}, inputs: [a] }\n")
                .replace("z: {", "z: { inputs: [c, a.rejected],"),
        );
        let names: Vec<_> = plan.stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c", "z"]);
        assert_eq!(plan.stages[3].inputs[1].port, Port::Rejected);
        assert_eq!(plan.stages[3].inputs[1].schema.field(0).name(), "pipeline");
    }

    #[test]
    fn what_is_unknown_or_of_the_wrong_type_is_refused_here_and_by_the_schema() {
        for (operators, code, line, column, help) in [
            ("  b: { pass: { limt: 1 } }\n", "unknown-key", 5, 16, "did you mean `limit`?"),
            ("  b: { pass: { limit: ten } }\n", "wrong-type", 5, 23, ""),
            ("  b: { pass: { limit: \"10\" } }\n", "wrong-type", 5, 23, "leave out the quotes"),
            ("  b: { pass: { limit: 0 } }\n", "invalid-value", 5, 23, ""),
            ("  b: { pass: { linger: soon } }\n", "invalid-value", 5, 24, "A length of time"),
            ("  b: { pass: }\n", "wrong-type", 5, 8, "`{}`"),
            ("  b: { pas: {} }\n", "unknown-component", 5, 8, "did you mean `pass`?"),
            ("  b: { memory: {} }\n", "unknown-component", 5, 8, "under `sources`, `sinks` only"),
            ("  b: { pass: {}, input: [a] }\n", "unknown-key", 5, 18, "did you mean `inputs`?"),
            ("  b: { pass: {}, parallelism: many }\n", "wrong-type", 5, 31, ""),
            ("  b: { pass: {}, overflow: dorp_oldest }\n", "invalid-value", 5, 28, "did you mean `drop_oldest`?"),
            ("  b: { pass: {}, queue: { row: 1 } }\n", "unknown-key", 5, 27, "did you mean `rows`?"),
            ("  b: { pass: {}, split: {} }\n", "several-components", 5, 18, "a stage of its own"),
            ("  b: {}\n", "missing-component", 5, 3, "`pass`"),
            ("  b: pass\n", "wrong-type", 5, 6, "write for example `narrow: {"),
            ("  b c: { pass: {} }\n", "invalid-name", 5, 3, "begin with a letter"),
        ] {
            let text = with(operators);
            let found = lint(&text);
            assert_eq!(
                found.iter().map(|d| (d.code, d.line, d.column)).collect::<Vec<_>>(),
                [(code, line, column)],
                "{operators}"
            );
            assert!(found[0].help.clone().unwrap_or_default().contains(help), "{:?}", found[0]);
            assert!(!schema_accepts(&text), "the schema accepts {operators}");
        }
    }

    #[test]
    fn the_envelope_is_checked_as_well() {
        assert_eq!(places(&format!("{HEAD}{TAIL}suorces: {{}}\n")), [("unknown-key", 6, 1)]);
        assert_eq!(places(&format!("{HEAD}{TAIL}delivery: twice\n")), [("invalid-value", 6, 11)]);
        assert_eq!(places(&format!("{HEAD}{TAIL}commit_interval: 5\n")), [("wrong-type", 6, 18)]);
        assert_eq!(places(&format!("{HEAD}{TAIL}").replace("name: p", "name: P!")), [("invalid-value", 1, 7)]);
        assert_eq!(places(HEAD), [("missing-key", 1, 1)]);
        assert_eq!(places("name: p\nsources: {}\nsinks:\n  z: { memory: {} }\n"), [("missing-key", 2, 1)]);
        assert_eq!(places("- a\n")[0].0, "wrong-type");
        assert_eq!(places("a: [\n")[0].0, "syntax");
    }

    #[test]
    fn every_problem_of_a_file_is_told_at_once_and_nothing_that_only_follows() {
        let text = "name: p
surces: {}
sources:
  a: { memory: { colums: [id], keeps: 5 } }
operators:
  b: { pass: { expects: nothing } }
  c: { pass: {}, inputs: [d] }
  e: { pss: {} }
sinks:
  z: { memory: { twice: maybe }, inputs: [e] }
";
        let codes: Vec<_> = places(text);
        let wanted = [
            ("unknown-key", 2, 1),
            ("missing-key", 4, 8),
            ("unknown-key", 4, 18),
            ("wrong-type", 4, 39),
            ("unknown-stage", 7, 27),
            ("unknown-component", 8, 8),
            ("wrong-type", 10, 25),
        ];
        assert_eq!(codes, wanted);
    }

    #[test]
    fn a_refused_stage_hides_nothing_behind_it() {
        let codes = |text: &str| lint(text).iter().map(|d| (d.code, d.line)).collect::<Vec<_>>();
        // A source that is refused declares its columns all the same.
        let text = with("  b: { pass: { expects: idd } }\n").replace("[id, text]", "[id, text], broken: true");
        assert_eq!(codes(&text), [("broken", 3), ("unknown-column", 5)]);
        assert_eq!(codes(&text.replace("idd", "id")), [("broken", 3)]);
        // Without a word about what arrives, a stage says what it can, and nothing of columns.
        let text = with("  b: { pass: { expects: idd } }\n  c: { pass: { limit: 101, expects: idd } }\n");
        assert_eq!(codes(&text), [("unknown-column", 5), ("too-many", 6)]);
        let text = with("  b: { pass: { limit: 101 }, inputs: [c] }\n  c: { pass: {}, inputs: [b] }\n");
        assert_eq!(codes(&text), [("too-many", 5), ("cycle", 5)]);
        let text = with("  b: { pass: { limit: 101 }, inputs: [aa] }\n");
        assert_eq!(codes(&text), [("too-many", 5), ("unknown-stage", 5)]);
        // A default stands in for a value at fault, and nothing for a key that is unknown.
        assert_eq!(codes(&with("  b: { pass: { limit: 101, linger: soon } }\n")), [("too-many", 5), ("invalid-value", 5)]);
        assert_eq!(codes(&with("  b: { pass: { limit: 101, lingr: 5ms } }\n")), [("unknown-key", 5)]);
        // What a stage rejects has the same form whatever is wrong with it.
        let text = with("  b: { pass: { expects: idd } }\n  c: { pass: { expects: idd }, inputs: [b.rejected] }\n");
        assert_eq!(codes(&text), [("unknown-column", 5), ("unknown-column", 6)]);
    }

    #[test]
    fn problems_of_planning_point_into_the_configuration() {
        let found = lint(&with("  b: { pass: { expects: idd } }\n"));
        assert_eq!((found[0].code, found[0].line, found[0].column), ("unknown-column", 5, 25));
        assert_eq!(found[0].help.as_deref(), Some("look at the source"));
        assert_eq!(places(&with("  b:\n    query: |\n      idd from a\n")), [("unknown-column", 7, 7)]);
        assert_eq!(places(&with("  b: { query: \"idd from a\" }\n")), [("unknown-column", 5, 16)]);
        assert_eq!(places(&with("  b: { query: id }\n"))[0].0, "sql");
    }

    #[test]
    fn a_text_that_names_its_inputs_is_judged_before_its_inputs_are() {
        let two = |operators: &str| with(operators).replace("operators:", "  c: { memory: { columns: [id] } }\noperators:");
        let found = lint(&two("  b: { query: id }\n").replace("z: {", "z: { inputs: [b],"));
        assert_eq!(found.iter().map(|d| d.code).collect::<Vec<_>>(), ["sql"]);
        // What stands beside it is told, too, and does not hide it.
        let found = lint(&with("  b: { query: id, inputs: [a] }\n"));
        assert_eq!(found.iter().map(|d| d.code).collect::<Vec<_>>(), ["sql", "conflicting-inputs"]);
    }

    #[test]
    fn several_inputs_with_the_same_columns_feed_one_operator() {
        let text = with("  b: { pass: {}, inputs: [a, c] }\n")
            .replace("operators:", "  c: { memory: { columns: [id, text] } }\noperators:")
            .replace("z: {", "z: { inputs: [b],");
        let plan = planned(&text);
        assert_eq!(plan.graph.nodes[2].inputs.iter().map(|inlet| inlet.from).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(plan.guarantees.len(), 2);
        let found = lint(&text.replace("[id, text] } }\noperators", "[id, words] } }\noperators"));
        assert_eq!((found.len(), found[0].code, found[0].line, found[0].column), (1, "different-schemas", 6, 30));
        assert!(found[0].message.ends_with("column 2 is `text` in `a` and `words` in `c`"), "{}", found[0].message);
        assert!(found[0].help.as_deref().unwrap_or_default().contains("`sql`"));
        assert_eq!(places(&text.replace("[a, c]", "[a, c, a]")), [("duplicate-input", 6, 33)]);
    }

    #[test]
    fn a_column_that_ends_in_the_stage_in_front_is_told_so() {
        let operators = "  b: { narrow: {} }\n  c: { pass: { expects: text } }\n";
        let found = lint(&with(operators));
        assert_eq!(found[0].help.as_deref(), Some("`b` does not hand `text` on: add it to its `keep`; look at the source"));
        let found = lint(&with(&operators.replace("text", "txet")));
        assert_eq!(found[0].help.as_deref(), Some("look at the source"));
    }

    #[test]
    fn the_shape_of_the_graph_is_checked() {
        let found = lint(&with("  b: { pass: {}, inputs: [c] }\n  c: { pass: {}, inputs: [b] }\n"));
        assert_eq!((found[0].code, found[0].line, found[0].column), ("cycle", 5, 27));
        assert!(found[0].message.ends_with("b -> c -> b"), "{}", found[0].message);
        assert_eq!(found.len(), 1);
        assert_eq!(places(&with("  b: { query: id from aa }\n")), [("unknown-stage", 5, 23)]);
        assert_eq!(places(&with("  b: { query: id from a, inputs: [a] }\n")), [("conflicting-inputs", 5, 26)]);
        assert_eq!(places(&with("  b: { pass: {}, inputs: [] }\n")), [("missing-input", 5, 18)]);
        assert_eq!(places(&with("  b: { pass: {}, inputs: [a.hot] }\n")), [("unknown-output", 5, 27)]);
        assert_eq!(places(&with("  b: { pass: {}, inputs: [z] }\n")), [("unknown-output", 5, 27)]);
        assert_eq!(places(&with("  a: { pass: {} }\n")), [("duplicate-stage", 5, 3)]);
        assert_eq!(places(&with("  b: { pass: { stateful: true }, parallelism: 2 }\n")), [("refused-parallelism", 5, 47)]);
        let two = format!("{HEAD}  b: {{ memory: {{ columns: [id] }} }}\n{TAIL}");
        assert_eq!(places(&two), [("ambiguous-input", 6, 3)]);
        assert!(lint(&two)[0].help.as_deref().unwrap_or_default().contains("`a`, `b`"));
    }

    #[test]
    fn named_outputs_are_written_and_unread_ones_are_told() {
        let text = with("  b: { split: {} }\n");
        let found = lint(&text);
        assert_eq!((found[0].code, found[0].line, found[0].column), ("unknown-output", 7, 3));
        assert!(found[0].help.as_deref().unwrap_or_default().contains("`b.hot`, `b.cold`"));
        let found = lint(&text.replace("z: {", "z: { inputs: [b.htt],"));
        assert_eq!(found[0].help.as_deref(), Some("did you mean `b.hot`?"));
        let found = lint(&text.replace("z: {", "z: { inputs: [b.hot],"));
        assert_eq!((found.len(), found[0].code, found[0].severity), (1, "unused-output", Severity::Warning));
        assert!(found[0].message.contains("the output `cold` of `b`"));
    }

    #[test]
    fn a_declared_guarantee_is_kept_or_refused() {
        let text = format!("{HEAD}{TAIL}delivery: exactly_once\n");
        assert_eq!(planned(&text).guarantees[0].guarantee, Guarantee::ExactlyOnce);
        assert_eq!(places(&text.replace("z: { memory: {}", "z: { memory: { twice: true }")), [("guarantee-not-kept", 6, 11)]);
        let found = lint(&text.replace("[id, text]", "[id], keeps: lost"));
        assert!(found[0].message.contains("memory forgets"), "{}", found[0].message);
        assert!(found[0].help.as_deref().unwrap_or_default().contains("at_most_once"));
        // Two sinks, one reason: told once, with both.
        let found = lint(&text.replace("[id, text]", "[id], keeps: lost").replace("sinks:", "sinks:\n  y: { memory: {} }"));
        assert_eq!(found.len(), 1);
        assert!(found[0].message.starts_with("`exactly_once` cannot be kept from `a` to `y`, `z`: "), "{}", found[0].message);
    }

    #[test]
    fn a_small_window_is_noted() {
        let plan = planned(&format!("{HEAD}{TAIL}").replace("[id, text]", "[id], in_flight: 20"));
        assert!(plan.notes[0].contains("20 per commit round trip"), "{:?}", plan.notes);
    }

    #[test]
    fn a_missing_variable_is_told_at_its_place_and_secrets_wait() {
        let text = format!("{HEAD}{TAIL}").replace("[id, text]", "[id, \"${AFFERENT_NO_SUCH}\"]");
        assert_eq!(places(&text), [("missing-variable", 3, 35)]);
        planned(&format!("{HEAD}{TAIL}").replace("[id, text]", "[id], password: \"${AFFERENT_NO_SUCH}\""));
    }
}
