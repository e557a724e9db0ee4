"""Trains the model that names a shoulder exercise from two seconds of smartwatch motion.

Run by hand (`python exercise_watch.py`); writes examples/exercise-watch/models/exercise. A small 1D
convolutional network: normalise, three convolutions, mean over time, one dense layer. Seven subjects
train, three others test; the test subjects are looked at once, after the last epoch, and no choice
depends on them. `--validate` instead holds two of the seven back and writes nothing: choices of
architecture and epochs are made there.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from onnx import helper

import data
import onnx_graph

SEED = 7
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-3
DROPOUT = 0.3
# (name, input channels, output channels, kernel, stride); padding keeps the length before striding.
CONVOLUTIONS = [("conv1", 6, 24, 7, 1), ("conv2", 24, 32, 5, 2), ("conv3", 32, 40, 3, 2)]
VALIDATION_SUBJECTS = (6, 7)
REQUIRED_ACCURACY = 0.80


def initial_weights(key: jax.Array, classes: int) -> dict[str, jax.Array]:
    """He-normal convolutions, a small dense layer, zero biases."""
    weights = {}
    for name, into, out, kernel, _ in CONVOLUTIONS:
        key, drawn = jax.random.split(key)
        weights[f"{name}.w"] = jax.random.normal(drawn, (out, into, kernel)) * np.sqrt(2 / (into * kernel))
        weights[f"{name}.b"] = jnp.zeros(out)
    width = CONVOLUTIONS[-1][2]
    weights["dense.w"] = jax.random.normal(key, (width, classes)) * np.sqrt(1 / width)
    weights["dense.b"] = jnp.zeros(classes)
    return weights


def logits(weights: dict[str, jax.Array], x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Class logits [N, 7] of normalised windows [N, 100, 6]; dropout only where a key is given."""
    h = jnp.transpose(x, (0, 2, 1))
    for name, _, _, kernel, stride in CONVOLUTIONS:
        padding = [(kernel // 2, kernel // 2)]
        h = jax.lax.conv_general_dilated(h, weights[f"{name}.w"], (stride,), padding)
        h = jax.nn.relu(h + weights[f"{name}.b"][:, None])
    h = h.mean(axis=2)
    if dropout_key is not None:
        h = h * jax.random.bernoulli(dropout_key, 1 - DROPOUT, h.shape) / (1 - DROPOUT)
    return h @ weights["dense.w"] + weights["dense.b"]


def train(x: np.ndarray, y: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """AdamW with a cosine learning rate over normalised windows `x`."""
    steps = EPOCHS * (len(x) // BATCH)

    def loss(weights, x, y, key):
        log_p = jax.nn.log_softmax(logits(weights, x, key))
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    @jax.jit
    def update(weights, first, second, step, x, y, key):
        gradient = jax.grad(loss)(weights, x, y, key)
        rate = LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)

        def moved(w, m, v):
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            return w - rate * (m / (jnp.sqrt(v) + 1e-8) + WEIGHT_DECAY * w)

        return jax.tree.map(moved, weights, first, second), first, second

    key = jax.random.key(SEED)
    key, drawn = jax.random.split(key)
    weights = initial_weights(drawn, classes)
    first = jax.tree.map(jnp.zeros_like, weights)
    second = jax.tree.map(jnp.zeros_like, weights)
    order = np.random.default_rng(SEED)
    step = 0
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(x))
        for at in range(0, len(x) - BATCH + 1, BATCH):
            rows = shuffled[at : at + BATCH]
            key, drawn = jax.random.split(key)
            weights, first, second = update(weights, first, second, step, x[rows], y[rows], drawn)
            step += 1
    return {name: np.asarray(value) for name, value in weights.items()}


def export(weights: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray):
    """The ONNX file: raw windows in, probabilities out."""
    nodes = [
        helper.make_node("Sub", ["window", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised"]),
        helper.make_node("Transpose", ["normalised"], ["by_axis"], perm=[0, 2, 1]),
    ]
    value = "by_axis"
    for name, _, _, kernel, stride in CONVOLUTIONS:
        nodes.append(
            helper.make_node(
                "Conv",
                [value, f"{name}.w", f"{name}.b"],
                [name],
                kernel_shape=[kernel],
                strides=[stride],
                pads=[kernel // 2, kernel // 2],
            )
        )
        nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
        value = f"{name}.relu"
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "dense.w", "dense.b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    return onnx_graph.write(
        onnx_graph.model_directory("exercise-watch", "exercise"),
        nodes=nodes,
        weights={"mean": mean, "std": std, **weights},
        inputs={"window": ["N", data.WINDOW_ROWS, len(data.AXES)]},
        outputs={"probabilities": ["N", weights["dense.b"].size]},
        doc="Shoulder exercise from 2 s of smartwatch motion (ax ay az wx wy wz at 50 Hz).",
    )


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--validate", action="store_true", help="train on 5 subjects, test on 2, write nothing")
    validate = arguments.parse_args().validate

    recordings, labels = data.watch()
    held_out = VALIDATION_SUBJECTS if validate else data.UNSEEN_SUBJECTS
    never = set(data.UNSEEN_SUBJECTS) | set(held_out)
    x, y = data.labelled_windows([r for r in recordings if r.subject not in never])
    test_x, test_y = data.labelled_windows([r for r in recordings if r.subject in held_out])
    mean = x.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    std = x.std(axis=(0, 1), dtype=np.float64).astype(np.float32)
    weights = train((x - mean) / std, y, len(labels))

    def in_jax(x: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.softmax(logits(weights, (x - mean) / std)))

    if validate:
        seen, unseen = ((in_jax(x).argmax(1) == y).mean() for x, y in ((x, y), (test_x, test_y)))
        print(f"train {seen:.4f}, unseen {unseen:.4f}")
        return 0

    path = export(weights, mean, std)
    (path.parents[1] / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def in_onnx(x: np.ndarray) -> np.ndarray:
        return session.run(["probabilities"], {"window": x})[0]

    predicted = in_onnx(test_x).argmax(1)
    accuracy = (predicted == test_y).mean()
    onnx_graph.write_metrics(
        path.parents[1],
        {
            "model": "exercise",
            "labels": labels,
            "parameters": int(sum(w.size for w in weights.values())),
            "train_subjects": sorted({r.subject for r in recordings} - never),
            "unseen_subjects": list(data.UNSEEN_SUBJECTS),
            "train_windows": len(x),
            "unseen_windows": len(test_x),
            "train_accuracy": round(float((in_onnx(x).argmax(1) == y).mean()), 4),
            "unseen_accuracy": round(float(accuracy), 4),
            "unseen_recall": {
                label: round(float((predicted[test_y == i] == i).mean()), 3) for i, label in enumerate(labels)
            },
            "largest_difference_jax_onnxruntime": float(np.abs(in_jax(test_x) - in_onnx(test_x)).max()),
        },
    )
    if accuracy < REQUIRED_ACCURACY:
        print(f"accuracy on unseen subjects {accuracy:.4f} is below {REQUIRED_ACCURACY}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
