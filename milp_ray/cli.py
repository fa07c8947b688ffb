"""The ``milp-ray`` command: one subcommand a stage, nothing else.

Nothing heavy is imported before a command needs it, so that ``milp-ray --help`` answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from milp_ray import governance_commands
from milp_ray.leakage_command import leakage
from milp_ray.quality_commands import ability, winrate
from milp_ray.store_commands import store_app

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.rundir import RunFolder

EXIT_BUG = 1
EXIT_MISTAKE = 2  # the caller can mend it: a configuration, a path, a users file
EXIT_SOME_FAILED = 3  # the command came to its end, and some users have no adapter or no scores
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell has it
SHOW_MESSAGES = "MILP_TRACEBACK"  # the variable that lets messages through which may quote users' texts
# A mistake in the command line, which typer tells itself; the class has no public name there.
_UsageMistake: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


class _Commands(TyperGroup):
    """The one place where a failure becomes a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        from milp_ray.errors import MilpError, safe_traceback

        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _UsageMistake, BrokenPipeError):
            raise
        except MilpError as error:
            typer.secho(str(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(EXIT_MISTAKE) from None
        except OSError as error:
            typer.secho(_of_the_disk(error), fg=typer.colors.RED, err=True)
            raise typer.Exit(EXIT_MISTAKE) from None
        except KeyboardInterrupt as interrupted:
            typer.secho(
                f"\n{str(interrupted) or 'interrupted; the same command continues'}",
                fg=typer.colors.YELLOW,
                err=True,
            )
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if os.environ.get(SHOW_MESSAGES):
                raise
            typer.secho(
                f"{safe_traceback(error)}\nThis was not foreseen; {SHOW_MESSAGES}=1 shows the whole message",
                fg=typer.colors.RED,
                err=True,
            )
            raise typer.Exit(EXIT_BUG) from None


def _of_the_disk(error: OSError) -> str:
    """What to say where a disk is full, read-only or not ours; any other error is raised again."""
    import errno

    from milp_ray.errors import MilpError

    if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}:
        raise error
    # A stage that fails for this reason says more, though its last notes could not be written either.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MilpError):
            return str(cause)
        cause = cause.__context__
    return (
        f"{error.filename or 'a file'}: {error.strerror}. Make room or mend the permissions; what was done "
        "is kept, and the same command goes on from there"
    )


app = typer.Typer(
    name="milp-ray",
    help="Personal adapters for many users of one frozen language model.",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    # Rich help pages cost a third of a second of imports at every call.
    rich_markup_mode=None,
    # A traceback with local variables would print users' texts.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True, rich_markup_mode=None)
users_app = typer.Typer(help="Look at users.", no_args_is_help=True, rich_markup_mode=None)
study_app = typer.Typer(
    help="Look at a search, running or finished.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")
app.add_typer(users_app, name="users")
app.add_typer(study_app, name="study")
app.add_typer(store_app, name="store")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; experiments/ holds examples.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings that replace the file's, e.g. search.n_trials=24."
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the configuration file whose run is meant.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _version(asked: bool) -> None:
    if asked:
        from milp_ray import __version__

        typer.echo(f"milp-ray {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# -------------------------------------------------------------------------------------------- a whole run


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name first.")] = False,
) -> None:
    """Run every stage, or what is left of them.

    Searches for layouts, chooses one, makes every user's adapter, scores it, and writes a report. After an
    interruption the same command continues. Exit code 3: it came to its end, and some users failed.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.pipeline import stages
    from milp_ray.rundir import RunFolder

    resolved = load_config(config, overrides or [])
    if stages.run_all(RunFolder.create(resolved, fresh=fresh), resolved):
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
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


@app.command()
def search(target: Target, overrides: Overrides = None) -> None:
    """Search for layouts on the cluster."""
    from milp_ray.pipeline import stages

    stages.search(*_run_of(target, overrides))


@app.command()
def choose(target: Target, overrides: Overrides = None) -> None:
    """Choose one layout of the front."""
    from milp_ray.pipeline import stages

    stages.choose(*_run_of(target, overrides))


@app.command()
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

    summary = stages.personalize(*_run_of(target, overrides), users or [])
    if summary.failed:
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
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

    if updating.update(*_run_of(target, overrides), user, as_json=as_json):
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def evaluate(target: Target, overrides: Overrides = None) -> None:
    """Score every method on held-out queries. Exit code 3: some users failed."""
    from milp_ray.pipeline import stages

    if stages.evaluate(*_run_of(target, overrides)):
        raise typer.Exit(EXIT_SOME_FAILED)


@app.command()
def report(target: Target, overrides: Overrides = None) -> None:
    """Write the summary, figures and report."""
    from milp_ray.pipeline import stages

    stages.report(*_run_of(target, overrides))


def _run_of(target: Path, overrides: list[str] | None) -> tuple[RunFolder, Config]:
    """The run that a path means, and its configuration with the overrides applied and recorded."""
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import RunFolder

    if target.is_file():
        config = load_config(target, overrides or [])
        return RunFolder.create(config), config
    # A run folder may have been moved since it was made: where it is counts, not where it was.
    config = load_config(RunFolder.open(target).config_file, overrides or [])
    return RunFolder.create(config, at=target), config


# --------------------------------------------------------------------------------------------- use and look


@app.command()
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


governance_commands.register(app)
app.command()(leakage)
app.command()(winrate)
app.command()(ability)


@app.command()
def estimate(
    config: ConfigFile,
    overrides: Overrides = None,
    users: Annotated[
        int | None, typer.Option("--users", min=1, help="So many users, in place of the configuration's.")
    ] = None,
    history_tokens: Annotated[
        int | None, typer.Option("--history-tokens", min=0, help="Tokens of each one's history [2000].")
    ] = None,
    examples: Annotated[
        int | None, typer.Option("--examples", min=0, help="Examples of each one, all splits [50].")
    ] = None,
    example_tokens: Annotated[
        int | None, typer.Option("--example-tokens", min=2, help="Tokens of an example [64].")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="a100, h100, h200 or cpu.")] = None,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="How many of them (CPU: cores).")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", help="FLOP/s of one device, in place of its known peak.")
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Share of the peak that is reached [GPU 0.35, CPU 0.25].")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the peak on this machine, for half a second.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank that users get [the space's middle one].")
    ] = None,
    lora_layers: Annotated[
        int | None, typer.Option("--lora-layers", min=1, help="Layers with a LoRA that users get [half].")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Draw memory by history to a .png file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will cost.

    Parameters, bytes, memory by part, FLOPs and expected time, from the configuration alone: no weights are
    needed, and for the paper's bases no network. The paper's figures stand beside ours.
    """
    from milp_ray.config_loader import load_config
    from milp_ray.estimate.inputs import Numbers
    from milp_ray.estimate.result import Options
    from milp_ray.estimate.view import print_estimate

    options = Options(
        numbers=Numbers.given(users, history_tokens, examples, example_tokens),
        device=device,
        n_devices=devices,
        peak=flops,
        share=share,
        measure=measure,
        rank=rank,
        n_lora_layers=lora_layers,
    )
    print_estimate(load_config(config, overrides or []), options, as_json=as_json, figure=figure)


@app.command()
def doctor() -> None:
    """Say what is installed and what would fail."""
    from rich.console import Console

    from milp_ray.doctor import doctor as examine

    raise typer.Exit(examine(Console(emoji=False)))


@config_app.command("show")
def config_show(file: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved configuration.

    The file, the overrides, and every default.
    """
    from milp_ray.config_loader import dump_config, load_config

    typer.echo(dump_config(load_config(file, overrides or [])), nl=False)


@users_app.command("sample")
def users_sample(
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many users.")] = 1,
    long: Annotated[bool, typer.Option("--long", help="Users with long histories.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the world.")] = 0,
) -> None:
    """Print embedded users.

    Their profile, their history, and queries with the wanted responses.
    """
    from milp_ray import users_view

    users_view.print_sample(n, long=long, seed=seed)


@users_app.command("check")
def users_check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Read users and tell what was found."""
    from milp_ray import users_view
    from milp_ray.config_loader import load_config

    users_view.print_check(load_config(file, overrides or []))


@users_app.command("stats")
def users_stats(
    file: ConfigFile,
    overrides: Overrides = None,
    in_tokens: Annotated[
        bool, typer.Option("--tokens", help="Count lengths in the base's tokens, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a paper's first table tells of a dataset.

    Users, examples of each part, and how long histories, queries and responses are.
    """
    from milp_ray import users_view
    from milp_ray.config_loader import load_config

    users_view.print_statistics(load_config(file, overrides or []), in_tokens=in_tokens, as_json=as_json)


@study_app.command("status")
def study_status(target: Target, as_json: AsJson = False) -> None:
    """Say how far a search is and what it costs.

    Reads the journal alone, and may be called at any time.
    """
    from milp_ray import study_view

    study_view.print_status(_existing_run(target), as_json=as_json)


@study_app.command("front")
def study_front(target: Target, as_json: AsJson = False) -> None:
    """Print the Pareto front.

    Values as measured with their standard errors, and what the model of the search believes.
    """
    from milp_ray import study_view

    study_view.print_front(_existing_run(target), as_json=as_json)


@study_app.command("importance")
def study_importance(target: Target, as_json: AsJson = False) -> None:
    """Say which layers store the memory.

    How much each layer, the number of LoRAs and their rank matter for each objective, after the model of the
    search.
    """
    from milp_ray import study_view

    study_view.print_importance(_existing_run(target), as_json=as_json)


@study_app.command("export")
def study_export(
    target: Target,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A .csv, .parquet or .json file.")],
) -> None:
    """Write the trials as a table.

    One row a trial: layout, raw factors, values, status and times.
    """
    from milp_ray import study_view

    study_view.export(_existing_run(target), to)


def _existing_run(target: Path) -> RunFolder:
    """The run that a path means, which is only looked at."""
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import RunFolder

    if target.is_file():
        config = load_config(target, [])
        return RunFolder.open(Path(config.output_dir) / config.name)
    return RunFolder.open(target)


def main() -> None:
    """Entry point of the ``milp-ray`` command."""
    app()


if __name__ == "__main__":
    main()
