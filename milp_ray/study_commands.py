"""``milp-ray study``: the options of each command; what they do is in :mod:`milp_ray.study_view`.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from milp_ray.arguments import AsJson, Target, existing_run

study_app = typer.Typer(
    help="Look at a search, running or finished.", no_args_is_help=True, rich_markup_mode=None
)


@study_app.command("status")
def study_status(target: Target, as_json: AsJson = False) -> None:
    """Say how far a search is and what it costs.

    Reads the journal alone, and may be called at any time.
    """
    from milp_ray import study_view

    study_view.print_status(existing_run(target), as_json=as_json)


@study_app.command("front")
def study_front(target: Target, as_json: AsJson = False) -> None:
    """Print the Pareto front.

    Values as measured with their standard errors, and what a model of the search's own trials believes.
    """
    from milp_ray import study_view

    study_view.print_front(existing_run(target), as_json=as_json)


@study_app.command("importance")
def study_importance(target: Target, as_json: AsJson = False) -> None:
    """Say which layers store the memory.

    How much each layer, the number of LoRAs and their rank matter for each objective, after a model of the
    search's own trials.
    """
    from milp_ray import study_view

    study_view.print_importance(existing_run(target), as_json=as_json)


@study_app.command("export")
def study_export(
    target: Target,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A .csv, .parquet or .json file.")],
) -> None:
    """Write the trials as a table.

    One row a trial: layout, raw factors, values, status and times.
    """
    from milp_ray import study_view

    study_view.export(existing_run(target), to)
