"""Headline figures, of the search and of training, which several benchmarks measure and each of them prints.

Every whole run of a benchmark keeps what it measured under runs/benchmarks; what it does not measure itself
is taken from the last whole run of the one that does, and is ``None`` where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("runs/benchmarks")
# Figures that belong together, each -> the benchmark that measures it.
SOURCES = (
    {
        "speedup_vs_ax_quality_n100": "suggest",
        "hypervolume_ratio_vs_ax": "search",
        "hypervolume_ratio_vs_optuna_best": "search",
        "time_to_95pct_hypervolume_ratio_vs_best_peer": "search",
        "controller_max_block_seconds": "endurance",
    },
    {
        "train_speedup_vs_trainer": "training",
        "train_speedup_vs_loop": "training",
        "max_weight_difference": "training",
        "padding_share": "training",
        "flop_share": "training",
        "generate_speedup_vs_peft": "generation",
    },
)


def with_headline(benchmark: str, figures: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """``figures`` of one benchmark, completed with the headline figures that belong with them.

    Args:
        keep: of a whole run: its figures are kept for the other benchmarks.
    """
    if keep:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{benchmark}.json").write_text(json.dumps(figures), encoding="utf-8")
    [group] = [sources for sources in SOURCES if benchmark in sources.values()]
    others = {name: _kept(source).get(name) for name, source in group.items() if source != benchmark}
    return {**figures, **others}


def _kept(benchmark: str) -> dict[str, Any]:
    path = FOLDER / f"{benchmark}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found
