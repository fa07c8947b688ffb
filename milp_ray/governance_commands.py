"""``milp-ray forget|audit|consent|items``: the options; what they do is in :mod:`milp_ray.governance_view`.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from milp_ray.arguments import AsJson, Target

User = Annotated[str, typer.Argument(metavar="USER", help="The user's id.")]
Items = Annotated[
    list[str] | None,
    typer.Option(
        "--item",
        metavar="ITEM",
        help="This item alone: history:N, examples:N, profile, a hash (`milp-ray items`), or @FILE with an "
        "item a line; may be repeated.",
    ),
]
By = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="Who answers for it, for the record [you].")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``milp-ray``."""
    for command in (consent, forget, audit, items):
        app.command()(command)


def consent(
    target: Target,
    user: User,
    give: Annotated[bool, typer.Option("--give", help="The user consents.")] = False,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="The user does so no longer.")] = False,
    by: By = None,
) -> None:
    """Record a user's consent, or say what is known of it.

    Withdrawn: the user is neither trained nor served from now on; `forget` removes the data.
    """
    from milp_ray import governance_view

    governance_view.consent(target, user, give=give, withdraw=withdraw, by=by)


def forget(
    target: Target,
    user: User,
    item: Items = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="With --item: train the user again at once, from the rest.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Remove everything of a user, or single items.

    Adapters of all versions, scores, failures, checkpoints, the user's values in the search. The user is
    refused from the first moment on; after an interruption the same command goes on.
    """
    from milp_ray import governance_view

    governance_view.forget(
        target, user, item or [], retrain=retrain, dry_run=dry_run, yes=yes, by=by, as_json=as_json
    )


def audit(
    target: Target,
    user: Annotated[str | None, typer.Argument(metavar="[USER]", help="The user's id.")] = None,
    all_forgotten: Annotated[
        bool, typer.Option("--all-forgotten", help="Everybody whom the run has forgotten.")
    ] = False,
    item: Items = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="FOLDER", help="Search this folder too; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search a run's files for a user.

    Every byte of every file, compressed ones decoded, for the id, its hashes and, where the users' files
    still hold the user, the texts and their hashes. Exit code 3 where something is left.
    """
    from milp_ray import governance_view

    code = governance_view.audit(
        target, user, item or [], all_forgotten=all_forgotten, also=also or [], as_json=as_json
    )
    raise typer.Exit(code)


def items(target: Target, user: User, as_json: AsJson = False) -> None:
    """List a user's items by their hashes.

    Where each stands, its time and its length; none of its text.
    """
    from milp_ray import governance_view

    governance_view.items(target, user, as_json=as_json)
