//! What every operator says about a column that it cannot find. Called while planning; the invariant: the same
//! code and the same help wherever a configuration names a column.

use afferent_engine::component::{Input, Problem};
use arrow::datatypes::Schema;

/// The column called `name`, or the problem at `path` that there is none.
pub(crate) fn find(schema: &Schema, name: &str, path: &str) -> Result<usize, Problem> {
    schema.index_of(name).map_err(|_| {
        let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        Problem::new("unknown-column", path, format!("unknown column `{name}`")).help(one_of(name, &known, "columns"))
    })
}

/// The input of an operator that takes one stream; of several stages that feed it, the planner makes one.
pub(crate) fn only<'a>(inputs: &'a [Input], operator: &str) -> Result<&'a Input, Vec<Problem>> {
    match inputs {
        [input] => Ok(input),
        _ => Err(vec![
            Problem::new("missing-input", "", format!("`{operator}` takes one stream and got {}", inputs.len()))
                .help("write `inputs: [STAGE]` beside it"),
        ]),
    }
}

/// What `name` may have been meant to be, and what there is.
pub(crate) fn one_of(name: &str, known: &[&str], what: &str) -> String {
    let listed: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    let there = if known.is_empty() { format!("there are no {what}") } else { format!("{what} are {}", listed.join(", ")) };
    match nearest(name, known) {
        Some(meant) => format!("did you mean `{meant}`? {there}"),
        None => there,
    }
}

/// The known name that differs by the fewest typing errors, if by few enough. One that differs in its digits only is
/// another name and no typing error: `s3` is not `s1`.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let wanted = name.to_lowercase();
    let numbered = wanted.contains(|c: char| c.is_ascii_digit());
    let another = |known: &str| numbered && *known != *wanted && without_digits(known) == without_digits(&wanted);
    let allowed = (name.chars().count() / 3).clamp(1, 3);
    known
        .iter()
        .map(|known| (known.to_lowercase(), *known))
        .filter(|(lower, _)| !another(lower))
        .map(|(lower, known)| (strsim::osa_distance(&wanted, &lower), known))
        .filter(|(distance, known)| *distance <= allowed && *distance < known.chars().count())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

fn without_digits(name: &str) -> String {
    name.chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested_and_a_far_one_is_not() {
        let known = ["device", "temperature", "ts"];
        assert_eq!(nearest("devcie", &known), Some("device"));
        assert_eq!(nearest("Temprature", &known), Some("temperature"));
        assert_eq!(nearest("humidity", &known), None);
        assert_eq!(one_of("x", &known, "columns"), "columns are `device`, `temperature`, `ts`");
        assert!(one_of("devcie", &known, "columns").starts_with("did you mean `device`? "));
    }

    #[test]
    fn names_that_differ_in_their_digits_are_other_names() {
        assert_eq!(nearest("s3", &["s1", "s2"]), None);
        assert_eq!(nearest("axis_2", &["axis_1", "axsi_2"]), Some("axsi_2"));
        assert_eq!(nearest("s", &["s1"]), Some("s1"));
        assert_eq!(nearest("a", &["b"]), None);
    }
}
