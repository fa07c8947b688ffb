"""What a run found and was made from: the front as a table, the facts about its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.report.style import number

MOST_REASONS = 50  # rows of a table of failures

if TYPE_CHECKING:
    from rich.table import Table

    from milp_ray.config.base import BaseSection
    from milp_ray.memory.layout import CanonicalLayout
    from milp_ray.search.choice import Choice
    from milp_ray.search.results import StudyResult


def front_table(result: StudyResult, chosen: Choice) -> Table:
    """The Pareto front, a row a layout, the first objective's best on top; the chosen one is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    objectives = [KNOWN_OBJECTIVES[name] for name in result.objectives]
    title = f"Pareto front: {len(result.front)} of {result.n_completed} layouts measured"
    if result.n_failed:
        title += f", {result.n_failed} trials failed"
    if result.hypervolume is not None:
        title += f"; hypervolume {result.hypervolume:.4g}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("trial", justify="right")
    table.add_column("layers")
    table.add_column("rank", justify="right")
    for objective in objectives:
        name, arrow = objective.label.partition(" (")[0], "↓" if objective.direction == "min" else "↑"
        table.add_column(f"{name} {arrow}", justify="right")
    first = objectives[0]
    for point in sorted(result.front, key=lambda p: first.sign * p.values[first.name]):
        mark = "[green]→[/]" if point.index == chosen.point.index else ""
        values = [number(point.values[objective.name]) for objective in objectives]
        rank = "–" if point.layout.is_empty else str(point.layout.rank)
        table.add_row(mark, str(point.index), layers_text(point.layout), rank, *values)
    return table


def failures_table(reasons: Mapping[str, int], n_failed: int, stage: str | None = None) -> Table:
    """Users that failed (in ``stage``), a row a reason, the most frequent on top, the rarest together.

    "…" in a reason stands for what differs by user.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = f"{n_failed} users failed" + (f" in {stage}" if stage else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("users", justify="right")
    table.add_column("reason")
    rows = sorted(reasons.items(), key=lambda pair: -pair[1])
    for reason, n in rows[:MOST_REASONS]:
        table.add_row(f"{n:,}", escape(reason))
    rest = rows[MOST_REASONS:]
    if rest:
        table.add_row(f"{sum(n for _, n in rest):,}", f"{len(rest)} other reasons")
    return table


def layers_text(layout: CanonicalLayout) -> str:
    """``01100000`` as ``·##·····``: where the adapter sits, at a glance."""
    return "".join("#" if on else "·" for on in layout.mask)


def base_facts(section: BaseSection) -> dict[str, Any]:
    """Which base it was: its id, the revision asked for, and the commit loaded or a folder's files."""
    from milp_ray.personalize.recipe import base_identity

    facts = {"model": section.model, "revision": section.revision, **base_identity(section)}
    if "files" not in facts:
        facts["commit"] = _hub_commit(section)
    return facts


def _hub_commit(section: BaseSection) -> str | None:
    """The commit of a Hugging Face model, by the folder of the local cache that it was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(section.model, "config.json", revision=section.revision)
    return Path(found).parent.name if isinstance(found, str) else None
