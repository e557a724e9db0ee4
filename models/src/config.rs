//! `config.pbtxt` of a model: what its publisher declares about it. The repository reads it, the runtime
//! checks it against the signature of the model file. The file is optional and everything in it is too; keys
//! that are not listed here are for other servers and are ignored.
//!
//! Keys: `model_config.proto` of triton-inference-server/common.

use std::collections::BTreeSet;

use crate::pbtxt::{self, ConfigError, Field, Message, Value};
use crate::signature::{Dim, Signature, TensorSpec, listed};
use crate::tensor::{DataType, bracketed};

/// Which versions of a model are served. The newest of them is the default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VersionPolicy {
    /// The newest so many.
    Latest(u64),
    /// Every one.
    All,
    /// These alone.
    Specific(Vec<u64>),
}

impl Default for VersionPolicy {
    fn default() -> Self {
        VersionPolicy::Latest(1)
    }
}

impl VersionPolicy {
    /// The versions that are served, out of those that are there.
    pub fn select(&self, present: &BTreeSet<u64>) -> BTreeSet<u64> {
        match self {
            VersionPolicy::All => present.clone(),
            VersionPolicy::Latest(count) => {
                let count = usize::try_from(*count).unwrap_or(usize::MAX);
                present.iter().rev().take(count).copied().collect()
            }
            VersionPolicy::Specific(wanted) => wanted.iter().filter(|version| present.contains(*version)).copied().collect(),
        }
    }
}

/// One `input` or `output` block.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TensorConfig {
    /// Name in the model file.
    pub name: String,
    /// Declared element type, if any.
    pub data_type: Option<DataType>,
    /// Declared axes without the batch, if any; `-1` is [`Dim::Any`].
    pub dims: Option<Vec<Dim>>,
    /// Axes of the model file without the batch, where they differ from `dims`.
    pub reshape: Option<Vec<Dim>>,
    /// File with one label a line, beside `config.pbtxt`.
    pub label_filename: Option<String>,
}

/// A `config.pbtxt`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelConfig {
    /// Name of the model; its directory has the same.
    pub name: Option<String>,
    /// Older word for the backend: `onnxruntime_onnx`.
    pub platform: Option<String>,
    /// What runs the model: `onnxruntime`.
    pub backend: Option<String>,
    /// File in the version directory, if it is not `model.onnx`.
    pub default_model_filename: Option<String>,
    /// Rows that one call may hold. 0: the first axis is no batch, and `dims` name every axis.
    pub max_batch_size: u64,
    /// Declared inputs; those left out are taken from the model file.
    pub inputs: Vec<TensorConfig>,
    /// Declared outputs; those left out are taken from the model file.
    pub outputs: Vec<TensorConfig>,
    /// Which versions are served.
    pub version_policy: VersionPolicy,
}

/// How a `config.pbtxt` contradicts the model file beside it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigMismatch {
    /// A declared tensor is not in the file.
    #[error("config.pbtxt declares the {side} `{name}`, but the model has {available}")]
    Unknown {
        /// `input` or `output`.
        side: &'static str,
        /// Name in the configuration.
        name: String,
        /// What the model has.
        available: String,
    },
    /// The element types differ.
    #[error("config.pbtxt declares the {side} `{name}` as {declared}, but the model has {actual}")]
    DataType {
        /// `input` or `output`.
        side: &'static str,
        /// Name of the tensor.
        name: String,
        /// Type in the configuration.
        declared: DataType,
        /// What the model has.
        actual: String,
    },
    /// The shapes differ.
    #[error("config.pbtxt declares the {side} `{name}` with the shape {declared}{batch}, but the model has {actual}")]
    Shape {
        /// `input` or `output`.
        side: &'static str,
        /// Name of the tensor.
        name: String,
        /// Shape in the configuration, batch included.
        declared: String,
        /// Where the batch axis comes from, if there is one.
        batch: &'static str,
        /// What the model has.
        actual: String,
    },
}

impl ModelConfig {
    /// Reads the text of a `config.pbtxt`.
    pub fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
        let message = pbtxt::parse(text)?;
        Ok(ModelConfig {
            name: text_of(&message, "name")?,
            platform: text_of(&message, "platform")?,
            backend: text_of(&message, "backend")?,
            default_model_filename: text_of(&message, "default_model_filename")?,
            max_batch_size: match message.last("max_batch_size") {
                Some(field) => unsigned(field)?,
                None => 0,
            },
            inputs: tensors(&message, "input")?,
            outputs: tensors(&message, "output")?,
            version_policy: version_policy(&message)?,
        })
    }

    /// Compares what is declared with what the model file says. Dimensions that either side leaves open agree
    /// with everything.
    pub fn check(&self, signature: &Signature) -> Result<(), ConfigMismatch> {
        self.check_side("input", &self.inputs, &signature.inputs)?;
        self.check_side("output", &self.outputs, &signature.outputs)
    }

    fn check_side(&self, side: &'static str, declared: &[TensorConfig], actual: &[TensorSpec]) -> Result<(), ConfigMismatch> {
        for tensor in declared {
            let name = tensor.name.clone();
            let Some(spec) = actual.iter().find(|spec| spec.name == tensor.name) else {
                let available = listed(actual);
                return Err(ConfigMismatch::Unknown { side, name, available });
            };
            if let Some(declared) = tensor.data_type
                && declared != spec.data_type
            {
                return Err(ConfigMismatch::DataType { side, name, declared, actual: spec.to_string() });
            }
            if let Some(shape) = self.full_shape(tensor)
                && !agree(&shape, &spec.shape)
            {
                return Err(ConfigMismatch::Shape {
                    side,
                    name,
                    declared: bracketed(&shape),
                    batch: if self.max_batch_size > 0 { " (the first axis for max_batch_size)" } else { "" },
                    actual: spec.to_string(),
                });
            }
        }
        Ok(())
    }

    /// The declared shape as the model file counts it: with the batch axis.
    fn full_shape(&self, tensor: &TensorConfig) -> Option<Vec<Dim>> {
        let dims = tensor.reshape.as_ref().or(tensor.dims.as_ref())?;
        let batch = (self.max_batch_size > 0).then_some(Dim::Any);
        Some(batch.into_iter().chain(dims.iter().copied()).collect())
    }
}

/// An empty shape in a signature may be an undeclared rank, so it agrees with everything.
fn agree(declared: &[Dim], actual: &[Dim]) -> bool {
    actual.is_empty()
        || declared.len() == actual.len()
            && declared.iter().zip(actual).all(|pair| match pair {
                (Dim::Fixed(declared), Dim::Fixed(actual)) => declared == actual,
                _ => true,
            })
}

fn text_of(message: &Message, name: &str) -> Result<Option<String>, ConfigError> {
    let Some(field) = message.last(name) else {
        return Ok(None);
    };
    match &field.value {
        Value::Text(text) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        _ => Err(field.position.error(format!("`{name}` must be a quoted text"))),
    }
}

/// A number, truth value or enum word.
fn word(field: &Field) -> Result<&str, ConfigError> {
    match &field.value {
        Value::Word(word) => Ok(word),
        Value::Text(text) => Err(field.position.error(format!("`{}` must not be quoted, found `{text}`", field.name))),
        Value::Message(_) => Err(field.position.error(format!("`{}` must be a single value", field.name))),
    }
}

fn nested(field: &Field) -> Result<&Message, ConfigError> {
    match &field.value {
        Value::Message(message) => Ok(message),
        _ => Err(field.position.error(format!("`{}` must be a message in `{{ }}`", field.name))),
    }
}

fn unsigned(field: &Field) -> Result<u64, ConfigError> {
    let word = word(field)?;
    word.parse().map_err(|_| field.position.error(format!("`{}` must be a whole number from 0 up, found `{word}`", field.name)))
}

fn dim(field: &Field) -> Result<Dim, ConfigError> {
    match word(field)? {
        "-1" => Ok(Dim::Any),
        extent => extent.parse().map(Dim::Fixed).map_err(|_| {
            field.position.error(format!("`{}` must be a whole number, or -1 for any, found `{extent}`", field.name))
        }),
    }
}

/// Repeated dimensions; `None` if there are none, since an empty list reads the same as a missing one.
fn dims(message: &Message, name: &str) -> Result<Option<Vec<Dim>>, ConfigError> {
    let dims: Vec<Dim> = message.all(name).map(dim).collect::<Result<_, _>>()?;
    Ok(Some(dims).filter(|dims| !dims.is_empty()))
}

fn tensors(message: &Message, name: &str) -> Result<Vec<TensorConfig>, ConfigError> {
    message
        .all(name)
        .map(|field| {
            let tensor = nested(field)?;
            let Some(name) = text_of(tensor, "name")? else {
                return Err(field.position.error(format!("this `{name}` has no `name`")));
            };
            Ok(TensorConfig {
                name,
                data_type: tensor.last("data_type").map(data_type).transpose()?,
                dims: dims(tensor, "dims")?,
                reshape: match tensor.last("reshape") {
                    // A reshape to no axes is one: the tensor has the batch axis alone.
                    Some(field) => Some(dims(nested(field)?, "shape")?.unwrap_or_default()),
                    None => None,
                },
                label_filename: text_of(tensor, "label_filename")?,
            })
        })
        .collect()
}

fn data_type(field: &Field) -> Result<DataType, ConfigError> {
    let word = word(field)?;
    if word == "TYPE_STRING" {
        return Ok(DataType::Bytes);
    }
    word.strip_prefix("TYPE_").and_then(DataType::from_name).filter(|&data_type| data_type != DataType::Bytes).ok_or_else(|| {
        let known: Vec<String> = DataType::ALL
            .into_iter()
            .filter(|&data_type| data_type != DataType::Bytes)
            .map(|data_type| format!("TYPE_{data_type}"))
            .collect();
        field.position.error(format!("the data type `{word}` is not supported; these are: {}, TYPE_STRING", known.join(", ")))
    })
}

fn version_policy(message: &Message) -> Result<VersionPolicy, ConfigError> {
    let Some(field) = message.last("version_policy") else {
        return Ok(VersionPolicy::default());
    };
    let policy = nested(field)?;
    if let Some(latest) = policy.last("latest") {
        let count = match nested(latest)?.last("num_versions") {
            Some(count) => unsigned(count)?,
            None => 1,
        };
        if count == 0 {
            return Err(latest.position.error("`num_versions` must be 1 or more"));
        }
        return Ok(VersionPolicy::Latest(count));
    }
    if policy.last("all").is_some() {
        return Ok(VersionPolicy::All);
    }
    if let Some(specific) = policy.last("specific") {
        let versions: Vec<u64> = nested(specific)?.all("versions").map(unsigned).collect::<Result<_, _>>()?;
        if versions.is_empty() {
            return Err(specific.position.error("`specific` names no `versions`"));
        }
        return Ok(VersionPolicy::Specific(versions));
    }
    Err(field.position.error("`version_policy` must be one of `latest`, `all`, `specific`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANOMALY: &str = r#"
        name: "anomaly"
        platform: "onnxruntime_onnx"
        max_batch_size: 32
        input [ { name: "x" data_type: TYPE_FP32 dims: [ 100, -1 ] } ]
        output { name: "y", data_type: TYPE_FP32, dims: 2, label_filename: "labels.txt" }
        version_policy: { specific: { versions: [ 1, 3 ] } }
        instance_group [ { count: 2 kind: KIND_CPU } ]
        dynamic_batching { preferred_batch_size: [ 8, 32 ] }
    "#;

    fn spec(name: &str, data_type: DataType, shape: Vec<Dim>) -> TensorSpec {
        TensorSpec { name: name.into(), data_type, shape }
    }

    fn anomaly() -> Signature {
        Signature {
            inputs: vec![spec("x", DataType::Fp32, vec![Dim::Any, Dim::Fixed(100), Dim::Fixed(6)])],
            outputs: vec![spec("y", DataType::Fp32, vec![Dim::Any, Dim::Fixed(2)])],
        }
    }

    #[test]
    fn a_whole_file_is_read() {
        let config = ModelConfig::parse(ANOMALY).unwrap();
        assert_eq!(config.name.as_deref(), Some("anomaly"));
        assert_eq!(config.max_batch_size, 32);
        assert_eq!(
            config.inputs,
            [TensorConfig {
                name: "x".into(),
                data_type: Some(DataType::Fp32),
                dims: Some(vec![Dim::Fixed(100), Dim::Any]),
                ..TensorConfig::default()
            }]
        );
        assert_eq!(config.outputs[0].label_filename.as_deref(), Some("labels.txt"));
        assert_eq!(config.version_policy, VersionPolicy::Specific(vec![1, 3]));
        config.check(&anomaly()).unwrap();
    }

    #[test]
    fn an_empty_file_declares_nothing() {
        let config = ModelConfig::parse("# nothing\n").unwrap();
        assert_eq!(config, ModelConfig::default());
        config.check(&anomaly()).unwrap();
    }

    #[test]
    fn contradictions_name_both_sides() {
        let error = |text: &str| {
            let config = ModelConfig::parse(text).unwrap();
            config.check(&anomaly()).unwrap_err().to_string()
        };
        assert_eq!(error("input { name: \"z\" }"), "config.pbtxt declares the input `z`, but the model has x: FP32[?,100,6]");
        assert_eq!(
            error("output { name: \"y\" data_type: TYPE_INT64 }"),
            "config.pbtxt declares the output `y` as INT64, but the model has y: FP32[?,2]"
        );
        assert_eq!(
            error("max_batch_size: 8 input { name: \"x\" dims: [ 50, 6 ] }"),
            "config.pbtxt declares the input `x` with the shape [?,50,6] (the first axis for max_batch_size), \
             but the model has x: FP32[?,100,6]"
        );
        assert_eq!(
            error("input { name: \"x\" dims: [ 100, 6 ] }"),
            "config.pbtxt declares the input `x` with the shape [100,6], but the model has x: FP32[?,100,6]"
        );
    }

    #[test]
    fn a_reshape_is_what_the_model_sees() {
        let config =
            ModelConfig::parse("max_batch_size: 1 output { name: \"y\" dims: [ 1, 2 ] reshape: { shape: [ 2 ] } }").unwrap();
        config.check(&anomaly()).unwrap();
    }

    #[test]
    fn wrong_values_are_shown_with_their_place() {
        let error = |text: &str| ModelConfig::parse(text).unwrap_err().to_string();
        assert_eq!(
            error("max_batch_size: many"),
            "line 1, column 17: `max_batch_size` must be a whole number from 0 up, found `many`"
        );
        assert!(
            error("input { name: \"x\"\n data_type: TYPE_FP16 }")
                .starts_with("line 2, column 13: the data type `TYPE_FP16` is not supported; these are: TYPE_FP32,")
        );
        assert_eq!(error("input { dims: 3 }"), "line 1, column 7: this `input` has no `name`");
        assert_eq!(
            error("version_policy { newest { } }"),
            "line 1, column 16: `version_policy` must be one of `latest`, `all`, `specific`"
        );
    }

    #[test]
    fn policies_select_versions() {
        let present = BTreeSet::from([1, 2, 10]);
        assert_eq!(VersionPolicy::default().select(&present), BTreeSet::from([10]));
        assert_eq!(VersionPolicy::Latest(2).select(&present), BTreeSet::from([2, 10]));
        assert_eq!(VersionPolicy::All.select(&present), present);
        assert_eq!(VersionPolicy::Specific(vec![2, 3]).select(&present), BTreeSet::from([2]));
    }
}
