"""What the commands of ``milp-ray store`` that change or export adapters do and print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from milp_ray.errors import MilpError
from milp_ray.personalize.store import survey
from milp_ray.store_view import EXIT_DAMAGED, Opened, size
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from milp_ray.personalize.store.export import Format
    from milp_ray.personalize.store.faults import OnDamaged


def _held(opened: Opened) -> AbstractContextManager[None]:
    """Hold the run that named the store, so that nothing trains or forgets meanwhile.

    Which runs use a store that was named by itself cannot be told: none is held.

    Raises:
        MilpError: another process is working on the run.
    """
    if opened.run is None or not opened.run.path.is_dir():
        return nullcontext()
    return opened.run.lock()


def print_collection(
    opened: Opened, *, keep: int | None, older_than_hours: float, expired: bool, dry_run: bool
) -> int:
    """Remove what is abandoned, versions beyond the newest ``keep`` and, if asked for, what has expired.

    Prints what was removed, and what is damaged and may have expired. Returns the exit code.

    Raises:
        MilpError: another process is working on the run that named the store.
    """
    with nullcontext() if dry_run else _held(opened):
        code = _print_expired(opened, dry_run=dry_run) if expired else 0
        removed = survey.collect(
            opened.store, keep=keep, older_than_seconds=older_than_hours * 3600.0, dry_run=dry_run
        )
    line = (
        f"{'would remove' if dry_run else 'removed'} {removed.unfinished:,} unfinished uploads or deletions"
    )
    if keep is not None:
        line += f" and {removed.versions:,} versions"
    line += f", {size(removed.n_bytes)}"
    if removed.needed:
        line += f"; {removed.needed:,} users keep theirs, as the current one is damaged"
    if removed.too_young:
        line += f"; {removed.too_young:,} younger than {older_than_hours:g} hours stay"
    table_console().print(line)
    return code


def _print_expired(opened: Opened, *, dry_run: bool) -> int:
    """Remove adapters whose period has ended; print how many, and which may be among them. The exit code."""
    from milp_ray.personalize.governance.retention import collect_expired

    gone = collect_expired(opened.store, dry_run=dry_run)
    console = table_console()
    console.print(
        f"{'would remove' if dry_run else 'removed'} {gone.versions:,} expired versions, "
        f"{size(gone.n_bytes)}; {gone.users:,} users {'would have' if dry_run else 'have'} no adapter then"
    )
    _print_damaged(gone.problems)
    if gone.problems:
        console.print(
            "these stay, as they do not say when their period ends: personalise their users again and "
            "`milp-ray store gc --keep 1`, or forget them",
            soft_wrap=True,
        )
    return EXIT_DAMAGED if gone.problems else 0


def export(
    opened: Opened, to: Path, user_ids: Sequence[str] | None, format: Format, *, check: bool = False
) -> int:
    """Write users' adapters for another program, in the clear. The exit code.

    Of all users those are left out who may not be served: by the run's record, where a run named the store,
    or because their adapters have expired or are damaged.

    Raises:
        MilpError: ``check`` is asked for a store that was not named by its run; a user who is named may not
            be served, or has a damaged adapter.
    """
    from milp_ray.personalize.store.export import INDEX, export_users, largest_difference

    if check and opened.config is None:
        raise MilpError(
            f"--check needs the base, and {opened.store.uri} does not say which it is; give the run folder"
        )
    refused: list[str] = []
    problems: list[str] = []
    on_damaged = _noting(problems)
    for user_id in user_ids or ():
        _check_serving(opened, user_id)
    if user_ids is None:
        users = _servable(opened, refused, on_damaged)
        written = list(export_users(opened.store, to, users, format, on_damaged=on_damaged))
    else:
        written = list(export_users(opened.store, to, user_ids, format))
    console = table_console()
    if refused:
        console.print(f"[yellow]{len(refused):,} users are left out:[/] without consent, or expired")
    _print_damaged(problems)
    ranks = sorted({one.rank for one in written})
    line = f"{len(written):,} adapters of rank {', '.join(map(str, ranks))} in {escape(str(to))}, float32"
    console.print(f"{line} and in the clear; {INDEX} names their users", soft_wrap=True)
    if format == "vllm" and written:
        example = f"NAME={to / written[0].folder.name}"
        console.print(
            f"vllm serve BASE --enable-lora --max-lora-rank {max(ranks)} --lora-modules {escape(example)}",
            soft_wrap=True,
        )
    if check and opened.config is not None:
        largest = largest_difference(opened.store, written, opened.config.base)
        console.print(
            f"loaded with PEFT, their logits differ from the stored adapters' by at most {largest:.1e}"
        )
    return EXIT_DAMAGED if problems else 0


def _servable(opened: Opened, refused: list[str], on_damaged: OnDamaged) -> Iterator[str]:
    """The users that have an adapter which may be served; the others are added to ``refused``."""
    from milp_ray.personalize.governance.consent import NoConsentError, NoSuchUserError

    for user_id in opened.store.users(on_damaged=on_damaged):
        try:
            _check_serving(opened, user_id)
        except (NoConsentError, NoSuchUserError):
            refused.append(user_id)
            continue
        if opened.store.is_expired(opened.store.manifest(user_id)):
            refused.append(user_id)
        else:
            yield user_id


def _check_serving(opened: Opened, user_id: str) -> None:
    from milp_ray.personalize.governance.consent import Gate
    from milp_ray.personalize.governance.record import Record

    if opened.run is not None and opened.config is not None:
        gate = Gate(Record(opened.run.path), opened.config.users.consent)
        gate.check_serving(user_id, opened.run.path)


def _noting(problems: list[str]) -> OnDamaged:
    """Adds to ``problems`` what is damaged and passed over."""
    return lambda error: problems.append(str(error))


def _print_damaged(problems: Sequence[str]) -> None:
    for problem in problems:
        table_console().print(f"[red]damaged:[/] {escape(problem)}", soft_wrap=True)


def rewrite(opened: Opened) -> int:
    """Bring current adapters to the configured precision and key; print how many. The exit code.

    Raises:
        MilpError: another process is working on the run that named the store.
    """
    store = opened.store
    store.check(writable=True)
    problems: list[str] = []
    with _held(opened):
        n_rewritten = sum(1 for _ in survey.rewrite(store, on_damaged=_noting(problems)))
    how = f"{store.precision}, {'encrypted' if store.key else 'in the clear'}"
    line = f"{n_rewritten:,} adapters are now stored as {how}; the others already were"
    table_console().print(f"{line}, but for {len(problems):,} damaged ones" if problems else line)
    _print_damaged(problems)
    return EXIT_DAMAGED if problems else 0
