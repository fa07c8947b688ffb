"""``milp-ray leakage``: plant canaries, train, and say whether one user's adapter gives another's away.

Nothing heavy is imported before the command needs it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milp_ray import exit_codes
from milp_ray.arguments import AsJson
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_LEAKS = exit_codes.FOUND


class Secrets(StrEnum):
    """What secrets are made of."""

    words = "words"
    digits = "digits"


def leakage(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run folder whose layout was chosen.")],
    users: Annotated[int, typer.Option("--users", min=2, help="Users to audit, at most.")] = 8,
    canaries: Annotated[int, typer.Option("--canaries", min=1, max=8, help="Planted in each history.")] = 4,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times that each one is planted.")] = 1,
    secrets: Annotated[Secrets, typer.Option("--secrets", help="What secrets are made of.")] = Secrets.words,
    candidates: Annotated[
        int, typer.Option("--candidates", min=10, help="Other secrets that each one is ranked among.")
    ] = 1000,
    control: Annotated[
        bool, typer.Option("--control/--no-control", help="Train each user without canaries, too.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of users, secrets and places.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Audit whether adapters keep users apart.

    Plants random secrets in some users' histories, trains their adapters anew without publishing them, and
    measures how far each secret is exposed under the own adapter, the others' and the base. Writes
    leakage.json in the run folder. Exit code 3 where others' adapters expose more than the base.
    """
    from milp_ray.personalize.governance.leakage import LeakageOptions
    from milp_ray.pipeline import quality
    from milp_ray.rundir import RunFolder

    run = RunFolder.open(target)
    options = LeakageOptions(
        n_users=users,
        n_canaries=canaries,
        n_candidates=candidates,
        repeats=repeats,
        space=secrets.value,
        seed=seed,
        control=control,
    )
    found = quality.leakage(run, run.config(), options, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(found, run.leakage_file)
    if not found["isolated"]:
        raise typer.Exit(EXIT_LEAKS)


def _print(found: Mapping[str, Any], file: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from milp_ray.report.leakage_text import (
        COLUMNS,
        leakage_note,
        leakage_rows,
        leakage_title,
        leakage_verdict,
    )

    console = table_console()
    table = Table(title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for row in leakage_rows(found):
        table.add_row(*row)
    console.print(leakage_title(found), soft_wrap=True)
    console.print(table)
    for line in (leakage_note(found), leakage_verdict(found), f"results for programs: {file}"):
        console.print(line, soft_wrap=True, markup=False)
