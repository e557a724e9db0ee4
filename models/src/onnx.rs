//! What an ONNX file itself says: its inputs and outputs, read from the protobuf. The tract backend uses it;
//! ONNX Runtime reads the file by itself and tells the same. Invariant: constants that the graph lists among
//! its inputs are no inputs.

use std::collections::HashSet;

use tract_onnx::pb;

use crate::signature::{Dim, Signature, TensorSpec};
use crate::tensor::DataType;

/// Every output comes from somewhere; tract takes that for granted.
pub(crate) fn check_outputs(graph: &pb::GraphProto) -> Result<(), String> {
    let made: HashSet<&str> = graph
        .node
        .iter()
        .flat_map(|node| node.output.iter().map(String::as_str))
        .chain(graph.input.iter().map(|input| input.name.as_str()))
        .chain(graph.initializer.iter().map(|constant| constant.name.as_str()))
        .collect();
    match graph.output.iter().find(|output| !made.contains(output.name.as_str())) {
        Some(output) => Err(format!("nothing in the graph makes its output `{}`", output.name)),
        None => Ok(()),
    }
}

/// Graph inputs that are no constants, and graph outputs.
pub(crate) fn signature(graph: &pb::GraphProto) -> Result<Signature, String> {
    let constants: HashSet<&str> = graph.initializer.iter().map(|constant| constant.name.as_str()).collect();
    Ok(Signature {
        inputs: graph
            .input
            .iter()
            .filter(|input| !constants.contains(input.name.as_str()))
            .map(|input| spec(input, "input"))
            .collect::<Result<_, _>>()?,
        outputs: graph.output.iter().map(|output| spec(output, "output")).collect::<Result<_, _>>()?,
    })
}

fn spec(value: &pb::ValueInfoProto, side: &str) -> Result<TensorSpec, String> {
    use pb::tensor_shape_proto::dimension::Value::DimValue;

    let name = &value.name;
    let Some(pb::type_proto::Value::TensorType(tensor)) = value.r#type.as_ref().and_then(|declared| declared.value.as_ref())
    else {
        return Err(format!("the {side} `{name}` is not a tensor (for scikit-learn, export with zipmap off)"));
    };
    let element = pb::tensor_proto::DataType::try_from(tensor.elem_type).ok();
    let data_type = element.and_then(data_type).ok_or_else(|| {
        let element = element.map_or("unknown", |element| element.as_str_name());
        format!("the {side} `{name}` has the element type {element}, which is not supported")
    })?;
    let shape = tensor.shape.as_ref().map_or_else(Vec::new, |shape| {
        shape
            .dim
            .iter()
            .map(|dim| match &dim.value {
                Some(DimValue(extent)) => usize::try_from(*extent).map_or(Dim::Any, Dim::Fixed),
                _ => Dim::Any,
            })
            .collect()
    });
    Ok(TensorSpec { name: name.clone(), data_type, shape })
}

fn data_type(element: pb::tensor_proto::DataType) -> Option<DataType> {
    use pb::tensor_proto::DataType as Onnx;

    match element {
        Onnx::Float => Some(DataType::Fp32),
        Onnx::Double => Some(DataType::Fp64),
        Onnx::Int8 => Some(DataType::Int8),
        Onnx::Int16 => Some(DataType::Int16),
        Onnx::Int32 => Some(DataType::Int32),
        Onnx::Int64 => Some(DataType::Int64),
        Onnx::Uint8 => Some(DataType::Uint8),
        Onnx::Uint16 => Some(DataType::Uint16),
        Onnx::Uint32 => Some(DataType::Uint32),
        Onnx::Uint64 => Some(DataType::Uint64),
        Onnx::Bool => Some(DataType::Bool),
        Onnx::String => Some(DataType::Bytes),
        _ => None,
    }
}
