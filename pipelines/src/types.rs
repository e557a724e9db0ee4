//! Arrow types in the words of a schema declaration, so that what is shown can be written into a pipeline file as
//! it is: `int64!`, `{ list: float32 }`. Drawings and diagnostics ask here; a type that no declaration can say
//! keeps Arrow's own name.

use arrow::datatypes::{DataType, Field, Fields, TimeUnit};

/// The type of a column, with the mark of one that is never null.
pub(crate) fn column(field: &Field) -> String {
    let required = !field.is_nullable();
    match nested(field.data_type()) {
        Some(inside) => format!("{{ {inside}{} }}", if required { ", required: true" } else { "" }),
        None => format!("{}{}", single(field.data_type()), if required { "!" } else { "" }),
    }
}

/// A type, whatever its column says of null.
pub(crate) fn name(data_type: &DataType) -> String {
    nested(data_type).map_or_else(|| single(data_type), |inside| format!("{{ {inside} }}"))
}

/// What stands within the braces of a nested type.
fn nested(data_type: &DataType) -> Option<String> {
    match data_type {
        DataType::List(item) => Some(format!("list: {}", column(item))),
        DataType::FixedSizeList(item, size) => Some(format!("fixed_size_list: {{ item: {}, size: {size} }}", column(item))),
        DataType::Struct(fields) => Some(format!("struct: {{ {} }}", columns(fields))),
        _ => None,
    }
}

/// Names and types, in order.
pub(crate) fn columns(fields: &Fields) -> String {
    fields.iter().map(|field| format!("{}: {}", field.name(), column(field))).collect::<Vec<_>>().join(", ")
}

fn single(data_type: &DataType) -> String {
    match data_type {
        DataType::Date32 => "date".to_owned(),
        DataType::Timestamp(unit, zone) => {
            let unit = match unit {
                TimeUnit::Second => "s",
                TimeUnit::Millisecond => "ms",
                TimeUnit::Microsecond => "us",
                TimeUnit::Nanosecond => "ns",
            };
            match zone.as_deref() {
                Some("UTC") => format!("timestamp_{unit}"),
                Some(zone) => format!("timestamp_{unit} in {zone}"),
                None => format!("timestamp_{unit} without a zone"),
            }
        }
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(fields) => {
                let of: Vec<String> = fields.iter().map(|field| name(field.data_type())).collect();
                format!("map of {}", of.join(" to "))
            }
            _ => "map".to_owned(),
        },
        // `Int64` is `int64`, and so on for all others that a declaration knows.
        other => format!("{other:?}").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_told_as_they_are_declared() {
        let told = |data_type: DataType, nullable: bool| column(&Field::new("c", data_type, nullable));
        for (data_type, declared) in [
            (DataType::Boolean, "boolean"),
            (DataType::UInt16, "uint16"),
            (DataType::Float32, "float32"),
            (DataType::Utf8, "utf8"),
            (DataType::Binary, "binary"),
            (DataType::Date32, "date"),
            (DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())), "timestamp_us"),
        ] {
            assert_eq!(told(data_type.clone(), true), declared);
            assert_eq!(told(data_type, false), format!("{declared}!"));
        }
        let list = DataType::new_list(DataType::Float32, false);
        assert_eq!(told(list.clone(), true), "{ list: float32! }");
        assert_eq!(told(list.clone(), false), "{ list: float32!, required: true }");
        assert_eq!(
            told(DataType::new_fixed_size_list(DataType::Utf8, 3, true), true),
            "{ fixed_size_list: { item: utf8, size: 3 } }"
        );
        let fields = Fields::from(vec![Field::new("x", DataType::Int8, true), Field::new("y", list, true)]);
        assert_eq!(told(DataType::Struct(fields), true), "{ struct: { x: int8, y: { list: float32! } } }");
    }

    #[test]
    fn what_cannot_be_declared_is_told_all_the_same() {
        assert_eq!(name(&afferent_engine::message::headers_type()), "map of utf8 to binary");
        assert_eq!(name(&DataType::Timestamp(TimeUnit::Second, None)), "timestamp_s without a zone");
        assert_eq!(name(&DataType::LargeUtf8), "largeutf8");
    }
}
