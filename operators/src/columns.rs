//! What every operator says about a column that it cannot find. Called while planning; the invariant: the same
//! code and the same help wherever a configuration names a column.

use afferent_engine::component::{Input, Problem};
use arrow::datatypes::Schema;

/// The column called `name`, or the problem at `path` that there is none.
pub(crate) fn find(schema: &Schema, name: &str, path: &str) -> Result<usize, Problem> {
    schema.index_of(name).map_err(|_| {
        let known: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        Problem::new("unknown-column", path, format!("unknown column '{name}'")).help(one_of(name, &known, "columns"))
    })
}

/// The only input of an operator that takes one.
pub(crate) fn only<'a>(inputs: &'a [Input], operator: &str) -> Result<&'a Input, Vec<Problem>> {
    match inputs {
        [input] => Ok(input),
        [] => Err(vec![
            Problem::new("missing-input", "", format!("{operator} has no input")).help("write `inputs: [STAGE]` beside it"),
        ]),
        [_, second, ..] => Err(vec![
            Problem::new("too-many-inputs", "", format!("{operator} takes one input and got {}", inputs.len()))
                .help(format!("give it one, and a stage of its own to '{}'", second.name)),
        ]),
    }
}

/// What `name` may have been meant to be, and what there is.
pub(crate) fn one_of(name: &str, known: &[&str], what: &str) -> String {
    let there = if known.is_empty() { format!("there are no {what}") } else { format!("{what} are {}", known.join(", ")) };
    match nearest(name, known) {
        Some(meant) => format!("did you mean '{meant}'? {there}"),
        None => there,
    }
}

/// The known name that differs by the fewest typing errors, if by few enough.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let wanted = name.to_lowercase();
    let distance = |known: &str| strsim::osa_distance(&wanted, &known.to_lowercase());
    let allowed = (name.chars().count() / 3).clamp(1, 3);
    known
        .iter()
        .map(|known| (distance(known), *known))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
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
        assert!(one_of("x", &known, "columns").ends_with("columns are device, temperature, ts"));
    }
}
