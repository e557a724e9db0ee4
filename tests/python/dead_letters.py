"""Are the dead letters exactly the malformed messages, byte by byte? Read with the `deltalake` package.

Usage: dead_letters.py DATA_DIR FOLDER

FOLDER holds one file for each payload that must be in the table `dead_letters` of DATA_DIR, once for each
file; nothing else may be there. Exit 1 with the first differences otherwise.
"""

import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pyarrow
from deltalake import DeltaTable, QueryBuilder


def name(payload: bytes) -> str:
    return f"{len(payload)} bytes, sha256 {sha256(payload).hexdigest()[:16]}"


def main() -> int:
    data_dir, folder = Path(sys.argv[1]), Path(sys.argv[2])
    table = DeltaTable(data_dir / "tables" / "dead_letters")
    read = QueryBuilder().register("dead_letters", table).execute("select bytes, reason from dead_letters")
    rows = pyarrow.table(read).to_pylist()
    found = Counter(name(row["bytes"]) if row["bytes"] is not None else "no bytes" for row in rows)
    due = Counter(name(path.read_bytes()) for path in folder.iterdir())
    for payload, count in (due - found).items():
        print(f"missing {count} times: {payload}")
    for payload, count in (found - due).items():
        print(f"too many, {count} times: {payload}")
    print(f"{len(rows)} dead letters, {due.total()} malformed messages")
    return 0 if found == due else 1


if __name__ == "__main__":
    sys.exit(main())
