//! "Did you mean": the known words nearest to a mistyped one, and lists of known words. Every diagnostic
//! that meets an unknown word asks here, so that all of them suggest alike.

/// Letters from which on a word may be the beginning of what was meant.
const BEGINNING: usize = 3;
/// Words that are offered at once.
const OFFERED: usize = 4;

/// The known word that is nearest to `word`, if one is near enough; see [`near`].
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let known: Vec<&str> = known.into_iter().collect();
    near(word, &known).first().copied()
}

/// The known words that `word` may have been meant to be: those that begin with it, else the one that is at most a
/// third of its letters away, together with those that differ from that one in their digits only. Words that differ
/// from `word` in their digits only are other names and no slips (`s3` is not `s1`).
fn near<'a>(word: &str, known: &[&'a str]) -> Vec<&'a str> {
    let typed = word.to_lowercase();
    let numbered = typed.contains(|c: char| c.is_ascii_digit());
    // A type with the mark of one that is never null (`int8!`) is only meant by a word that has it, too.
    let marked = typed.ends_with('!') && known.iter().any(|candidate| candidate.ends_with('!'));
    let candidates: Vec<(&str, String)> = known
        .iter()
        .map(|candidate| (*candidate, candidate.to_lowercase()))
        .filter(|(_, lower)| lower.ends_with('!') == marked)
        .filter(|(_, lower)| *lower == typed || !numbered || without_digits(lower) != without_digits(&typed))
        .collect();
    let begun: Vec<&str> =
        candidates.iter().filter(|(_, lower)| lower.starts_with(&typed)).map(|(candidate, _)| *candidate).collect();
    if typed.chars().count() >= BEGINNING && (1..=OFFERED).contains(&begun.len()) {
        return begun;
    }
    let distance = |lower: &str| {
        let letters = lower.chars().count();
        let distance = strsim::osa_distance(&typed, lower);
        (distance <= (letters / 3).max(1) && distance < letters).then_some(distance)
    };
    // Who writes no digits may have left them out beside another slip.
    let nearest = |lower: &str| {
        let short = (!numbered).then(|| without_digits(lower)).filter(|short| short != lower);
        [distance(lower), short.and_then(|short| distance(&short))].into_iter().flatten().min()
    };
    let found = candidates.iter().filter_map(|(_, lower)| Some((nearest(lower)?, lower))).min_by_key(|(distance, _)| *distance);
    let Some((least, best)) = found else { return Vec::new() };
    let alike = |lower: &String| {
        lower == best || (!numbered && nearest(lower) == Some(least) && without_digits(lower) == without_digits(best))
    };
    candidates.iter().filter(|(_, lower)| alike(lower)).map(|(candidate, _)| *candidate).take(OFFERED).collect()
}

fn without_digits(word: &str) -> String {
    word.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// The help for an unknown word: the nearest known ones, or all of them.
pub fn instead_of(word: &str, known: &[&str]) -> Option<String> {
    let near = near(word, known);
    match near.split_last() {
        Some((only, [])) => Some(format!("did you mean `{only}`?")),
        Some((last, others)) => Some(format!("did you mean {} or `{last}`?", list(others.iter().copied()))),
        None if known.is_empty() => None,
        None => Some(format!("known are {}", all(known))),
    }
}

/// All known words, in backticks; of a type and its form that is never null, one.
pub fn all(known: &[&str]) -> String {
    let doubled = |word: &str| word.strip_suffix('!').is_some_and(|plain| known.contains(&plain));
    let plain = list(known.iter().copied().filter(|word| !doubled(word)));
    if known.iter().any(|word| doubled(word)) { format!("{plain}; with `!` behind it, null is refused") } else { plain }
}

/// Words in backticks with commas between them.
pub fn list<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_and_a_far_one_is_not() {
        assert_eq!(closest("topic", ["url", "topics"]), Some("topics"));
        assert_eq!(closest("Topics", ["topics", "topic"]), Some("topics"));
        assert_eq!(closest("payload", ["url", "topics"]), None);
        assert_eq!(closest("a", ["b", "c"]), None);
        assert_eq!(closest("lo", ["low"]), Some("low"));
        assert_eq!(instead_of("payload", &["url"]).as_deref(), Some("known are `url`"));
        assert_eq!(instead_of("payload", &[]), None);
    }

    #[test]
    fn names_that_differ_in_their_digits_are_other_names() {
        assert_eq!(closest("s3", ["s1", "s2"]), None);
        assert_eq!(closest("sensor_12", ["sensor_1", "sensor_2"]), None);
        assert_eq!(closest("senosr_12", ["sensor_12"]), Some("sensor_12"));
    }

    #[test]
    fn what_a_word_may_be_the_beginning_of_is_offered_at_once() {
        let known =
            ["boolean", "int8", "int16", "float32", "float64", "timestamp_s", "timestamp_ms", "boolean!", "int8!", "float32!"];
        let help = |word: &str| instead_of(word, &known).unwrap_or_default();
        assert_eq!(help("float"), "did you mean `float32` or `float64`?");
        assert_eq!(help("flot"), "did you mean `float32` or `float64`?");
        assert_eq!(help("bool"), "did you mean `boolean`?");
        assert_eq!(help("flaot32!"), "did you mean `float32!`?");
        assert_eq!(help("timestamp"), "did you mean `timestamp_s` or `timestamp_ms`?");
        assert_eq!(
            help("text"),
            "known are `boolean`, `int8`, `int16`, `float32`, `float64`, `timestamp_s`, `timestamp_ms`; with `!` behind it, null is \
             refused"
        );
    }
}
