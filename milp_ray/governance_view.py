"""What the commands about people do and print: counts, paths and hashes, never a text of a user."""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from milp_ray.errors import MilpError
from milp_ray.personalize.governance import audit as audits
from milp_ray.personalize.governance.consent import record_consent
from milp_ray.personalize.governance.forget import Forgotten, forget_items, forget_user
from milp_ray.personalize.governance.given import find_given
from milp_ray.personalize.governance.items import find_user, items_of, resolve
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.store import run_store, shown
from milp_ray.rundir import RunFolder
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.personalize.governance.audit import Audit
    from milp_ray.users.records import User

EXIT_FOUND = 3


def consent(target: str, user_id: str, *, give: bool, withdraw: bool, by: str | None) -> None:
    """Record consent or its withdrawal; with neither, print what is known.

    Raises:
        MilpError: both were asked for; the user was forgotten.
    """
    run, config = _opened(target)
    console = table_console()
    if give and withdraw:
        raise MilpError("--give and --withdraw contradict each other; leave one of them out")
    if not give and not withdraw:
        console.print(_consent_in_words(run, config, user_id), soft_wrap=True)
        return
    with run.lock():
        changed = record_consent(
            Record(run.path), user_id, "given" if give else "withdrawn", by or _operator()
        )
    said = "consents" if give else "has withdrawn consent: neither trained nor served from now on"
    again = "" if changed else " (as was recorded before)"
    console.print(f"user {escape(shown(user_id))} {said}{again}", soft_wrap=True)
    if withdraw and run_store(run.store, config.personalize).versions(user_id):
        console.print(f"the adapter stays until `milp-ray forget {run.place} ID`", soft_wrap=True)


def forget(
    target: str,
    user_id: str,
    named: Sequence[str],
    *,
    retrain: bool,
    dry_run: bool,
    yes: bool,
    by: str | None,
    as_json: bool,
) -> None:
    """Forget a user, or the items that are named; asks first.

    Raises:
        MilpError: an option does not go with the others; something could not be removed.
    """
    if retrain and not named:
        raise MilpError("--retrain trains a user who stays: it goes with --item")
    run, config = _opened(target)
    store = run_store(run.store, config.personalize)
    console, rebuild = table_console(), _rebuild
    hashes = resolve(named, _user(run, config, user_id)) if named else []
    with run.lock():
        store.check()
        if hashes:
            would = forget_items(run, config, store, user_id, hashes, by="", dry_run=True)
        else:
            would = forget_user(run, config, store, user_id, by="", dry_run=True)
        if dry_run:
            _print_forgotten(console, run, would, as_json=as_json, dry_run=True)
            return
        if not yes:
            what = f"{len(hashes)} items of user {shown(user_id)}" if hashes else f"user {shown(user_id)}"
            typer.confirm(f"{_listed(would)}. Forget {what} for good?", abort=True, err=as_json)
        told = None if as_json else console

        def tell(step: str) -> None:
            if told is not None and step in {"report again", "audit"}:
                told.print(f"[dim]{step} …[/]")

        if hashes:
            result = forget_items(
                run, config, store, user_id, hashes, by=by or _operator(), rebuild=rebuild, tell=tell
            )
        else:
            result = forget_user(
                run, config, store, user_id, by=by or _operator(), rebuild=rebuild, tell=tell
            )
    _print_forgotten(console, run, result, as_json=as_json, dry_run=False)
    if not as_json:
        _print_outside(console, config, user_id, result.audit)
    if retrain:
        from milp_ray.pipeline import stages

        stages.personalize(run, config)
    elif hashes and not as_json:
        console.print(
            f"`milp-ray personalize {run.place}` trains the user again, from what remains", soft_wrap=True
        )


def audit(
    target: str,
    user_id: str | None,
    named: Sequence[str],
    *,
    all_forgotten: bool,
    also: Sequence[Path],
    as_json: bool,
) -> int:
    """Search the run and print the files that hold something; the exit code.

    Raises:
        MilpError: it is not said, or said twice, for whom.
    """
    if (user_id is None) == (not all_forgotten):
        raise MilpError("for whom? Give a user's id, or --all-forgotten")
    missing = [path for path in also if not path.is_dir()]
    if missing:
        raise MilpError(f"--also {missing[0]}: there is no such folder")
    run, config = _opened(target)
    store = run_store(run.store, config.personalize)
    store.check(writable=False)
    if user_id is None:
        found = audits.audit_forgotten(run, store, also)
    elif named:
        user = _user(run, config, user_id)
        hashes = set(resolve(named, user))
        own = [item for item in (items_of(user) if user is not None else ()) if item.sha256 in hashes]
        found = audits.audit_items(run, store, own, also, hashes=hashes)
    else:
        found = audits.audit_user(run, store, config.users, user_id, also=also)
    if as_json:
        _print_json(_audit_facts(found))
    else:
        _print_audit(table_console(), found)
    return 0 if found.is_clean else EXIT_FOUND


def items(target: str, user_id: str, *, as_json: bool) -> None:
    """Print a user's items: place, hash, time, length, and whether each is forgotten.

    Raises:
        MilpError: the users' files do not hold the user.
    """
    run, config = _opened(target)
    user = _user(run, config, user_id)
    record = Record(run.path)
    if user is None or record.is_forgotten(user_id):
        raise MilpError(f"there is no user {shown(user_id)} among the users of {run.place}")
    key = record.user_key(user_id)
    excluded = record.state.items.get(key, {})
    rows = [
        {
            "item": item.place,
            "sha256": item.sha256,
            "time": item.time,
            "characters": sum(map(len, item.texts)),
            "forgotten": record.item_key(key, item.sha256) in excluded,
        }
        for item in items_of(user)
    ]
    if as_json:
        _print_json({"user_id": user_id, "items": rows})
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("item", "sha256", "time", "characters", ""):
        table.add_column(name, justify="right" if name == "characters" else "left", no_wrap=True)
    for row in rows:
        mark = "forgotten" if row["forgotten"] else ""
        time = str(row["time"] or "")[:19].replace("T", " ")
        table.add_row(str(row["item"]), str(row["sha256"])[:16], time, str(row["characters"]), mark)
    table_console().print(table)


# ------------------------------------------------------------------------------------------------ internals


def _opened(target: str) -> tuple[RunFolder, Config]:
    from milp_ray.config_loader import load_config
    from milp_ray.rundir import place_of

    if Path(target).is_file():
        config = load_config(Path(target))
        return RunFolder.open(place_of(config)), config
    run = RunFolder.open(target)
    return run, run.config()


def _user(run: RunFolder, config: Config, user_id: str) -> User | None:
    return find_user(config.users, config.seed, user_id) or find_given(run, user_id)


def _rebuild(run: RunFolder) -> None:
    from milp_ray.report.stage import write_report

    write_report(run)


def _operator() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _consent_in_words(run: RunFolder, config: Config, user_id: str) -> str:
    record = Record(run.path)
    if record.is_forgotten(user_id):
        return f"there is no user {escape(shown(user_id))} in {run.place}"
    said = record.state.consent.get(record.user_key(user_id))
    if said is not None:
        how = "`milp-ray consent`" if said.source == "command" else "the users' file"
        return f"user {escape(shown(user_id))}: consent {said.state} since {said.time[:19]}, said by {how}"
    return (
        f"user {escape(shown(user_id))}: nothing is recorded; the users' file decides, and where that says "
        f"nothing consent is {config.users.consent} (users.consent)"
    )


def _listed(result: Forgotten) -> str:
    parts = [f"{removed.count:,} {removed.what}" for removed in result.removed if removed.count]
    return ", ".join(parts) or "nothing of this is in the run"


def _print_forgotten(
    console: Console, run: RunFolder, result: Forgotten, *, as_json: bool, dry_run: bool
) -> None:
    if as_json:
        counts = {one.what: {"count": one.count, "files": [*map(str, one.files)]} for one in result.removed}
        facts = {"dry_run": dry_run, "removed": counts, "line": result.line}
        _print_json({**facts, "audit": None if result.audit is None else _audit_facts(result.audit)})
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("would remove" if dry_run else "removed", "", "in"):
        table.add_column(name, justify="right" if not name else "left")
    for removed in result.removed:
        files = [
            str(path.relative_to(run.path)) if path.is_relative_to(run.path) else str(path)
            for path in removed.files
        ]
        where = ", ".join(files[:3]) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")
        table.add_row(removed.what, f"{removed.count:,}", escape(where))
    console.print(table)
    if result.remade_report:
        console.print("summary and report are made again from the other users' rows")
    if result.line is not None:
        console.print(f"signed off: line {result.line} of {Record(run.path).path}", soft_wrap=True)
    elif result.was_forgotten and not dry_run:
        console.print("these items were forgotten before")


def _print_outside(console: Console, config: Config, user_id: str, found: Audit | None) -> None:
    """What this command does not touch, and where the team must look itself."""
    if found is None:
        return
    _print_audit(console, found)
    console.print(
        "not touched, as they are not the run's: other runs, exports and copies of this one, backups and old "
        "versions of objects in a bucket, logs that you keep, and Ray's temporary folder (`milp-ray audit "
        "--also /tmp/ray` searches it)",
        soft_wrap=True,
    )


def _print_audit(console: Console, found: Audit) -> None:
    for where, kinds in found.found:
        console.print(f"[red]{escape(where)}:[/] {', '.join(kinds)}", soft_wrap=True)
    for where, why in found.unread:
        console.print(f"[red]{escape(where)}:[/] {why}", soft_wrap=True)
    if found.unfinished:
        console.print("[red]a forgetting was interrupted:[/] run `milp-ray forget` for that user again")
    line = f"searched {found.scan.n_files:,} files, {found.scan.n_bytes:,} bytes"
    for bucket in found.buckets:
        line += f", and {bucket.n_objects:,} objects, {bucket.n_bytes:,} bytes, of {escape(bucket.uri)}"
    line += ": nothing is left" if found.is_clean else f": [red]{len(found.found)} hold something[/]"
    console.print(line, soft_wrap=True)
    if found.n_cut_bytes:
        console.print(
            f"[yellow]the record ends in {found.n_cut_bytes} bytes of a line that was never finished[/] "
            "and does not count: what it was to say was not recorded; run that command again"
        )
    for path in found.sources:
        console.print(
            f"[yellow]{escape(str(path))} still holds the user:[/] it is yours to edit; this run leaves a "
            "forgotten user out, other runs do not",
            soft_wrap=True,
        )
    for why in found.unread_sources:
        console.print(
            f"[yellow]not known whether the user still stands here:[/] {escape(why)}", soft_wrap=True
        )


def _audit_facts(found: Audit) -> dict[str, Any]:
    return {
        "clean": found.is_clean,
        "files": found.scan.n_files,
        "bytes": found.scan.n_bytes,
        "objects": found.n_objects,
        "object_bytes": found.n_object_bytes,
        "found": [{"file": where, "what": list(kinds)} for where, kinds in found.found],
        "unread": [{"file": where, "why": why} for where, why in found.unread],
        "unfinished": int(found.unfinished),
        "record": {"lines": found.n_recorded, "cut_bytes": found.n_cut_bytes},
        "sources": [str(path) for path in found.sources],
        "unread_sources": found.unread_sources,
    }


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False))
