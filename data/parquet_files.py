"""Records as parquet files that `data=parquet` and `data=labelled` read back."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.data.cleaning import to_row

ROWS = 5_000
"""Records in memory as rows at a time."""


def write_parquet(path: Path, records: Sequence[Any]) -> Path:
    """Write records of one kind, whole or not at all; `meta` as JSON text, since its keys are anyone's."""
    import pyarrow as pa  # here: it takes half a second, and most runs write no parquet
    import pyarrow.parquet as pq

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    names = [name for name in records[0].__dataclass_fields__ if name != "meta"]
    flags = {"chosen_safe", "rejected_safe", "safe", "refusal"}
    types = {"prompt": pa.list_(turn), **dict.fromkeys(flags, pa.bool_())}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names] + [("meta", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with pq.ParquetWriter(aside, schema) as writer:
            for start in range(0, len(records), ROWS):
                rows = []
                for record in records[start : start + ROWS]:
                    row = to_row(record)
                    meta = row.pop("meta", None)
                    rows.append({**row, "meta": json.dumps(meta, ensure_ascii=False) if meta else None})
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path
