"""Trains the autoencoder that scores how unusual one reading of nine shuttle sensors is.

Run by hand (`python shuttle_anomaly.py`); writes examples/shuttle-anomaly/models/shuttle. It learns to
reproduce normal readings of the first half of the file; the score is the mean squared error of the
reproduction, in normalised units. The threshold is the 99th percentile of that error over the same
normal readings: labels of anomalies are used for the figures only, never for a choice.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from onnx import helper

import data
import onnx_graph

SEED = 7
EPOCHS = 30
BATCH = 256
LEARNING_RATE = 3e-3
WIDTHS = [9, 16, 4, 16, 9]
# Rare spikes reach 170 standard deviations. Cut at 5, one wild sensor cannot outweigh the
# other eight, and scores stay small enough for float32 to agree to 1e-5 between runtimes.
CLIP = 5.0
LAYERS = range(len(WIDTHS) - 1)


def initial_weights(key: jax.Array) -> dict[str, jax.Array]:
    """He-normal dense layers, zero biases."""
    weights = {}
    for layer in LAYERS:
        key, drawn = jax.random.split(key)
        into, out = WIDTHS[layer], WIDTHS[layer + 1]
        weights[f"dense{layer}.w"] = jax.random.normal(drawn, (into, out)) * np.sqrt(2 / into)
        weights[f"dense{layer}.b"] = jnp.zeros(out)
    return weights


def scores(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Mean squared reconstruction error [N] of normalised, clipped readings [N, 9]."""
    h = x
    for layer in LAYERS:
        h = h @ weights[f"dense{layer}.w"] + weights[f"dense{layer}.b"]
        if layer != LAYERS[-1]:
            h = jax.nn.relu(h)
    return ((h - x) ** 2).mean(axis=1)


def train(x: np.ndarray) -> dict[str, np.ndarray]:
    """Adam with a cosine learning rate over normalised, clipped, normal readings."""
    steps = EPOCHS * (len(x) // BATCH)

    @jax.jit
    def update(weights, first, second, step, x):
        gradient = jax.grad(lambda w: scores(w, x).mean())(weights)
        rate = LEARNING_RATE * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)

        def moved(w, m, v):
            m, v = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            return w - rate * m / (jnp.sqrt(v) + 1e-8)

        return jax.tree.map(moved, weights, first, second), first, second

    weights = initial_weights(jax.random.key(SEED))
    first = jax.tree.map(jnp.zeros_like, weights)
    second = jax.tree.map(jnp.zeros_like, weights)
    order = np.random.default_rng(SEED)
    step = 0
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(x))
        for at in range(0, len(x) - BATCH + 1, BATCH):
            weights, first, second = update(weights, first, second, step, x[shuffled[at : at + BATCH]])
            step += 1
    return {name: np.asarray(value) for name, value in weights.items()}


def export(weights: dict[str, np.ndarray], mean: np.ndarray, std: np.ndarray):
    """The ONNX file: raw readings in, scores out."""
    nodes = [
        helper.make_node("Sub", ["readings", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "clip.low", "clip.high"], ["normalised"]),
    ]
    value = "normalised"
    for layer in LAYERS:
        nodes.append(
            helper.make_node("Gemm", [value, f"dense{layer}.w", f"dense{layer}.b"], [f"dense{layer}"])
        )
        value = f"dense{layer}"
        if layer != LAYERS[-1]:
            nodes.append(helper.make_node("Relu", [value], [f"{value}.relu"]))
            value = f"{value}.relu"
    nodes += [
        helper.make_node("Sub", [value, "normalised"], ["error"]),
        helper.make_node("Mul", ["error", "error"], ["squared"]),
        helper.make_node("ReduceMean", ["squared"], ["score"], axes=[1], keepdims=0),
    ]
    clip = {"clip.low": np.float32(-CLIP), "clip.high": np.float32(CLIP)}
    return onnx_graph.write(
        onnx_graph.model_directory("shuttle-anomaly", "shuttle"),
        nodes=nodes,
        weights={"mean": mean, "std": std, **{name: np.array(v) for name, v in clip.items()}, **weights},
        inputs={"readings": ["N", WIDTHS[0]]},
        outputs={"score": ["N"]},
        doc="Reconstruction error of one reading of nine shuttle sensors; high is unusual.",
    )


def area_under_roc(score: np.ndarray, anomaly: np.ndarray) -> float:
    """Probability that an anomaly scores above a normal reading, ties counted half."""
    distinct, group, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[group]
    positive = anomaly.sum()
    return float((rank[anomaly].sum() - positive * (positive + 1) / 2) / (positive * (~anomaly).sum()))


def threshold_beside(score: np.ndarray, percentile: float) -> float:
    """The percentile of `score`, moved into the middle of the nearest gap between two scores.

    Sensor values are whole numbers, so many readings score exactly alike; a threshold that lies on such
    a score would be decided by the last bit of a float.
    """
    at = np.percentile(score, percentile)
    distinct = np.unique(score)
    above = np.searchsorted(distinct, at, side="right")
    return round(float((distinct[above - 1] + distinct[above]) / 2), 6)


def main() -> int:
    values, anomaly = data.shuttle()
    train_values, test_values = data.shuttle_halves(values)
    train_anomaly, test_anomaly = data.shuttle_halves(anomaly)
    normal = train_values[~train_anomaly]
    mean = normal.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = normal.std(axis=0, dtype=np.float64).astype(np.float32)

    def normalised(x: np.ndarray) -> np.ndarray:
        return np.clip((x - mean) / std, -CLIP, CLIP)

    weights = train(normalised(normal))
    path = export(weights, mean, std)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def in_onnx(x: np.ndarray) -> np.ndarray:
        return session.run(["score"], {"readings": x})[0]

    threshold = threshold_beside(in_onnx(normal), 99)
    score = in_onnx(test_values)
    flagged = score > threshold
    hits = int((flagged & test_anomaly).sum())
    precision, recall = hits / int(flagged.sum()), hits / int(test_anomaly.sum())
    onnx_graph.write_metrics(
        path.parents[1],
        {
            "model": "shuttle",
            "threshold": threshold,
            "parameters": int(sum(w.size for w in weights.values())),
            "train_normal_rows": len(normal),
            "test_rows": len(test_values),
            "test_anomalies": int(test_anomaly.sum()),
            "test_flagged": int(flagged.sum()),
            "test_auc": round(area_under_roc(score, test_anomaly), 4),
            "test_precision": round(precision, 4),
            "test_recall": round(recall, 4),
            "test_f1": round(2 * precision * recall / (precision + recall), 4),
            "test_highest_score": round(float(score.max()), 4),
            "test_nearest_to_threshold": float(np.abs(score - threshold).min()),
            "largest_difference_jax_onnxruntime": float(
                np.abs(np.asarray(scores(weights, normalised(test_values))) - score).max()
            ),
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
