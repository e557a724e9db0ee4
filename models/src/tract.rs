//! The pure-Rust backend: tract, for machines without ONNX Runtime. The runtime makes it; callers see only
//! the `Model` trait. Invariant: what a model file declares in between (inferred shapes, output shapes) is not
//! believed, only its inputs are, because exporters write shapes there that contradict each other.

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use arrow::buffer::Buffer;
use tract_onnx::Onnx;
use tract_onnx::pb;
use tract_onnx::prelude::{
    Datum, DatumType, Framework, InferenceModel, InferenceModelExt, TDim, TValue, TVec, Tensor as TractTensor, TractResult,
    TypedRunnableModel, TypedSimplePlan,
};
use tract_onnx::tract_hir::infer::Factoid;

use crate::backend::{InferenceError, Model, bind};
use crate::onnx;
use crate::signature::{Dim, Signature, TensorSpec};
use crate::tensor::{DataType, Element, Tensor, TensorError};

/// Name of this backend.
pub(crate) const NAME: &str = "tract";

/// Plans for fixed shapes that are kept, where one plan for all shapes cannot be had.
const KEPT_PLANS: usize = 16;

type Plan = Arc<TypedRunnableModel>;

/// A model as an execution plan in which open extents are symbols. Some models cannot be planned that way
/// (their operators need to know an extent); for these, and for calls on which the symbols clash, a plan is
/// made for the very shapes of the call, and the last few of them are kept.
pub(crate) struct TractModel {
    signature: Signature,
    graph: InferenceModel,
    symbolic: Option<Plan>,
    /// Plans by the shapes of the inputs, most recently used last.
    fixed: Mutex<Vec<(Vec<Vec<usize>>, Plan)>>,
}

impl TractModel {
    /// Reads and plans an ONNX file.
    pub(crate) fn load(bytes: &[u8]) -> Result<TractModel, String> {
        let mut reader = bytes;
        let model = framework().proto_model_for_read(&mut reader).map_err(|error| format!("this is no ONNX file: {error:#}"))?;
        TractModel::from_proto(&model)
    }

    fn from_proto(model: &pb::ModelProto) -> Result<TractModel, String> {
        let framework = framework();
        let Some(graph) = &model.graph else {
            return Err("this is no ONNX file: it holds no graph".into());
        };
        onnx::check_outputs(graph)?;
        check_operators(&framework, graph)?;
        let signature = onnx::signature(graph)?;
        let graph = framework.model_for_proto_model(model).map_err(|error| format!("{error:#}"))?;
        let symbolic = match plan_for_any(graph.clone()) {
            Ok(plan) => Some(plan),
            Err(error) if is_fixed(&signature) => return Err(format!("{error:#}")),
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "tract plans this model for each shape anew");
                None
            }
        };
        Ok(TractModel { signature, graph, symbolic, fixed: Mutex::new(Vec::new()) })
    }

    /// The plan for these inputs' shapes, from those that are kept or made anew.
    fn fixed_plan(&self, inputs: &[&Tensor]) -> TractResult<Plan> {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|input| input.shape().to_vec()).collect();
        {
            let mut kept = self.fixed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = kept.iter().position(|(planned, _)| *planned == shapes) {
                let entry = kept.remove(index);
                let plan = Arc::clone(&entry.1);
                kept.push(entry);
                return Ok(plan);
            }
        }
        // Planning takes milliseconds and more, so not under the lock: two threads may do it twice.
        let plan = plan_for(self.graph.clone(), &shapes)?;
        let mut kept = self.fixed.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_PLANS {
            kept.remove(0);
        }
        kept.push((shapes, Arc::clone(&plan)));
        Ok(plan)
    }
}

impl Model for TractModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&self, inputs: &[(&str, Tensor)]) -> Result<Vec<Tensor>, InferenceError> {
        let inputs = bind(&self.signature, inputs)?;
        let ran = match &self.symbolic {
            Some(plan) => plan.run(values(&inputs)?),
            None => self.fixed_plan(&inputs).map_err(failed)?.run(values(&inputs)?),
        };
        let outputs = match ran {
            Ok(outputs) => outputs,
            Err(error) if self.symbolic.is_some() => {
                tracing::debug!(error = format!("{error:#}"), "tract takes a plan for the shapes of this call");
                self.fixed_plan(&inputs).and_then(|plan| plan.run(values(&inputs)?)).map_err(failed)?
            }
            Err(error) => return Err(failed(error)),
        };
        self.signature.outputs.iter().zip(outputs.iter()).map(|(spec, value)| output(spec, value)).collect()
    }

    fn backend(&self) -> &'static str {
        NAME
    }
}

fn framework() -> Onnx {
    tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true)
}

/// Plans with a symbol for every open extent. Unnamed first axes share one: they are the batch.
fn plan_for_any(mut graph: InferenceModel) -> TractResult<Plan> {
    let batch = graph.symbols.new_with_prefix("batch");
    for input in 0..graph.inputs.len() {
        let fact = graph.input_fact(input)?.clone();
        if fact.shape.is_open() {
            // A rank that is not declared cannot be a symbol; planning below then says so.
            continue;
        }
        let shape: TVec<TDim> = fact
            .shape
            .dims()
            .enumerate()
            .map(|(axis, extent)| match extent.concretize() {
                Some(extent) => extent,
                None if axis == 0 => TDim::from(&batch),
                None => TDim::from(graph.symbols.new_with_prefix("extent")),
            })
            .collect();
        graph.set_input_fact(input, fact.with_shape(shape))?;
    }
    TypedSimplePlan::new(graph.into_optimized()?)
}

/// Plans for inputs of exactly these shapes.
fn plan_for(mut graph: InferenceModel, shapes: &[Vec<usize>]) -> TractResult<Plan> {
    for (input, shape) in shapes.iter().enumerate() {
        let fact = graph.input_fact(input)?.clone();
        graph.set_input_fact(input, fact.with_shape(shape.iter()))?;
    }
    TypedSimplePlan::new(graph.into_optimized()?)
}

/// Whether every call has the same shapes, so that a plan that fails once fails always. An empty shape may be
/// an undeclared rank.
fn is_fixed(signature: &Signature) -> bool {
    signature.inputs.iter().all(|spec| !spec.shape.is_empty() && spec.shape.iter().all(|dim| matches!(dim, Dim::Fixed(_))))
}

fn failed(error: impl Display) -> InferenceError {
    InferenceError::Backend { backend: NAME, message: format!("{error:#}") }
}

/// What tract does not know is said at once, and by name; otherwise the first call would fail.
fn check_operators(framework: &Onnx, graph: &pb::GraphProto) -> Result<(), String> {
    let unknown: Vec<&str> = graph
        .node
        .iter()
        .map(|node| node.op_type.as_str())
        .filter(|&operator| !framework.op_register.0.contains_key(operator))
        .collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!(
        "tract does not know the operators {}; install ONNX Runtime (`pip install onnxruntime`), which does",
        unknown.join(", ")
    ))
}

/// The inputs as tract takes them: copied, since its memory is its own.
fn values(inputs: &[&Tensor]) -> Result<TVec<TValue>, InferenceError> {
    inputs.iter().map(|input| value(input)).collect()
}

fn value(tensor: &Tensor) -> Result<TValue, InferenceError> {
    match tensor.data_type() {
        DataType::Fp32 => copied_in::<f32>(tensor),
        DataType::Fp64 => copied_in::<f64>(tensor),
        DataType::Int8 => copied_in::<i8>(tensor),
        DataType::Int16 => copied_in::<i16>(tensor),
        DataType::Int32 => copied_in::<i32>(tensor),
        DataType::Int64 => copied_in::<i64>(tensor),
        DataType::Uint8 => copied_in::<u8>(tensor),
        DataType::Uint16 => copied_in::<u16>(tensor),
        DataType::Uint32 => copied_in::<u32>(tensor),
        DataType::Uint64 => copied_in::<u64>(tensor),
        DataType::Bool => {
            let elements: Vec<bool> = tensor.bools().into_iter().flatten().collect();
            let tensor = TractTensor::from_shape(tensor.shape(), &elements).map_err(failed)?;
            Ok(TValue::from(tensor))
        }
        DataType::Bytes => Err(failed("BYTES tensors are not supported")),
    }
}

fn copied_in<T: Element + Datum>(tensor: &Tensor) -> Result<TValue, InferenceError> {
    let elements = tensor.as_slice::<T>().ok_or_else(|| failed(format!("{tensor} is not of type {}", T::DATA_TYPE)))?;
    let tensor = TractTensor::from_shape(tensor.shape(), elements).map_err(failed)?;
    Ok(TValue::from(tensor))
}

/// An output in the type that the file declares: tract computes shapes in a type of its own.
fn output(spec: &TensorSpec, value: &TractTensor) -> Result<Tensor, InferenceError> {
    match spec.data_type {
        DataType::Fp32 => copied_out::<f32>(spec, value),
        DataType::Fp64 => copied_out::<f64>(spec, value),
        DataType::Int8 => copied_out::<i8>(spec, value),
        DataType::Int16 => copied_out::<i16>(spec, value),
        DataType::Int32 => copied_out::<i32>(spec, value),
        DataType::Int64 => copied_out::<i64>(spec, value),
        DataType::Uint8 => copied_out::<u8>(spec, value),
        DataType::Uint16 => copied_out::<u16>(spec, value),
        DataType::Uint32 => copied_out::<u32>(spec, value),
        DataType::Uint64 => copied_out::<u64>(spec, value),
        DataType::Bool => {
            let value = value.cast_to_dt(DatumType::Bool).map_err(failed)?;
            let plain = value.try_as_plain_ram().map_err(failed)?;
            let elements = plain.as_slice::<bool>().map_err(failed)?;
            Tensor::from_bools(value.shape().to_vec(), elements.iter().copied()).map_err(|error| unreadable(spec, error))
        }
        DataType::Bytes => Err(unreadable(spec, TensorError::Unsupported { data_type: DataType::Bytes })),
    }
}

fn copied_out<T: Element + Datum>(spec: &TensorSpec, value: &TractTensor) -> Result<Tensor, InferenceError> {
    let value = value.cast_to_dt(T::datum_type()).map_err(failed)?;
    let plain = value.try_as_plain_ram().map_err(failed)?;
    let elements = plain.as_slice::<T>().map_err(failed)?;
    let data = Buffer::from_slice_ref::<T, _>(elements);
    Tensor::from_buffer(T::DATA_TYPE, value.shape().to_vec(), data).map_err(|error| unreadable(spec, error))
}

fn unreadable(spec: &TensorSpec, error: TensorError) -> InferenceError {
    InferenceError::Output { output: spec.name.clone(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An axis: a number, a name, or nothing.
    enum Axis {
        Fixed(i64),
        Named(&'static str),
        Open,
    }

    fn tensor_info(name: &str, element: pb::tensor_proto::DataType, axes: &[Axis]) -> pb::ValueInfoProto {
        use pb::tensor_shape_proto::dimension::Value;

        let dim = axes
            .iter()
            .map(|axis| pb::tensor_shape_proto::Dimension {
                value: match axis {
                    Axis::Fixed(extent) => Some(Value::DimValue(*extent)),
                    Axis::Named(name) => Some(Value::DimParam((*name).into())),
                    Axis::Open => None,
                },
                ..Default::default()
            })
            .collect();
        let tensor = pb::type_proto::Tensor { elem_type: element as i32, shape: Some(pb::TensorShapeProto { dim }) };
        pb::ValueInfoProto {
            name: name.into(),
            r#type: Some(pb::TypeProto { value: Some(pb::type_proto::Value::TensorType(tensor)), ..Default::default() }),
            ..Default::default()
        }
    }

    fn float(name: &str, axes: &[Axis]) -> pb::ValueInfoProto {
        tensor_info(name, pb::tensor_proto::DataType::Float, axes)
    }

    fn node(operator: &str, inputs: &[&str], output: &str) -> pb::NodeProto {
        pb::NodeProto {
            op_type: operator.into(),
            name: format!("{operator}_{output}"),
            input: inputs.iter().map(|&input| input.into()).collect(),
            output: vec![output.into()],
            ..Default::default()
        }
    }

    fn model(graph: pb::GraphProto) -> pb::ModelProto {
        pb::ModelProto {
            ir_version: 8,
            opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: 13 }],
            graph: Some(graph),
            ..Default::default()
        }
    }

    /// `score = relu(readings + [10, -10])`, with a false shape declared in between.
    fn shifted(axes: &[Axis]) -> pb::ModelProto {
        model(pb::GraphProto {
            name: "shifted".into(),
            node: vec![node("Add", &["readings", "shift"], "sum"), node("Relu", &["sum"], "score")],
            initializer: vec![pb::TensorProto {
                name: "shift".into(),
                dims: vec![2],
                data_type: pb::tensor_proto::DataType::Float as i32,
                float_data: vec![10.0, -10.0],
                ..Default::default()
            }],
            input: vec![float("readings", axes), float("shift", &[Axis::Fixed(2)])],
            value_info: vec![float("sum", &[Axis::Fixed(77), Axis::Fixed(2)])],
            output: vec![float("score", &[Axis::Fixed(99), Axis::Fixed(2)])],
            ..Default::default()
        })
    }

    fn run(model: &TractModel, shape: Vec<usize>, values: Vec<f32>) -> Tensor {
        let inputs = [("readings", Tensor::from_vec(shape, values).unwrap())];
        let mut outputs = model.run(&inputs).unwrap();
        assert_eq!(outputs.len(), 1);
        outputs.remove(0)
    }

    #[test]
    fn one_plan_serves_every_batch_size_named_or_not() {
        for axis in [Axis::Named("N"), Axis::Open] {
            let model = TractModel::from_proto(&shifted(&[axis, Axis::Fixed(2)])).unwrap();
            assert!(model.symbolic.is_some());
            assert_eq!(model.signature().inputs[0].to_string(), "readings: FP32[?,2]");
            assert_eq!(model.signature().inputs.len(), 1);
            let one = run(&model, vec![1, 2], vec![1.0, 2.0]);
            assert_eq!((one.shape(), one.as_f32()), (&[1, 2][..], Some(&[11.0, 0.0][..])));
            let two = run(&model, vec![2, 2], vec![-11.0, 12.0, 0.5, 10.5]);
            assert_eq!(two.shape(), [2, 2]);
            assert_eq!(two.as_f32(), Some(&[0.0, 2.0, 10.5, 0.5][..]));
            assert!(model.fixed.lock().unwrap().is_empty());
        }
    }

    #[test]
    fn plans_for_fixed_shapes_are_right_kept_and_bounded() {
        let mut model = TractModel::from_proto(&shifted(&[Axis::Open, Axis::Fixed(2)])).unwrap();
        model.symbolic = None;
        for rows in (1..=KEPT_PLANS + 2).chain([KEPT_PLANS + 2]) {
            let output = run(&model, vec![rows, 2], vec![1.0; rows * 2]);
            assert_eq!(output.shape(), [rows, 2]);
            assert_eq!(&output.as_f32().unwrap()[..2], [11.0, 0.0]);
        }
        let kept = model.fixed.lock().unwrap();
        assert_eq!(kept.len(), KEPT_PLANS);
        assert_eq!(kept[0].0, [[3, 2]]);
        assert_eq!(kept[KEPT_PLANS - 1].0, [[KEPT_PLANS + 2, 2]]);
    }

    #[test]
    fn integers_and_truth_values_pass() {
        use pb::tensor_proto::DataType::{Bool, Int64};

        let proto = model(pb::GraphProto {
            name: "bigger".into(),
            node: vec![node("Greater", &["a", "b"], "is_bigger")],
            input: vec![tensor_info("a", Int64, &[Axis::Named("N")]), tensor_info("b", Int64, &[Axis::Named("N")])],
            output: vec![tensor_info("is_bigger", Bool, &[Axis::Named("N")])],
            ..Default::default()
        });
        let model = TractModel::from_proto(&proto).unwrap();
        let inputs = [
            ("b", Tensor::from_vec(vec![3], vec![2_i64, 2, 2]).unwrap()),
            ("a", Tensor::from_vec(vec![3], vec![1_i64, 2, 3]).unwrap()),
        ];
        let outputs = model.run(&inputs).unwrap();
        assert_eq!(outputs[0].bools().unwrap().collect::<Vec<_>>(), [false, false, true]);
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_name() {
        let error = |proto: &pb::ModelProto| TractModel::from_proto(proto).err().unwrap();
        let mut unknown = shifted(&[Axis::Open, Axis::Fixed(2)]);
        unknown.graph.as_mut().unwrap().node[1].op_type = "Frobnicate".into();
        assert!(error(&unknown).starts_with("tract does not know the operators Frobnicate;"));

        let mut dangling = shifted(&[Axis::Open, Axis::Fixed(2)]);
        dangling.graph.as_mut().unwrap().output[0].name = "nowhere".into();
        assert_eq!(error(&dangling), "nothing in the graph makes its output `nowhere`");

        let mut half = shifted(&[Axis::Open, Axis::Fixed(2)]);
        half.graph.as_mut().unwrap().input[0] = tensor_info("readings", pb::tensor_proto::DataType::Float16, &[Axis::Open]);
        assert_eq!(error(&half), "the input `readings` has the element type FLOAT16, which is not supported");

        let garbage = TractModel::load(b"\xff\xff\xff not a model").err().unwrap();
        assert!(garbage.starts_with("this is no ONNX file: "), "{garbage}");
    }
}
