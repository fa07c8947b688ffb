"""``milp-ray run``, each of its stages, ``compare``, ``update`` and ``generate``: the options of each.

What they do is in :mod:`milp_ray.pipeline`. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from milp_ray import exit_codes
from milp_ray.arguments import AsJson, ConfigFile, Overrides, Target, run_of


def register(app: typer.Typer) -> None:
    """Add the commands to ``milp-ray``."""
    for command in (run, compare, search, choose, personalize, update, evaluate, report, generate):
        app.command()(command)


def run(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name first.")] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Look at all nodes of the cluster before any work begins.")
    ] = False,
) -> None:
    """Run every stage, or what is left of them.

    Searches for layouts, chooses one, makes every user's adapter, scores it, and writes a report. After an
    interruption the same command continues. Exit code 3: it came to its end, and some users failed.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.pipeline import stages
    from milp_ray.rundir import RunFolder

    resolved = load_config(config, overrides or [])
    if stages.run_all(RunFolder.create(resolved, fresh=fresh), resolved, preflight=preflight):
        raise typer.Exit(exit_codes.SOME_FAILED)


def compare(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare every way of personalising on the same users.

    Fits, asks and scores the methods of compare.methods, and writes tables, values and a figure of quality
    against cost into the run's compare folder. After an interruption the same command continues.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.pipeline import quality
    from milp_ray.rundir import RunFolder

    resolved = load_config(config, overrides or [])
    quality.compare(RunFolder.create(resolved), resolved, as_json=as_json)


def search(target: Target, overrides: Overrides = None) -> None:
    """Search for layouts on the cluster."""
    from milp_ray.pipeline import stages

    stages.search(*run_of(target, overrides))


def choose(target: Target, overrides: Overrides = None) -> None:
    """Choose one layout of the front."""
    from milp_ray.pipeline import stages

    stages.choose(*run_of(target, overrides))


def personalize(
    target: Target,
    overrides: Overrides = None,
    users: Annotated[
        list[str] | None,
        typer.Option(
            "--users",
            metavar="URI",
            help="Users in place of the configuration's: a .jsonl, .jsonl.gz or .parquet file or a folder of "
            "them, here or at s3://, gs://, …; may be given several times.",
        ),
    ] = None,
) -> None:
    """Make every user's adapter.

    Users are streamed, any number of them; those that are finished are not made again. Exit code 3: some
    failed, and why is in the summary.
    """
    from milp_ray.pipeline import stages

    summary = stages.personalize(*run_of(target, overrides), users or [])
    if summary.failed:
        raise typer.Exit(exit_codes.SOME_FAILED)


def update(
    target: Target,
    overrides: Overrides = None,
    user: Annotated[
        list[str] | None, typer.Option("--user", metavar="ID", help="This user alone; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue adapters with new history.

    Trains each current version on what its user has said since; where that costs too much of what was known
    before, the old version stays. Users without an adapter get one. Exit code 3: some users failed.
    """
    from milp_ray.pipeline import updating

    if updating.update(*run_of(target, overrides), user, as_json=as_json):
        raise typer.Exit(exit_codes.SOME_FAILED)


def evaluate(target: Target, overrides: Overrides = None) -> None:
    """Score every method on held-out queries. Exit code 3: some users failed."""
    from milp_ray.pipeline import stages

    if stages.evaluate(*run_of(target, overrides)):
        raise typer.Exit(exit_codes.SOME_FAILED)


def report(target: Target, overrides: Overrides = None) -> None:
    """Write the summary, figures and report."""
    from milp_ray.pipeline import stages

    stages.report(*run_of(target, overrides))


def generate(
    target: Target,
    query: Annotated[str, typer.Argument(metavar="QUESTION", help="What the user asks.")],
    user: Annotated[str, typer.Option("--user", help="The user's id.")],
    without: Annotated[bool, typer.Option("--base", help="Answer with the base alone, to compare.")] = False,
) -> None:
    """Answer a question with a user's adapter."""
    from milp_ray.pipeline import answering
    from milp_ray.rundir import RunFolder

    folder = RunFolder.open(target)
    typer.echo(answering.generate(folder, folder.config(), user, query, personal=not without))
