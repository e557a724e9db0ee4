//! What a model takes and gives: names, element types and shapes. Backends read it from the model file,
//! planners bind columns to it before anything runs. The order of inputs and outputs is the file's own.

use std::fmt;

use crate::tensor::{DataType, Tensor, bracketed};

/// Extent of one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Always this many.
    Fixed(usize),
    /// Decided by each call: a batch, a sequence.
    Any,
}

impl Dim {
    /// Whether an axis of this extent fits.
    pub fn accepts(self, extent: usize) -> bool {
        match self {
            Dim::Fixed(fixed) => fixed == extent,
            Dim::Any => true,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(extent) => write!(formatter, "{extent}"),
            Dim::Any => formatter.write_str("?"),
        }
    }
}

/// One input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the model file.
    pub name: String,
    /// Element type.
    pub data_type: DataType,
    /// Axes, outermost first. Empty for a scalar, and for a tensor whose rank the file does not declare
    /// (ONNX Runtime does not tell the two apart).
    pub shape: Vec<Dim>,
}

impl TensorSpec {
    /// Whether the tensor has this type and fits this shape. An undeclared rank fits every shape.
    pub fn accepts(&self, tensor: &Tensor) -> bool {
        self.data_type == tensor.data_type() && (self.shape.is_empty() || self.fits(tensor.shape()))
    }

    fn fits(&self, shape: &[usize]) -> bool {
        self.shape.len() == shape.len() && self.shape.iter().zip(shape).all(|(dim, &extent)| dim.accepts(extent))
    }
}

/// `window: FP32[?,100,6]`
impl fmt::Display for TensorSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}{}", self.name, self.data_type, bracketed(&self.shape))
    }
}

/// All inputs and outputs of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signature {
    /// What [`Model::run`](crate::Model::run) must be given.
    pub inputs: Vec<TensorSpec>,
    /// What it returns, in this order.
    pub outputs: Vec<TensorSpec>,
}

impl Signature {
    /// The input of this name.
    pub fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|spec| spec.name == name)
    }

    /// The output of this name.
    pub fn output(&self, name: &str) -> Option<&TensorSpec> {
        self.outputs.iter().find(|spec| spec.name == name)
    }
}

/// `(readings: FP32[?,9]) -> (score: FP32[?])`
impl fmt::Display for Signature {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "({}) -> ({})", listed(&self.inputs), listed(&self.outputs))
    }
}

/// `a: FP32[?], b: INT64[3]`
pub(crate) fn listed(specs: &[TensorSpec]) -> String {
    let specs: Vec<String> = specs.iter().map(TensorSpec::to_string).collect();
    specs.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(shape: Vec<Dim>) -> TensorSpec {
        TensorSpec { name: "window".into(), data_type: DataType::Fp32, shape }
    }

    #[test]
    fn a_signature_reads_like_a_function() {
        let signature = Signature {
            inputs: vec![spec(vec![Dim::Any, Dim::Fixed(100), Dim::Fixed(6)])],
            outputs: vec![TensorSpec { name: "score".into(), ..spec(vec![]) }],
        };
        assert_eq!(signature.to_string(), "(window: FP32[?,100,6]) -> (score: FP32[])");
        assert!(signature.input("window").is_some());
        assert!(signature.output("window").is_none());
    }

    #[test]
    fn a_tensor_fits_by_type_rank_and_extent() {
        let tensor = |shape: Vec<usize>| {
            let elements: usize = shape.iter().product();
            Tensor::from_vec(shape, vec![0.0_f32; elements]).unwrap()
        };
        let batched = spec(vec![Dim::Any, Dim::Fixed(2)]);
        assert!(batched.accepts(&tensor(vec![5, 2])));
        assert!(!batched.accepts(&tensor(vec![5, 3])));
        assert!(!batched.accepts(&tensor(vec![2])));
        assert!(!batched.accepts(&Tensor::from_vec(vec![1, 2], vec![0_i32; 2]).unwrap()));
        assert!(spec(vec![]).accepts(&tensor(vec![5, 3])));
    }
}
