//! The schema as pipeline authors declare it in YAML, and its way to Arrow and back. Read by every component with
//! a `schema` option, written by `afferent infer-schema`. Columns keep the order in which they are written.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef, TimeUnit};

use crate::error::FormatError;

/// Named columns in their order: `{ ts: timestamp_ms, ax: float32, tags: { list: utf8 } }`.
///
/// Names are unique and not empty, and there is at least one, when it comes from text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration(pub Vec<(String, FieldType)>);

/// The type of a column or of a value within one. A null is allowed unless it is `required`, written `float32!`, or
/// `{ list: utf8, required: true }` for nested types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldType {
    /// What the values are.
    pub kind: Kind,
    /// Whether null is refused.
    pub required: bool,
}

/// What values are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// One value, `float32`.
    Scalar(Scalar),
    /// Any number of items, `{ list: utf8 }`.
    List(Box<FieldType>),
    /// The same number of items in every row, `{ fixed_size_list: { item: float32, size: 6 } }`.
    FixedSizeList {
        /// Type of each item.
        item: Box<FieldType>,
        /// Number of items, at least 1.
        size: u16,
    },
    /// Named fields, `{ struct: { lat: float64, lon: float64 } }`.
    Struct(Declaration),
}

/// Types of single values. Timestamps are instants, kept in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it; `Scalar::name` gives them as they are written")]
pub enum Scalar {
    Boolean,
    Int8,
    Int16,
    Int32,
    Int64,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Float32,
    Float64,
    Utf8,
    Binary,
    Date,
    TimestampS,
    TimestampMs,
    TimestampUs,
    TimestampNs,
}

pub(crate) static SCALARS: [(&str, Scalar); 18] = [
    ("boolean", Scalar::Boolean),
    ("int8", Scalar::Int8),
    ("int16", Scalar::Int16),
    ("int32", Scalar::Int32),
    ("int64", Scalar::Int64),
    ("uint8", Scalar::UInt8),
    ("uint16", Scalar::UInt16),
    ("uint32", Scalar::UInt32),
    ("uint64", Scalar::UInt64),
    ("float32", Scalar::Float32),
    ("float64", Scalar::Float64),
    ("utf8", Scalar::Utf8),
    ("binary", Scalar::Binary),
    ("date", Scalar::Date),
    ("timestamp_s", Scalar::TimestampS),
    ("timestamp_ms", Scalar::TimestampMs),
    ("timestamp_us", Scalar::TimestampUs),
    ("timestamp_ns", Scalar::TimestampNs),
];

impl Scalar {
    /// The name as written in a schema.
    pub fn name(self) -> &'static str {
        SCALARS.iter().find(|(_, scalar)| *scalar == self).map_or("unknown", |(name, _)| *name)
    }

    fn to_arrow(self) -> DataType {
        let timestamp = |unit| DataType::Timestamp(unit, Some(Arc::from("UTC")));
        match self {
            Scalar::Boolean => DataType::Boolean,
            Scalar::Int8 => DataType::Int8,
            Scalar::Int16 => DataType::Int16,
            Scalar::Int32 => DataType::Int32,
            Scalar::Int64 => DataType::Int64,
            Scalar::UInt8 => DataType::UInt8,
            Scalar::UInt16 => DataType::UInt16,
            Scalar::UInt32 => DataType::UInt32,
            Scalar::UInt64 => DataType::UInt64,
            Scalar::Float32 => DataType::Float32,
            Scalar::Float64 => DataType::Float64,
            Scalar::Utf8 => DataType::Utf8,
            Scalar::Binary => DataType::Binary,
            Scalar::Date => DataType::Date32,
            Scalar::TimestampS => timestamp(TimeUnit::Second),
            Scalar::TimestampMs => timestamp(TimeUnit::Millisecond),
            Scalar::TimestampUs => timestamp(TimeUnit::Microsecond),
            Scalar::TimestampNs => timestamp(TimeUnit::Nanosecond),
        }
    }
}

impl Declaration {
    /// The Arrow schema: columns in the declared order, timestamps in UTC, list items named `item`.
    pub fn to_arrow(&self) -> SchemaRef {
        Arc::new(ArrowSchema::new(self.fields()))
    }

    fn fields(&self) -> Vec<Field> {
        let field = |(name, of): &(String, FieldType)| of.to_field(name);
        self.0.iter().map(field).collect()
    }

    /// The declaration of a schema. Types that have no name here become the nearest that holds their values
    /// (`LargeUtf8` is `utf8`, a decimal `float64`, a timestamp without a zone is taken as UTC).
    ///
    /// # Errors
    /// [`FormatError::UnsupportedType`] for what has no counterpart: maps, unions, intervals, times of day.
    pub fn from_arrow(schema: &ArrowSchema) -> Result<Self, FormatError> {
        let column = |field: &Arc<Field>| {
            let of = FieldType::from_field(field).ok_or_else(|| FormatError::UnsupportedType {
                place: "a declared schema",
                column: field.name().clone(),
                data_type: field.data_type().clone(),
            })?;
            Ok((field.name().clone(), of))
        };
        Ok(Self(schema.fields().iter().map(column).collect::<Result<_, FormatError>>()?))
    }
}

impl FieldType {
    /// A scalar that may be null.
    pub fn scalar(scalar: Scalar) -> Self {
        Self::nullable(Kind::Scalar(scalar))
    }

    /// A value that may be null.
    pub fn nullable(kind: Kind) -> Self {
        Self { kind, required: false }
    }

    /// The Arrow type of the values.
    pub fn data_type(&self) -> DataType {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.to_arrow(),
            Kind::List(item) => DataType::List(Arc::new(item.to_field("item"))),
            Kind::FixedSizeList { item, size } => DataType::FixedSizeList(Arc::new(item.to_field("item")), i32::from(*size)),
            Kind::Struct(fields) => DataType::Struct(fields.fields().into()),
        }
    }

    fn to_field(&self, name: &str) -> Field {
        Field::new(name, self.data_type(), !self.required)
    }

    fn from_field(field: &Field) -> Option<Self> {
        Some(Self { kind: Kind::from_arrow(field.data_type())?, required: !field.is_nullable() })
    }
}

impl Kind {
    /// The declared kind nearest to an Arrow type, if there is one.
    pub fn from_arrow(data_type: &DataType) -> Option<Self> {
        let scalar = match data_type {
            DataType::Boolean => Scalar::Boolean,
            DataType::Int8 => Scalar::Int8,
            DataType::Int16 => Scalar::Int16,
            DataType::Int32 => Scalar::Int32,
            DataType::Int64 => Scalar::Int64,
            DataType::UInt8 => Scalar::UInt8,
            DataType::UInt16 => Scalar::UInt16,
            DataType::UInt32 => Scalar::UInt32,
            DataType::UInt64 => Scalar::UInt64,
            DataType::Float16 | DataType::Float32 => Scalar::Float32,
            DataType::Float64
            | DataType::Decimal32(..)
            | DataType::Decimal64(..)
            | DataType::Decimal128(..)
            | DataType::Decimal256(..) => Scalar::Float64,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => Scalar::Utf8,
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => Scalar::Binary,
            DataType::Date32 | DataType::Date64 => Scalar::Date,
            DataType::Timestamp(unit, _) => match unit {
                TimeUnit::Second => Scalar::TimestampS,
                TimeUnit::Millisecond => Scalar::TimestampMs,
                TimeUnit::Microsecond => Scalar::TimestampUs,
                TimeUnit::Nanosecond => Scalar::TimestampNs,
            },
            DataType::Dictionary(_, values) => return Self::from_arrow(values),
            DataType::List(item) | DataType::LargeList(item) => {
                return Some(Kind::List(Box::new(FieldType::from_field(item)?)));
            }
            DataType::FixedSizeList(item, size) => {
                return Some(Kind::FixedSizeList {
                    item: Box::new(FieldType::from_field(item)?),
                    size: u16::try_from(*size).ok().filter(|size| *size > 0)?,
                });
            }
            DataType::Struct(fields) if !fields.is_empty() => {
                let field = |field: &Arc<Field>| Some((field.name().clone(), FieldType::from_field(field)?));
                return Some(Kind::Struct(Declaration(fields.iter().map(field).collect::<Option<_>>()?)));
            }
            _ => return None,
        };
        Some(Kind::Scalar(scalar))
    }
}

/// The name of an Arrow type as an author would write it, for messages.
pub(crate) fn type_name(data_type: &DataType) -> String {
    match Kind::from_arrow(data_type) {
        Some(kind) => FieldType::nullable(kind).to_string(),
        None => data_type.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYTHING: &str = r#"{"ts":"timestamp_ms!","b":"boolean","zeta":"float32","alpha":"utf8",
        "tags":{"list":"utf8!"},"pos":{"struct":{"lat":"float64","lon":"float64"},"required":true},
        "vec":{"fixed_size_list":{"item":"float32","size":6}}}"#;

    fn read(text: &str) -> Result<Declaration, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn keeps_order_and_nullability() {
        let schema = read(EVERYTHING).unwrap().to_arrow();
        let names: Vec<_> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        assert_eq!(names, ["ts", "b", "zeta", "alpha", "tags", "pos", "vec"]);
        assert!(!schema.field(0).is_nullable() && schema.field(1).is_nullable());
        assert!(!schema.field(5).is_nullable());
        let utc = DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()));
        assert_eq!(schema.field(0).data_type(), &utc);
        let item = Field::new("item", DataType::Utf8, false);
        assert_eq!(schema.field(4).data_type(), &DataType::List(item.into()));
        let item = Field::new("item", DataType::Float32, true);
        assert_eq!(schema.field(6).data_type(), &DataType::FixedSizeList(item.into(), 6));
    }

    #[test]
    fn arrow_and_text_lead_back() {
        let declared = read(EVERYTHING).unwrap();
        assert_eq!(Declaration::from_arrow(&declared.to_arrow()).unwrap(), declared);
        let text = serde_json::to_string(&declared).unwrap();
        assert_eq!(read(&text).unwrap(), declared);
        for (name, scalar) in SCALARS {
            let declared = read(&format!("{{\"x\":\"{name}\"}}")).unwrap();
            assert_eq!(declared.0[0].1, FieldType::scalar(scalar));
            assert_eq!(Declaration::from_arrow(&declared.to_arrow()).unwrap(), declared);
        }
    }

    #[test]
    fn shows_itself_as_flow_yaml() {
        assert_eq!(
            read(EVERYTHING).unwrap().to_string(),
            "{ ts: timestamp_ms!, b: boolean, zeta: float32, alpha: utf8, tags: { list: utf8! }, \
             pos: { struct: { lat: float64, lon: float64 }, required: true }, \
             vec: { fixed_size_list: { item: float32, size: 6 } } }"
        );
        let odd = read(r#"{"no":"utf8","a b":"utf8","é\"":"utf8"}"#).unwrap();
        assert_eq!(odd.to_string(), r#"{ "no": utf8, "a b": utf8, "é\"": utf8 }"#);
    }

    #[test]
    fn names_the_type_that_was_meant() {
        for (wrong, right) in
            [("flaot32", "float32"), ("string", "utf8"), ("timestamp_mss", "timestamp_ms"), ("Double", "float64")]
        {
            let error = read(&format!("{{\"x\":\"{wrong}\"}}")).unwrap_err();
            assert!(error.contains(&format!("did you mean '{right}'?")), "{error}");
        }
        let error = read(r#"{"x":"quaternion"}"#).unwrap_err();
        assert!(error.contains("known types are boolean") && !error.contains("did you mean"));
    }

    #[test]
    fn refuses_what_makes_no_schema() {
        for (text, reason) in [
            ("{}", "at least one column"),
            (r#"{"a":"utf8","a":"int8"}"#, "declared twice"),
            (r#"{"":"utf8"}"#, "empty name"),
            (r#"{"a":{"lst":"utf8"}}"#, "unknown field `lst`"),
            (r#"{"a":{"required":true}}"#, "needs one of"),
            (r#"{"a":{"list":"utf8","struct":{"b":"utf8"}}}"#, "not several"),
            (r#"{"a":{"fixed_size_list":{"item":"utf8","size":0}}}"#, "at least 1"),
            (r#"{"a":{"struct":{}}}"#, "at least one column"),
            (r#"{"a":3}"#, "a type: a name"),
            ("[]", "a map from column names"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn from_arrow_names_what_it_cannot_hold() {
        let time = Field::new("t", DataType::Time32(TimeUnit::Second), true);
        let error = Declaration::from_arrow(&ArrowSchema::new(vec![time])).unwrap_err();
        assert!(error.to_string().contains("column 't'"), "{error}");
    }

    #[test]
    fn json_schema_recurses_by_reference() {
        let schema = schemars::schema_for!(Declaration);
        let text = serde_json::to_string(&schema).unwrap();
        assert!(text.contains("#/$defs/FieldType") && text.contains("timestamp_ms!"), "{text}");
    }
}
