"""Are our exercise results those of plain Python over the raw file?

Run by the example tests and by hand:

    python equality_exercise.py results.csv

Cuts the windows itself out of exercises.parquet (per device, 100 rows every 50, full windows only, in the
order of the file), runs onnxruntime on them, and compares with results.csv, whose columns are `device`,
`ts` (of the window's last row; ISO 8601 in UTC, or milliseconds since 1970), `exercise` (the label) and
`p` (its score); further columns are ignored. Exit 0: every window is there once, labels equal, scores
within the tolerance. Exit 1: not so, and the first differences are printed. Nothing of Afferent is used here.
"""

import argparse
import csv
import math
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "exercise-watch"
AXES = ["ax", "ay", "az", "wx", "wy", "wz"]
ROWS, STEP = 100, 50
TOLERANCE = 1e-5
SHOWN = 10

Window = tuple[str, int]  # device, last timestamp in milliseconds
Verdict = tuple[str, float]  # label, score


def expected(data: Path, model: Path, labels: Path) -> dict[Window, Verdict]:
    """What onnxruntime says of every full window of the file."""
    table = pq.read_table(data)
    device = np.array(table["device"].to_pylist())
    ts = table["ts"].cast("int64").to_numpy()
    axes = np.stack([table[axis].to_numpy() for axis in AXES], axis=1)
    names = labels.read_text().split()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    verdicts = {}
    for name in np.unique(device):
        rows = np.flatnonzero(device == name)
        for start in range(0, len(rows) - ROWS + 1, STEP):
            window = rows[start : start + ROWS]
            (probabilities,) = session.run(["probabilities"], {"window": axes[window][np.newaxis]})
            best = int(probabilities[0].argmax())
            verdicts[str(name), int(ts[window[-1]])] = (names[best], float(probabilities[0, best]))
    return verdicts


def results(path: Path) -> list[tuple[Window, Verdict]]:
    """The rows of the CSV, in its order."""
    with open(path, newline="") as file:
        lines = csv.DictReader(file)
        missing = {"device", "ts", "exercise", "p"} - set(lines.fieldnames or [])
        if missing:
            sys.exit(f"{path}: no column {', '.join(sorted(missing))}; columns are {lines.fieldnames}")
        return [((line["device"], milliseconds(line["ts"])), (line["exercise"], float(line["p"]))) for line in lines]


def milliseconds(text: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time (UTC where it names no zone) or of a plain number."""
    if text.lstrip("-").isdigit():
        return int(text)
    time = datetime.fromisoformat(text)
    return round((time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp() * 1000)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("results", type=Path, help="CSV with device, ts, exercise, p")
    arguments.add_argument("--data", type=Path, default=EXAMPLE / "data" / "exercises.parquet")
    arguments.add_argument("--model", type=Path, default=EXAMPLE / "models" / "exercise" / "1" / "model.onnx")
    arguments.add_argument("--labels", type=Path, default=EXAMPLE / "models" / "exercise" / "labels.txt")
    arguments.add_argument(
        "--prefix",
        action="store_true",
        help="the run was stopped early: of each device only the first windows need be there, without a gap",
    )
    options = arguments.parse_args()

    wanted = expected(options.data, options.model, options.labels)
    rows = results(options.results)
    differences = []
    largest = 0.0
    for window, (label, score) in rows:
        if window not in wanted:
            differences.append(f"{window}: not a window of the file")
            continue
        label_wanted, score_wanted = wanted[window]
        difference = abs(score - score_wanted)
        if label != label_wanted:
            differences.append(f"{window}: label {label}, onnxruntime says {label_wanted}")
        if not difference <= TOLERANCE:
            differences.append(f"{window}: score {score}, onnxruntime says {score_wanted}")
        largest = max(largest, difference) if not math.isnan(difference) else math.nan
    seen = Counter(window for window, _ in rows)
    differences += [f"{window}: {count} times" for window, count in seen.items() if count > 1]
    newest: dict[str, int] = {}
    for device, ts in seen:
        newest[device] = max(ts, newest.get(device, ts))
    for device, ts in wanted:
        due = not options.prefix or ts <= newest.get(device, -1)
        if due and (device, ts) not in seen:
            differences.append(f"{(device, ts)}: missing")
    differences += [f"{device}: no results at all" for device in sorted({d for d, _ in wanted} - set(newest))]

    verdict = "different" if differences else "equal"
    print(
        f"{verdict}: {len(rows)} results, {len(wanted)} windows in the file, {len(newest)} devices, "
        f"largest score difference {largest:.2e}, {len(differences)} differences"
    )
    for difference in differences[:SHOWN]:
        print(f"  {difference}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
