"""Are our shuttle results those of plain Python over the raw file?

Run by the example tests and by hand:

    python equality_shuttle.py results.csv

Runs onnxruntime over every reading of shuttle.parquet and compares with results.csv, whose columns are
`reading` and `score`; further columns are ignored. Exit 0: every reading is there once, scores are within
the tolerance, and as many are above the threshold of the model's metrics.json. With `--anomalies` the CSV
holds the readings above the threshold only. Exit 1: not so, and the first differences are printed. Nothing
of Afferent is used here.
"""

import argparse
import csv
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shuttle-anomaly"
SENSORS = [f"s{i}" for i in range(1, 10)]
TOLERANCE = 1e-5
SHOWN = 10


def expected(data: Path, model: Path) -> dict[int, float]:
    """The score that onnxruntime gives every reading of the file."""
    table = pq.read_table(data)
    readings = np.stack([table[sensor].to_numpy() for sensor in SENSORS], axis=1)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (score,) = session.run(["score"], {"readings": readings})
    return dict(zip(table["reading"].to_pylist(), score.tolist(), strict=True))


def results(path: Path) -> list[tuple[int, float]]:
    """The rows of the CSV, in its order."""
    with open(path, newline="") as file:
        lines = csv.DictReader(file)
        missing = {"reading", "score"} - set(lines.fieldnames or [])
        if missing:
            sys.exit(f"{path}: no column {', '.join(sorted(missing))}; columns are {lines.fieldnames}")
        return [(int(line["reading"]), float(line["score"])) for line in lines]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("results", type=Path, help="CSV with reading, score")
    arguments.add_argument("--data", type=Path, default=EXAMPLE / "data" / "shuttle.parquet")
    arguments.add_argument("--model", type=Path, default=EXAMPLE / "models" / "shuttle" / "1" / "model.onnx")
    arguments.add_argument("--threshold", type=float, help="default: that of metrics.json beside the model")
    arguments.add_argument("--anomalies", action="store_true", help="the CSV holds anomalies only")
    options = arguments.parse_args()
    threshold = options.threshold
    if threshold is None:
        threshold = json.loads((options.model.parents[1] / "metrics.json").read_text())["threshold"]

    wanted = expected(options.data, options.model)
    above_wanted = sum(score > threshold for score in wanted.values())
    if options.anomalies:
        due = {reading: score for reading, score in wanted.items() if score > threshold}
    else:
        due = wanted
    rows = results(options.results)
    differences = []
    largest = 0.0
    for reading, score in rows:
        if reading not in due:
            what = "not an anomaly" if reading in wanted else "not a reading of the file"
            differences.append(f"reading {reading}: {what}")
            continue
        difference = abs(score - due[reading])
        if not difference <= TOLERANCE:
            differences.append(f"reading {reading}: score {score}, onnxruntime says {due[reading]}")
        largest = max(largest, difference) if not math.isnan(difference) else math.nan
    seen = Counter(reading for reading, _ in rows)
    differences += [f"reading {reading}: {count} times" for reading, count in seen.items() if count > 1]
    differences += [f"reading {reading}: missing" for reading in due if reading not in seen]
    above = sum(score > threshold for _, score in rows)
    if above != above_wanted:
        differences.insert(0, f"{above} above the threshold, onnxruntime says {above_wanted}")

    verdict = "different" if differences else "equal"
    print(
        f"{verdict}: {len(rows)} results, {len(wanted)} readings in the file, {above} above {threshold} "
        f"(onnxruntime: {above_wanted}), largest score difference {largest:.2e}, {len(differences)} differences"
    )
    for difference in differences[:SHOWN]:
        print(f"  {difference}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
