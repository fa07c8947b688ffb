"""Small tables with user ids in a run folder, as Parquet files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import replacing
from milp_ray.errors import MilpError

if TYPE_CHECKING:
    import pyarrow as pa


def as_table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pa.Table:
    """Rows as an Arrow table; ``columns`` are names with Arrow's aliases of types."""
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=_schema(columns))


def write_table(path: Path, rows: list[dict[str, Any]], columns: Mapping[str, str]) -> None:
    """Write rows: a reader sees the old file or the new one."""
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(as_table(rows, columns), temporary, compression="zstd")


def read_table(path: Path, columns: Mapping[str, str]) -> pa.Table:
    """Read what :func:`write_table` wrote.

    Raises:
        MilpError: the file is damaged or holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # One file, not a data set: a folder name like "a=b" above it must not become a column.
        return pq.ParquetFile(path).read().select(list(columns)).cast(_schema(columns))
    except (pa.ArrowException, KeyError) as error:
        raise MilpError(f"{path} is damaged; remove it and make it again") from error


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
