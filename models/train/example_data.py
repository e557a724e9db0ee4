"""Makes the small data files of the examples out of the installed packages.

Run by hand (`python example_data.py`); writes examples/*/data/*.parquet. Only rows that no model was
trained on: the three unseen subjects, and the second half of the shuttle readings. Values are those
of the packages, as float32, untouched.
"""

from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import data
import onnx_graph

START = datetime(2026, 1, 1)
PERIOD_MS = 1000 // data.RATE_HZ


def exercises() -> pa.Table:
    """One watch per unseen subject; the recordings of a subject follow each other without a gap.

    All watches start together. Rows are sorted by time, then device, so that a paced replay of the file
    is three devices that send at once.
    """
    recordings, labels = data.watch()
    start = np.datetime64(START, "ms")
    watches = []
    for subject in data.UNSEEN_SUBJECTS:
        own = [recording for recording in recordings if recording.subject == subject]
        rows = np.concatenate([recording.rows for recording in own])
        lengths = [len(recording.rows) for recording in own]
        columns = {
            "ts": pa.array(start + np.arange(len(rows)) * np.timedelta64(PERIOD_MS, "ms"), pa.timestamp("ms")),
            "device": pa.array([f"watch-{subject:02}"] * len(rows), pa.string()),
            "recording": pa.array(np.repeat([recording.number for recording in own], lengths), pa.int32()),
            **{axis: pa.array(rows[:, i], pa.float32()) for i, axis in enumerate(data.AXES)},
            "exercise": pa.array(np.repeat([labels[recording.exercise] for recording in own], lengths), pa.string()),
        }
        watches.append(pa.table(columns))
    return pa.concat_tables(watches).sort_by([("ts", "ascending"), ("device", "ascending")])


def shuttle() -> pa.Table:
    """The second half of the file, numbered from 0."""
    values, anomaly = (data.shuttle_halves(part)[1] for part in data.shuttle())
    return pa.table(
        {
            "reading": pa.array(np.arange(len(values)), pa.int64()),
            **{f"s{i + 1}": pa.array(values[:, i], pa.float32()) for i in range(values.shape[1])},
            "anomaly": pa.array(anomaly, pa.bool_()),
        }
    )


def main() -> None:
    for example, name, table in (
        ("exercise-watch", "exercises", exercises()),
        ("shuttle-anomaly", "shuttle", shuttle()),
    ):
        path = onnx_graph.REPOSITORY / "examples" / example / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=16_384)
        print(f"{path.relative_to(onnx_graph.REPOSITORY)}: {table.num_rows} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
