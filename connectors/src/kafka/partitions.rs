//! Which partitions a `kafka` source reads: those that its group gives it, which may be others a moment later, or
//! those that are written down, which nobody takes away. Used by the source's configuration and by the consumer thread.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use afferent_engine::Error;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which partitions a source reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Partitions {
    /// Those that the group gives it.
    #[default]
    Group,
    /// All that the topics have when the source opens.
    All,
    /// These, of each topic; never empty.
    These(BTreeSet<i32>),
}

impl Partitions {
    /// The partitions to take of a topic that has `present`; none for a group, which gives them itself.
    ///
    /// # Errors
    /// Fatal, naming a partition that the topic does not have.
    pub(super) fn of(&self, topic: &str, present: &BTreeSet<i32>) -> Result<BTreeSet<i32>, Error> {
        match self {
            Self::Group => Ok(BTreeSet::new()),
            Self::All => Ok(present.clone()),
            Self::These(wanted) => match wanted.iter().find(|wanted| !present.contains(wanted)) {
                None => Ok(wanted.clone()),
                Some(missing) => Err(Error::fatal(format!(
                    "topic `{topic}` has no partition {missing} (`partitions`): it has {} of them, counted from 0",
                    present.len()
                ))),
            },
        }
    }
}

impl Serialize for Partitions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Group => serializer.serialize_str("group"),
            Self::All => serializer.serialize_str("all"),
            Self::These(list) => list.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Partitions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;
        impl<'de> Visitor<'de> for Written {
            type Value = Partitions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`group`, `all` or a list of partitions such as [0, 1]")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Partitions, E> {
                match word {
                    "group" => Ok(Partitions::Group),
                    "all" => Ok(Partitions::All),
                    _ => Err(E::invalid_value(de::Unexpected::Str(word), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Partitions, A::Error> {
                let mut partitions = BTreeSet::new();
                while let Some(partition) = list.next_element::<i32>()? {
                    if partition < 0 {
                        return Err(de::Error::custom(format_args!("there is no partition {partition}: they count from 0")));
                    }
                    partitions.insert(partition);
                }
                if partitions.is_empty() {
                    return Err(de::Error::custom("at least one partition is needed; `all` means every one"));
                }
                Ok(Partitions::These(partitions))
            }
        }
        deserializer.deserialize_any(Written)
    }
}

impl JsonSchema for Partitions {
    fn schema_name() -> Cow<'static, str> {
        "Partitions".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Partitions").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "`group`, `all`, or a list of partitions.",
            "anyOf": [
                { "type": "string", "enum": ["group", "all"] },
                { "type": "array", "items": { "type": "integer", "minimum": 0, "maximum": 2_147_483_647 }, "minItems": 1 }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Partitions, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn partitions_are_two_words_or_a_list() {
        assert_eq!(read("\"group\"").unwrap(), Partitions::default());
        assert_eq!(read("\"all\"").unwrap(), Partitions::All);
        assert_eq!(read("[2, 0]").unwrap(), Partitions::These(BTreeSet::from([0, 2])));
        for wrong in ["\"al\"", "[]", "[-1]", "3", "[\"0\"]", "null"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        for json in ["\"group\"", "\"all\"", "[0,2]"] {
            assert_eq!(serde_json::to_string(&read(json).unwrap()).unwrap(), json);
        }
    }

    #[test]
    fn a_partition_that_the_topic_does_not_have_is_told() {
        let present = BTreeSet::from([0, 1]);
        assert_eq!(Partitions::All.of("t", &present).unwrap(), present);
        assert_eq!(Partitions::These(BTreeSet::from([1])).of("t", &present).unwrap(), BTreeSet::from([1]));
        let error = Partitions::These(BTreeSet::from([1, 2])).of("t", &present).unwrap_err().to_string();
        assert!(error.contains("`t` has no partition 2"), "{error}");
    }
}
