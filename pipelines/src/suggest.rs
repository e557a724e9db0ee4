//! "Did you mean": the known word nearest to a mistyped one, and lists of known words. Every diagnostic
//! that meets an unknown word asks here, so that all of them suggest alike.

/// The known word that is at most a third of its letters away from `word`, if there is one.
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed = word.to_lowercase();
    known
        .into_iter()
        .map(|candidate| (strsim::osa_distance(&typed, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.chars().count() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The help for an unknown word: the nearest known one, or all of them.
pub fn instead_of(word: &str, known: &[&str]) -> Option<String> {
    match closest(word, known.iter().copied()) {
        Some(candidate) => Some(format!("did you mean `{candidate}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known are {}", list(known.iter().copied()))),
    }
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
        assert_eq!(instead_of("payload", &["url"]).as_deref(), Some("known are `url`"));
        assert_eq!(instead_of("payload", &[]), None);
    }
}
