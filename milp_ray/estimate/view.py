"""``milp-ray estimate``: an estimate as tables, as JSON, and as a figure."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from milp_ray.errors import MilpError
from milp_ray.estimate.paper_view import heading, plain_table, print_paper, size
from milp_ray.estimate.result import PRECISIONS, Estimate, Options, make_estimate
from milp_ray.report.style import duration
from milp_ray.table_console import table_console
from milp_ray.training.memory_model import MemoryParts

if TYPE_CHECKING:
    from pathlib import Path

    from milp_ray.config import Config
    from milp_ray.estimate.cost import Work
    from milp_ray.training.flops import Placement

_PART_NAMES = {
    "base": "base weights",
    "adapters": "LoRA weights",
    "gradients": "their gradients",
    "optimizer": "Adam's moments",
    "activations": "activations",
    "states": "states below the lowest LoRA",
    "kv_cache": "keys and values",
    "logits": "logits, for a moment",
    "working": "inside a layer, for a moment",
}


def print_estimate(
    config: Config, options: Options, *, as_json: bool = False, figure: Path | None = None
) -> None:
    """Print what ``config`` will cost, and draw its memory by history to ``figure`` (PNG).

    Raises:
        MilpError: as :func:`~milp_ray.estimate.result.make_estimate`, or ``figure`` names no PNG.
    """
    if figure is not None and figure.suffix.lower() != ".png":
        raise MilpError(
            f"--figure {str(figure)!r}: a figure is written as PNG; give a name that ends in .png"
        )
    found = make_estimate(config, options)
    console = table_console()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_facts(console, found)
        _print_parameters(console, found)
        _print_memory(console, found)
        if config.training.deepspeed.zero_stage:
            console.print("[dim]What ZeRO spreads over GPUs or moves to the CPU is not taken off.[/]")
        _print_cost(console, found)
        _print_assumptions(console, found)
        print_paper(console, found)
    if figure is not None:
        from milp_ray.report.memory_figure import memory_figure
        from milp_ray.report.style import save

        curve = found.curve
        drawn = memory_figure(
            curve.history,
            curve.prompted,
            curve.parameterised,
            context_length=curve.context_length,
            base=found.base.model,
        )
        save(drawn, figure)
        if not as_json:
            console.print(f"figure: {escape(str(figure))}", soft_wrap=True)


def _print_facts(console: Console, found: Estimate) -> None:
    shape, users = found.base.shape, found.cohort
    table = Table(
        title=f"Estimate of {escape(found.name)}", title_justify="left", box=None, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    precision = {2: "16-bit", 4: "float32"}[shape.dtype_bytes]
    table.add_row(
        "base",
        f"{escape(found.base.model)}: {shape.n_parameters:,} parameters, {shape.n_layers} layers of width "
        f"{shape.hidden:,}, {precision}",
    )
    table.add_row("sizes from", escape(found.base.source))
    table.add_row(
        "users",
        f"{users.n_users:,}, each with {users.batch.history_tokens:,.0f} tokens of history, "
        f"{users.batch.validation_queries.queries:,.0f} validation queries ({users.source})",
    )
    table.add_row(
        "tokens",
        f"{users.batch.trained_tokens:,.0f} trained on for a user, all epochs; "
        f"{users.batch.trained_tokens * users.n_users:.3g} for all",
    )
    table.add_row(
        "FLOPs a token",
        f"forward {found.forward_a_token:.3g}; training {found.training_a_token:.3g} "
        f"({_layout_text(found.assumed.placement)})",
    )
    placement = found.assumed.placement
    others = ", ".join(
        f"{size(found.stored_bytes(placement.rank, placement.n_lora_layers, name))} in {name}"
        for name in PRECISIONS
        if name != found.precision
    )
    table.add_row(
        "adapter",
        f"{found.assumed.parameters:,} parameters, {size(found.adapter_bytes)} as stored ({found.precision}; "
        f"{others})",
    )
    table.add_row("store", f"{size(found.adapter_bytes * users.n_users)} for {users.n_users:,} users")
    console.print(table)


def _print_parameters(console: Console, found: Estimate) -> None:
    shape = found.base.shape
    in_and_out = sum(n_in + n_out for _, n_in, n_out in shape.ffn.modules)
    heading(console, f"Trainable parameters of one adapter: rank × {in_and_out:,} × layers with a LoRA")
    table = plain_table()
    for name in ("rank", "1 layer", f"{shape.n_layers // 2} layers", f"all {shape.n_layers}", "stored, all"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rank_rows:
        table.add_row(
            str(row.rank),
            f"{row.one_layer:,}",
            f"{row.half:,}",
            f"{row.all_layers:,}",
            size(found.stored_bytes(row.rank, shape.n_layers)),
        )
    console.print(table)


def _print_memory(console: Console, found: Estimate) -> None:
    device = found.machine.device
    of = size(found.memory_bytes) + (f" of one {device.name}" if device.is_gpu else " of this machine")
    heading(console, f"Memory by part, one job at a time ({of})")
    table = plain_table()
    table.add_column("part", no_wrap=True)
    columns = [
        (_layout_text(found.assumed.placement), found.assumed.memory),
        (_layout_text(found.heaviest.placement), found.heaviest.memory),
        ("answering a batch", found.answering),
    ]
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for field in fields(MemoryParts):
        values = [getattr(parts, field.name) for _, parts in columns]
        if any(values):
            table.add_row(_PART_NAMES[field.name], *(size(value) if value else "–" for value in values))
    table.add_row("[bold]peak", *(f"[bold]{size(parts.total)}" for _, parts in columns))
    packs = (f"{found.assumed.pack_size:,}", f"{found.heaviest.pack_size:,}", "–")
    table.add_row("jobs that fit over one base", *packs)
    console.print(table)
    for note in _memory_notes(found):
        console.print(note, soft_wrap=True)


def _memory_notes(found: Estimate) -> list[str]:
    """That workers share a device, and whether what they take together fits it."""
    machine = found.machine
    sharing = max(1, round(1 / machine.portion)) if machine.device.is_gpu else machine.n_workers
    together = sharing * found.heaviest.memory.total
    notes = []
    if sharing > 1:
        where = "a GPU" if machine.device.is_gpu else "the machine"
        notes.append(f"{sharing} workers share {where}, each with a base of its own: up to {size(together)}.")
    on_each = max(1.0, machine.portion) if machine.device.is_gpu else 1.0
    if together > found.memory_bytes * on_each:
        notes.append(
            f"[red]The heaviest layout does not fit[/]: {size(together)} are needed. Give fewer workers, "
            "training.batch_size, training.max_length, or activation checkpointing."
        )
    return notes


def _print_cost(console: Console, found: Estimate) -> None:
    device = found.machine.device
    many = f"{found.machine.n_devices} × " if found.machine.n_devices > 1 else ""
    heading(console, f"Work and time on {many}{device.name}")
    table = plain_table()
    table.add_column("", no_wrap=True)
    for name in ("pieces", "FLOPs each", "time each", "at a time", "FLOPs in all", "expected time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("search", *_work_cells(found.search, "trials"))
    table.add_row("every user's adapter", *_work_cells(found.batch, "users"))
    console.print(table)


def _work_cells(work: Work, unit: str) -> list[str]:
    return [
        f"{work.n:,} {unit}",
        f"{work.one.flops:.3g}",
        duration(work.one.seconds),
        str(work.n_workers),
        f"{work.whole.flops:.3g}",
        duration(work.wall_seconds),
    ]


def _print_assumptions(console: Console, found: Estimate) -> None:
    device, b = found.machine.device, found.base.shape.dtype_bytes
    console.print(
        f"[yellow]An estimate[/]: assumed are {device.share:.0%} of {device.flops(b) / 1e12:.3g} TFLOP/s and "
        f"{1000 * device.layer_seconds:g} ms a layer and pass beside the arithmetic. Loading the base, "
        "fitting the search's model and early stopping are not in it.\n"
        "A trial is the mean over the layouts of the space; users are taken to get "
        f"{_layout_text(found.assumed.placement)}.\n",
        soft_wrap=True,
    )


def _layout_text(placement: Placement) -> str:
    return f"{placement.n_lora_layers} layers, r = {placement.rank}"
