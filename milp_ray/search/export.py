"""The trials of a study as a table for other programs: CSV, Parquet or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milp_ray.atomic_files import replacing, write_text
from milp_ray.errors import MilpError
from milp_ray.search.insight import Study
from milp_ray.search.results import COLUMNS, trial_rows
from milp_ray.search.timeline import trial_lives, utc_text

# Beside the columns of the study's own table; times are UTC, as the journal writes them.
_TIMES = {"suggested": "string", "started": "string", "rung": "int64", "epoch": "int64"}
EXPORT_COLUMNS: dict[str, str] = {**COLUMNS, **_TIMES}
FORMATS = (".csv", ".parquet", ".json")


def export_rows(study: Study) -> list[dict[str, Any]]:
    """One row a trial in the order of the index: :func:`milp_ray.search.results.trial_rows`, and its times.

    ``status`` is completed, stopped, failed, running or waiting; ``started`` is the last start, ``rung`` and
    ``epoch`` the last that a trial reached. What a trial does not have is ``None``.
    """
    rows = []
    for row, life in zip(trial_rows(study.result), trial_lives(study.events), strict=True):
        times = {"suggested": utc_text(life.suggested), "started": utc_text(life.started)}
        known = {"status": life.status, "seconds": life.seconds, "ended": utc_text(life.ended)}
        found = {**row, **known, **times, "rung": life.rung, "epoch": life.epoch}
        rows.append({name: found[name] for name in EXPORT_COLUMNS})
    return rows


def check_format(path: Path) -> None:
    """Refuse a file name that says nothing of a format.

    Raises:
        MilpError: the name ends in something else.
    """
    if path.suffix not in FORMATS:
        raise MilpError(f"--to {path}: give a name that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def write_export(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows in the format that the name of ``path`` ends in, whole or not at all.

    CSV has an empty field, JSON (a list of objects) ``null`` where a trial has no value.

    Raises:
        MilpError: as :func:`check_format`, or the file cannot be written there.
    """
    check_format(path)
    try:
        if path.suffix == ".parquet":
            _write_parquet(rows, path)
        else:
            write_text(path, _csv(rows) if path.suffix == ".csv" else _json(rows))
    except OSError as error:
        raise MilpError(f"--to {path}: it cannot be written ({error.strerror or error})") from None


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(EXPORT_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps(list(rows), indent=1, allow_nan=False) + "\n"


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in EXPORT_COLUMNS.items()])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)
