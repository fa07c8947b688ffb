"""``milp-ray study``: how far a search is, its front, what matters in a layout, and its trials as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES, Objective
from milp_ray.outcome import layers_text
from milp_ray.report.style import duration, number, plus_minus
from milp_ray.search.insight import (
    Beliefs,
    Estimate,
    NoAnalysis,
    Study,
    StudyStatus,
    analysis_of,
    front_rows,
    layer_importance,
    load_study,
    study_status,
)
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from pathlib import Path

    from milp_ray.rundir import RunFolder

_BAR_WIDTH = 12
_LEVELS = "▁▂▃▄▅▆▇█"
_FACTOR_NAMES = {"n": "number of LoRAs"}

Analyse = Callable[[Study], Beliefs]


def print_status(run: RunFolder, *, as_json: bool = False, now: datetime | None = None) -> None:
    """Print how far the run's study is.

    Raises:
        MilpError: the run has no study.
    """
    study = load_study(run)
    status = study_status(study)
    if as_json:
        facts = {**asdict(status), "n_ended": status.n_ended, "n_to_come": status.n_to_come}
        _print_json({"run": run.path.name, **facts})
        return
    table = Table(title=_headline(run.path.name, status), title_justify="left", box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _status_lines(status, now or datetime.now(UTC)):
        table.add_row(name, value)
    table_console().print(table)


def print_front(run: RunFolder, *, as_json: bool = False, analyse: Analyse = analysis_of) -> None:
    """Print the run's front: measured values, and the model's where there is one.

    Raises:
        MilpError: the run has no study.
    """
    study = load_study(run)
    analysis, why = _analysis(study, analyse)
    rows = front_rows(study, analysis)
    if as_json:
        points = [
            {
                "trial": row.trial,
                "key": row.layout.key,
                "layout": row.layout.to_dict(),
                "objectives": {name: asdict(estimate) for name, estimate in row.estimates.items()},
            }
            for row in rows
        ]
        _print_json({"run": run.path.name, "front": points, "no_model": why})
        return
    title = f"Pareto front: {len(rows)} of {study.result.n_completed} layouts measured"
    if study.result.hypervolume is not None:
        title += f"; hypervolume {study.result.hypervolume:.4g}"
    table = _table(title)
    for name in ("trial", "layers", "rank"):
        table.add_column(name, justify="left" if name == "layers" else "right", no_wrap=True)
    for name in rows[0].estimates if rows else ():
        table.add_column(_header(KNOWN_OBJECTIVES[name]), justify="right", no_wrap=True)
    for row in rows:
        rank = "–" if row.layout.is_empty else str(row.layout.rank)
        table.add_row(str(row.trial), layers_text(row.layout), rank, *map(_estimate, row.estimates.values()))
    console = table_console()
    console.print(table)
    console.print("[dim]± of a value: its standard error between layouts on the same users[/]")
    if why:
        console.print(f"[yellow]without the model:[/] {escape(why)}")
    else:
        console.print("[dim]below it: the model's mean ± standard deviation[/]")


def print_importance(run: RunFolder, *, as_json: bool = False, analyse: Analyse = analysis_of) -> None:
    """Print how much each factor of the layout matters for each objective.

    Raises:
        MilpError: the run has no study, or the model has nothing to say of it.
    """
    study = load_study(run)
    analysis = analyse(study)
    maps = {name: layer_importance(analysis, name) for name in analysis.objectives}
    if as_json:
        found = {
            name: {factor: _share(analysis.importance[name][factor]) for factor in analysis.factors}
            for name in analysis.objectives
        }
        _print_json(
            {
                "run": run.path.name,
                "n_trials": study.result.n_completed,
                "importance": found,
                "unexplained": {name: _share(analysis.unexplained[name]) for name in analysis.objectives},
                "layers": maps,
            }
        )
        return
    table = _table(f"What matters in a layout, after {study.result.n_completed} measured trials")
    table.add_column("factor", no_wrap=True)
    for name in analysis.objectives:
        table.add_column(_short(KNOWN_OBJECTIVES[name]), no_wrap=True)
    for factor in analysis.factors:
        cells = []
        for name in analysis.objectives:
            share, low, high = analysis.importance[name][factor]
            top = max(values[2] for values in analysis.importance[name].values())
            cells.append(f"[cyan]{bar(share, top)}[/] {_with_interval(share, low, high)}")
        table.add_row(_FACTOR_NAMES.get(factor, factor), *cells)
    table.add_section()
    table.add_row(
        "none of them", *(_with_interval(*analysis.unexplained[name]) for name in analysis.objectives)
    )
    console = table_console()
    console.print(table)
    shown = {name: values for name, values in maps.items() if values and name != ADAPTER_PARAMETERS.name}
    if shown:
        console.print("Where the memory is stored (layers from the input to the output):")
    for name, values in shown.items():
        console.print(f"  {sparkline(values)}  {_short(KNOWN_OBJECTIVES[name])}")


def _with_interval(share: float, low: float, high: float) -> str:
    return f"{share:.2f} [dim]\\[{low:.2f}, {high:.2f}][/]"


def _share(values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values, strict=True))


def export(run: RunFolder, to: Path) -> None:
    """Write one row a trial to ``to``.

    Raises:
        MilpError: the run has no study, or the file's name tells no known format.
    """
    from milp_ray.search.export import check_format, export_rows, write_export

    check_format(to)
    rows = export_rows(load_study(run))
    write_export(rows, to)
    table_console().print(f"{len(rows)} trials: {escape(str(to))}", soft_wrap=True)


# --------------------------------------------------------------------------------------------- how it looks


def bar(value: float, top: float) -> str:
    """``value`` as a bar of a fixed width, in eighths of a character; ``top`` fills it."""
    eighths = round(8 * _BAR_WIDTH * min(max(value / top, 0.0), 1.0)) if top > 0 else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(_BAR_WIDTH)


def sparkline(values: Sequence[float]) -> str:
    """One block a value, its height the share of the largest; nothing above 0 is the lowest block."""
    top = max(values, default=0.0)
    if top <= 0:
        return _LEVELS[0] * len(values)
    return "".join(_LEVELS[round((len(_LEVELS) - 1) * max(value, 0.0) / top)] for value in values)


def _headline(name: str, status: StudyStatus) -> str:
    how = "finished" if status.finished else f"{status.n_ended} of {status.n_trials} trials have ended"
    return f"Search of {escape(name)}: {how}"


def _status_lines(status: StudyStatus, now: datetime) -> list[tuple[str, str]]:
    counts = ", ".join(f"{n} {name}" for name, n in status.trials.items() if n)
    to_propose = status.n_to_come - status.trials["running"] - status.trials["waiting"]
    lines = [("trials", f"{counts or 'none yet'}" + (f", {to_propose} to be proposed" if to_propose else ""))]
    if status.hypervolume is not None:
        lines.append(("hypervolume", f"{status.hypervolume:.4g}, {status.n_front} layouts on the front"))
    for name, best in status.best.items():
        text = f"{number(best.value)} (trial {best.trial}, {best.key})"
        lines.append((f"best {_short(KNOWN_OBJECTIVES[name])}", text))
    sessions = f" in {status.n_sessions} sessions" if status.n_sessions > 1 else ""
    lines.append(("time", f"{duration(status.seconds)}{sessions}"))
    cost = f"{duration(status.trial_seconds)} of trials: {status.cpu_seconds:,.0f} CPU-seconds"
    if status.gpu_seconds:
        cost += f", {status.gpu_seconds:,.0f} GPU-seconds"
    lines.append(("cost", cost))
    if status.n_slots is not None:
        idle = "–" if status.idle_share is None else f"{status.idle_share:.1%} idle while trials were to come"
        used = "" if status.utilisation is None else f", {status.utilisation:.0%} of their time in trials"
        shared = "" if status.n_processes == status.n_slots else f" in {status.n_processes} processes"
        lines.append(("slots", f"{status.n_slots}{shared}: {idle}{used}"))
    if status.startup_seconds is not None and status.longest_startup_seconds is not None:
        longest = duration(status.longest_startup_seconds)
        lines.append(("start-up", f"{duration(status.startup_seconds)} a trial, longest {longest}"))
    if status.proposal_seconds is not None and status.longest_proposal_seconds is not None:
        longest = duration(status.longest_proposal_seconds)
        lines.append(
            (
                "proposals",
                f"{status.n_batches} batches in {duration(status.proposal_seconds)}, longest {longest}",
            )
        )
    if status.max_block_seconds is not None:
        lines.append(("longest block", f"{status.max_block_seconds:.3f} s of Tune's controller"))
    if status.finished:
        lines.append(("finished", escape(status.finished)))
        return lines
    if status.seconds_left is not None:
        lines.append(("left", f"about {duration(status.seconds_left)} for {status.n_to_come} trials"))
    ago = (now - datetime.fromisoformat(status.last_event)).total_seconds()
    lines.append(("last event", f"{duration(max(0.0, ago))} ago ({status.last_event})"))
    return lines


def _analysis(study: Study, analyse: Analyse) -> tuple[Beliefs | None, str | None]:
    try:
        return analyse(study), None
    except NoAnalysis as error:
        return None, str(error)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def _short(objective: Objective) -> str:
    label = objective.label.partition(" (")[0]
    return label if label.startswith("ROUGE") else label[0].lower() + label[1:]


def _header(objective: Objective) -> str:
    return f"{objective.label.partition(' (')[0]} {'↓' if objective.direction == 'min' else '↑'}"


def _estimate(estimate: Estimate) -> str:
    """The measured value, and the model's below it."""
    measured = plus_minus(estimate.value, estimate.standard_error)
    if estimate.model_mean is None:
        return measured
    return f"{measured}\n[dim]{plus_minus(estimate.model_mean, estimate.model_sd)}[/]"
