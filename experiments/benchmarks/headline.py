"""The search's headline figures, which several benchmarks measure and each of them prints.

Every whole run of a benchmark keeps what it measured under runs/benchmarks; what it does not measure itself
is taken from the last whole run of the one that does, and is ``None`` where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("runs/benchmarks")
# The figure -> the benchmark that measures it.
SOURCES = {
    "speedup_vs_ax_quality_n100": "suggest",
    "hypervolume_ratio_vs_ax": "search",
    "hypervolume_ratio_vs_optuna_best": "search",
    "time_to_95pct_hypervolume_ratio_vs_best_peer": "search",
    "controller_max_block_seconds": "endurance",
}


def with_headline(benchmark: str, figures: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """``figures`` of one benchmark, completed with the others' headline figures.

    Args:
        keep: of a whole run: its figures are kept for the other benchmarks.
    """
    if keep:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{benchmark}.json").write_text(json.dumps(figures), encoding="utf-8")
    others = {name: _kept(source).get(name) for name, source in SOURCES.items() if source != benchmark}
    return {**figures, **others}


def _kept(benchmark: str) -> dict[str, Any]:
    path = FOLDER / f"{benchmark}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
