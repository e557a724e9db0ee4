"""The two public data sets, read out of installed packages.

Used by the training scripts and by `example_data.py`. The packages are located but never imported, so
they may be installed without their own dependencies. Every function returns the rows in the order of
the package's file, so that a row number means the same everywhere.
"""

import csv
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

AXES = ["ax", "ay", "az", "wx", "wy", "wz"]
RATE_HZ = 50
WINDOW_ROWS = 100
WINDOW_STEP = 50

# Split by person: what counts is how the model does on somebody it has never seen.
UNSEEN_SUBJECTS = (8, 9, 10)


@dataclass(frozen=True)
class Recording:
    """One person doing one exercise: `rows` is float32 [n, 6] at 50 Hz, columns as in AXES."""

    number: int  # position in the package's file, 0..139
    subject: int  # 1..10
    exercise: int  # index into the labels
    rows: np.ndarray


def watch() -> tuple[list[Recording], list[str]]:
    """All 140 smartwatch recordings of seglearn, and the seven exercise labels in class order."""
    # A pickle of the installed package, as trusted as its code.
    raw = np.load(_in_package("seglearn", "data/watch_dataset.npy"), allow_pickle=True).item()
    if list(raw["X_labels"]) != AXES:
        raise ValueError(f"axes of watch_dataset are {raw['X_labels']}, expected {AXES}")
    recordings = [
        Recording(number, int(subject), int(exercise), rows.astype(np.float32))
        for number, (subject, exercise, rows) in enumerate(zip(raw["subject"], raw["y"], raw["X"], strict=True))
    ]
    return recordings, list(raw["y_labels"])


def windows(rows: np.ndarray) -> np.ndarray:
    """Full windows of `rows` [n, 6], every WINDOW_STEP rows: [w, 100, 6]."""
    starts = range(0, len(rows) - WINDOW_ROWS + 1, WINDOW_STEP)
    return np.stack([rows[start : start + WINDOW_ROWS] for start in starts])


def labelled_windows(recordings: list[Recording]) -> tuple[np.ndarray, np.ndarray]:
    """Windows [w, 100, 6] and classes [w]; no window spans two recordings."""
    cut = [windows(recording.rows) for recording in recordings]
    classes = [np.full(len(w), r.exercise) for w, r in zip(cut, recordings, strict=True)]
    return np.concatenate(cut), np.concatenate(classes)


def shuttle() -> tuple[np.ndarray, np.ndarray]:
    """All 49,097 shuttle readings of river: float32 [n, 9], and whether each is an anomaly, bool [n]."""
    with gzip.open(_in_package("river", "datasets/shuttle.csv.gz"), "rt", newline="") as file:
        lines = csv.reader(file)
        header = next(lines)
        if header != [f"f{i}" for i in range(1, 10)] + ["anomaly"]:
            raise ValueError(f"unexpected header of shuttle.csv.gz: {header}")
        table = np.array([[int(value) for value in line] for line in lines])
    return table[:, :9].astype(np.float32), table[:, 9] == 1


def shuttle_halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First half (training) and second half (test and example data) of the file's rows."""
    middle = len(values) // 2
    return values[:middle], values[middle:]


def _in_package(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package '{package}' is not installed; run: pip install --no-deps -r requirements-data.txt"
        )
    return Path(spec.submodule_search_locations[0]) / path
