"""``milp-ray store``: the options of each command; what they do is in :mod:`milp_ray.store_view`
and, where they change or export, in :mod:`milp_ray.store_changes`.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from milp_ray.arguments import AsJson

store_app = typer.Typer(
    help="Look at the adapters of a run, check them, export them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="A run folder, by path or URI, its configuration file, or where a store is.",
    ),
]
KeyEnv = Annotated[
    str | None, typer.Option("--key-env", metavar="NAME", help="Variable with the key [as configured].")
]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="File with the key [as configured].")
]
SomeUsers = Annotated[
    list[str] | None, typer.Option("--user", metavar="ID", help="This user alone; may be repeated.")
]


class ExportFormat(StrEnum):
    """Who is to read an export."""

    peft = "peft"
    vllm = "vllm"


@store_app.command("ls")
def store_ls(
    store: Target,
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Users to show, in the order of the hashes of their ids.")
    ] = 50,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List users and their current versions."""
    from milp_ray import store_view

    store_view.print_list(store_view.opened(store, key_env, key_file), limit=limit, as_json=as_json)


@store_app.command("show")
def store_show(
    store: Target,
    user: Annotated[str, typer.Argument(metavar="USER", help="The user's id.")],
    version: Annotated[int | None, typer.Option("--version", min=1, help="[the current one]")] = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Print what is known about a user's adapter."""
    from milp_ray import store_view

    opened = store_view.opened(store, key_env, key_file)
    store_view.print_user(opened, user, version, as_json=as_json)


@store_app.command("verify")
def store_verify(
    store: Target,
    user: SomeUsers = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of every version.

    Needs no key; with one, also that nobody without it changed an encrypted file. Exit code 3 where something
    is damaged.
    """
    from milp_ray import store_view

    opened = store_view.opened(store, key_env, key_file)
    raise typer.Exit(store_view.print_verification(opened, user, as_json=as_json))


@store_app.command("gc")
def store_gc(
    store: Target,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=1, metavar="N", help="Newest versions of each user to keep [all]."),
    ] = None,
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than", min=0.0, metavar="HOURS", help="Age from which what is unfinished is abandoned."
        ),
    ] = 1.0,
    expired: Annotated[
        bool, typer.Option("--expired", help="Adapters that may not be kept any longer, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
) -> None:
    """Remove what killed writers left, and old versions.

    A run that is named is held meanwhile; where the store itself is named, nothing else may write to it. Exit
    code 3 where --expired meets an adapter that is damaged and does not say when its period ends.
    """
    from milp_ray import store_changes, store_view

    opened = store_view.opened(store, key_env, key_file)
    code = store_changes.print_collection(
        opened, keep=keep, older_than_hours=older_than, expired=expired, dry_run=dry_run
    )
    raise typer.Exit(code)


@store_app.command("export")
def store_export(
    store: Target,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A new folder, one subfolder a user.")],
    user: SomeUsers = None,
    format: Annotated[ExportFormat, typer.Option("--format", help="Who is to read it.")] = ExportFormat.peft,
    check: Annotated[
        bool, typer.Option("--check", help="Load each with PEFT and compare logits (needs a run's base).")
    ] = False,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
) -> None:
    """Write adapters for another server, in the clear.

    The scale is folded into the weights; for vLLM the rank becomes one that it knows. Exit code 3 where
    damaged adapters are left out.
    """
    from milp_ray import store_changes, store_view

    opened = store_view.opened(store, key_env, key_file)
    raise typer.Exit(store_changes.export(opened, to, user, format.value, check=check))


@store_app.command("precision")
def store_precision(
    store: Target,
    users: Annotated[int, typer.Option("--users", min=1, help="How many users to measure on.")] = 16,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure what fewer bits would cost.

    Bytes, errors of the weights, and the users' validation loss, for each precision; changes nothing.
    """
    from milp_ray import store_view

    store_view.print_precisions(store_view.opened(store, key_env, key_file), users, as_json=as_json)


@store_app.command("rewrite")
def store_rewrite(store: Target, key_env: KeyEnv = None, key_file: KeyFile = None) -> None:
    """Bring stored adapters to the configured precision and key.

    Current versions alone; `gc --keep 1` removes older ones. A run that is named is held meanwhile; where the
    store itself is named, nothing else may write to it. Exit code 3 where one is damaged.
    """
    from milp_ray import store_changes, store_view

    raise typer.Exit(store_changes.rewrite(store_view.opened(store, key_env, key_file)))
