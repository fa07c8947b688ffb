"""The paper's figures beside ours, and how an estimate's tables look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from milp_ray.config.base import BaseSection
from milp_ray.estimate.inputs import known_base
from milp_ray.estimate.paper import PAPER, PAPER_RANKS, PAPER_TABLE_7, nearest_layout, rank_rows

if TYPE_CHECKING:
    from rich.console import Console

    from milp_ray.estimate.result import Estimate

_PAPER_BASES = ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf")
_SHOWN_HISTORIES = (8, 4, 2, 1)  # parts of the longest one, which is twice the context


def print_paper(console: Console, found: Estimate) -> None:
    """The two bases of the paper's table, ours beside its figure; then where the two memories are equal."""
    heading(
        console, f"The paper's Table 7 beside ours: millions of trainable parameters, all layers ({PAPER})"
    )
    table = plain_table()
    table.add_column("base", no_wrap=True)
    for rank in PAPER_RANKS:
        table.add_column(f"r = {rank}", justify="right", no_wrap=True)
    table.add_column("paper", justify="right", no_wrap=True)
    table.add_column("our layout nearest to it", no_wrap=True)
    for model in _PAPER_BASES:
        shape = known_base(BaseSection(model=model), 2).shape
        nearest = nearest_layout(shape, PAPER_RANKS, PAPER_TABLE_7)
        table.add_row(
            model.rpartition("/")[2].removesuffix("-hf"),
            *(f"{row.all_layers / 1e6:.2f}" for row in rank_rows(shape, PAPER_RANKS)),
            f"{PAPER_TABLE_7 / 1e6:.2f}",
            f"{nearest.n_lora_layers} layers, r = {nearest.rank}: {nearest.parameters / 1e6:.2f} "
            f"(all layers: r = {nearest.rank_on_all_layers:.1f})",
        )
    console.print(table)
    console.print(
        "[dim]The paper's figure is quoted, not followed: no rank of its range on all layers gives it, for "
        "either base.[/]\n",
        soft_wrap=True,
    )
    curve = found.curve
    heading(
        console,
        f"One user's memory beside {escape(found.base.model)}: the history, or an adapter on all layers",
    )
    table = plain_table()
    last = len(curve.history) - 1
    points = [last // part for part in _SHOWN_HISTORIES]
    table.add_column("tokens of history", no_wrap=True)
    for place in points:
        table.add_column(f"{curve.history[place]:,}", justify="right", no_wrap=True)
    table.add_column("as much as a prompt of", justify="right", no_wrap=True)
    beyond = [curve.history[place] + curve.query_tokens > curve.context_length for place in points]
    prompted = [
        size(curve.prompted[p]) + (" *" if far else "") for p, far in zip(points, beyond, strict=True)
    ]
    table.add_row("in the prompt", *prompted, "")
    for rank, n_bytes in curve.parameterised.items():
        same = [size(n_bytes)] * len(points)
        table.add_row(f"in an adapter, r = {rank}", *same, f"{curve.equal_at[rank]:,.0f} tokens")
    console.print(table)
    console.print(
        "[dim]* beyond the base's context. What the paper's Figure 3 (Eq. 5 and 6) shows, by our own "
        "equations: a prompt's keys and values grow with the history, an adapter (float32) does not.[/]",
        soft_wrap=True,
    )


def size(n_bytes: float) -> str:
    """Bytes in binary units, three digits: "512 B", "4.10 MiB", "1,230 GiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            value = n_bytes / factor
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:,.{digits}f} {unit}"
    return f"{n_bytes:.0f} B"


def heading(console: Console, text: str) -> None:
    """Say what the table below shows."""
    # Not the table's title, which would be broken at the table's width.
    console.print(f"[italic]{text}[/]", soft_wrap=True)


def plain_table() -> Table:
    """A table as every other of an estimate."""
    return Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
