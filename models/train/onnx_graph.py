"""ONNX files written by hand from numpy weights.

Used by the training scripts. Opset 13 and IR version 7, the batch dimension is the symbol `N`, no
value_info, and weights are initializers only: any ONNX Runtime of the last years and tract load them.
The bytes depend on nothing but the weights, so that the same training gives the same file.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper

REPOSITORY = Path(__file__).resolve().parents[2]


def model_directory(example: str, model: str) -> Path:
    """Where the example keeps the model (Triton layout)."""
    return REPOSITORY / "examples" / example / "models" / model


def write(
    directory: Path,
    *,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, list],
    outputs: dict[str, list],
    doc: str,
) -> Path:
    """Write `directory`/1/model.onnx; `inputs` and `outputs` map names to shapes of float32 tensors."""

    def declare(tensors: dict[str, list]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in tensors.items()]

    initializers = [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items()]
    graph = helper.make_graph(
        nodes, directory.name, declare(inputs), declare(outputs), initializer=initializers, doc_string=doc
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=7,
        producer_name="afferent/models/train",
    )
    checker.check_model(model, full_check=True)
    path = directory / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def write_metrics(directory: Path, metrics: dict) -> None:
    """Write what was measured beside the model, and print it."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in metrics.items())
    text = f"{{\n{lines}\n}}\n"
    (directory / "metrics.json").write_text(text)
    print(text, end="")
