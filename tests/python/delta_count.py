"""Prints the number of rows of a Delta table, as the `deltalake` package reads it. Usage: delta_count.py FOLDER"""

import sys

from deltalake import DeltaTable, QueryBuilder

table = DeltaTable(sys.argv[1])
print(QueryBuilder().register("t", table).execute("select count(*) as n from t").read_all()["n"][0].as_py())
