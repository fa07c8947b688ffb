"""What the commands of ``milp-ray store`` that only look print; ids and numbers only, never a user's text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from milp_ray.buckets import Bucket, is_bucket_uri
from milp_ray.errors import MilpError
from milp_ray.outcome import layers_text
from milp_ray.personalize.store import AdapterStore, run_store, shown, survey
from milp_ray.personalize.store.encryption import KeySource
from milp_ray.run_mirror import is_run_in
from milp_ray.rundir import RunFolder
from milp_ray.table_console import table_console

if TYPE_CHECKING:
    from milp_ray.config import Config
    from milp_ray.personalize.store import Manifest

EXIT_DAMAGED = 3
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Opened:
    """A store, and the run that it belongs to with its configuration, where it was named by one."""

    store: AdapterStore
    config: Config | None
    run: RunFolder | None = None


def opened(target: str, key_env: str | None = None, key_file: Path | None = None) -> Opened:
    """The store that a command names.

    Args:
        target: a run folder, by path or URI, a configuration file, or a store's folder or URI.
        key_env: the variable with the key, in place of the configured one.
        key_file: the file with the key, in place of the configured one.

    Raises:
        MilpError: there is nothing there; the key is named twice.
    """
    from milp_ray.config_loader import load_config

    if key_env is not None and key_file is not None:
        raise MilpError("--key-env and --key-file name two keys; leave one of them out")
    key = None
    if key_env is not None:
        key = KeySource("variable", key_env)
    elif key_file is not None:
        key = KeySource("file", str(key_file))
    path, config, run = Path(target), None, None
    if "://" not in target and path.is_file():
        config = load_config(path)
        run = RunFolder.of(config)
    elif "://" not in target and RunFolder(path).is_run():
        run = RunFolder(path)
        config = run.config()
    elif is_bucket_uri(target) and is_run_in(Bucket(target, "store")):
        run = RunFolder.at(target)
        config = run.config()
    elif "://" not in target and not path.is_dir():
        raise MilpError(
            f"{target}: there is no such run folder, configuration file or store; give one of them, or "
            "s3://BUCKET/… or gs://BUCKET/…"
        )
    if config is None or run is None:
        store = AdapterStore(target, key=key)
    else:
        store = run_store(run.store, config.personalize)
        if key is not None:
            store = AdapterStore(store.uri, precision=store.precision, key=key, retention=store.retention)
    store.check(writable=False)
    return Opened(store, config, run)


# ------------------------------------------------------------------------------------------------- looking


def print_list(opened: Opened, *, limit: int, as_json: bool = False) -> None:
    """Print users with the versions they have and facts of the current one."""
    entries = survey.entries(opened.store)
    some = list(islice(entries, limit))
    if as_json:
        _print_json({"store": opened.store.uri, "users": [_entry_facts(entry) for entry in some]})
        return
    table = _table(f"Adapters in {escape(opened.store.uri)}")
    for name in ("user", "versions", "layers", "rank", "stored as", "size", "made"):
        table.add_column(name, justify="right" if name in {"rank", "size"} else "left", no_wrap=True)
    for entry in some:
        numbers = ", ".join(map(str, entry.versions[-5:]))
        if len(entry.versions) > 5:
            numbers = f"{len(entry.versions)}: … {numbers}"
        manifest = entry.manifest
        if manifest is None:
            table.add_row(escape(entry.name), numbers, "[red]damaged[/]", "", "", "", "")
            continue
        table.add_row(
            escape(entry.name),
            numbers,
            layers_text(manifest.layout),
            str(manifest.layout.rank),
            _stored_as(manifest),
            size(manifest.n_bytes),
            manifest.created[:19].replace("T", " "),
        )
    console = table_console()
    console.print(table)
    # Counting the others would read a manifest each: whether there is one more is enough.
    if len(some) == limit and next(entries, None) is not None:
        console.print("… and more (--limit shows them)")
    if not some:
        console.print("no user has an adapter here")


def print_user(opened: Opened, user_id: str, version: int | None, *, as_json: bool = False) -> None:
    """Print a manifest, and the numbers of the user's versions.

    Raises:
        AdapterMissingError: the user has no adapter.
    """
    store = opened.store
    manifest, versions = store.manifest(user_id, version=version), store.versions(user_id)
    if as_json:
        facts = _manifest_facts(manifest)
        _print_json({"store": store.uri, "versions": versions, **facts, "meta": dict(manifest.meta)})
        return
    table = Table(
        title=f"Adapter of {escape(shown(user_id))}", title_justify="left", box=None, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    lines = [
        ("version", f"{manifest.version} of {', '.join(map(str, versions))}"),
        ("layers", f"{layers_text(manifest.layout)}, rank {manifest.layout.rank}"),
        ("stored as", _stored_as(manifest)),
        ("made", manifest.created),
        ("made from", manifest.fingerprint),
    ]
    lines += [(name, str(value)) for name, value in (manifest.retention or {}).items() if value is not None]
    for name, value in manifest.precision.items():
        if name != "name":
            lines.append((name.replace("_", " "), f"{value:.3g} by rounding to {manifest.precision['name']}"))
    lines += [
        (name, f"{size(described['bytes'])}, SHA-256 {described['sha256']}")
        for name, described in manifest.files.items()
    ]
    lines += [
        (name.replace("_", " "), json.dumps(value, ensure_ascii=False))
        for name, value in manifest.meta.items()
        if name not in {"curve", "made_from"}
    ]
    for name, value in lines:
        table.add_row(escape(name), escape(value))
    table_console().print(table)


def print_verification(opened: Opened, user_ids: Sequence[str] | None, *, as_json: bool = False) -> int:
    """Check every version; print the problems and the counts. The exit code."""
    store, found = opened.store, survey.Findings()
    problems = []
    console = table_console()
    for who, what in survey.verify_store(store, found, user_ids=user_ids):
        problems.append({"user": who, "problem": what})
        if not as_json:
            console.print(f"[red]{escape(who)}:[/] {escape(what)}", soft_wrap=True)
    if as_json:
        _print_json({"store": store.uri, **asdict(found), "problems": problems})
    else:
        line = f"{found.versions:,} versions of {found.users:,} users, {size(found.n_bytes)}: "
        line += f"[red]{found.damaged:,} damaged[/]" if found.damaged else "all as they were published"
        if found.unfinished:
            line += f"; {found.unfinished:,} unfinished"
        console.print(line)
        if found.in_the_clear:
            console.print(
                f"[yellow]{found.in_the_clear:,} versions are not encrypted[/], though a key is given: "
                "`milp-ray store rewrite` and `milp-ray store gc --keep 1`"
            )
    return EXIT_DAMAGED if found.damaged else 0


def print_precisions(opened: Opened, n_users: int, *, as_json: bool = False) -> None:
    """Measure each precision on a run's users who may be served, without what they had forgotten, and print.

    Raises:
        MilpError: the store was not named by its run; no user can be measured.
    """
    from milp_ray.personalize.governance.consent import Gate
    from milp_ray.personalize.governance.record import Record
    from milp_ray.personalize.store.precision_loss import measure_precisions
    from milp_ray.training.base import load_base
    from milp_ray.users.readers import read_users
    from milp_ray.users.splits import split_user

    config, run = opened.config, opened.run
    if config is None or run is None:
        raise MilpError(
            f"measuring needs the run's base and users, and {opened.store.uri} does not say which they are; "
            "give the run folder"
        )
    gate = Gate(Record(run.path), config.users.consent)
    users = gate.admit(read_users(config.users, config.seed).users)
    splits = (gate.trimmed(split_user(user, config.users.split)) for user in users)
    rows = measure_precisions(opened.store, load_base(config.base), splits, config.prompt, n_users)
    if as_json:
        _print_json({"store": opened.store.uri, "precisions": [asdict(row) for row in rows]})
        return
    table = _table(f"Precisions, on {rows[0].n_users} users' validation examples")
    for name in ("stored as", "a user", "error: relative", "mean", "max", "loss", "difference", "largest"):
        table.add_column(name, justify="left" if name == "stored as" else "right", no_wrap=True)
    for row in rows:
        errors = [f"{value:.2g}" for value in (row.relative_error, row.mean_error, row.max_error)]
        losses = [
            f"{row.validation_loss:.5f}",
            f"{row.loss_difference:+.1e}",
            f"{row.largest_loss_difference:+.1e}",
        ]
        table.add_row(row.precision, size(row.bytes_a_user), *errors, *losses)
    table_console().print(table)
    table_console().print(
        "[dim]loss in nats a token, its difference to the adapters as they are stored now[/]"
    )


# --------------------------------------------------------------------------------------------- how it looks


def size(n_bytes: float) -> str:
    """Bytes in the unit that keeps the number short."""
    value, unit = float(n_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.0f} {_UNITS[0]}" if unit == 0 else f"{value:,.1f} {_UNITS[unit]}"


def _stored_as(manifest: Manifest) -> str:
    name = str(manifest.precision["name"])
    return name if manifest.key_id is None else f"{name}, key {manifest.key_id}"


def _entry_facts(entry: survey.Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {"hash": entry.place, "versions": list(entry.versions), "problem": entry.problem}
    return facts if entry.manifest is None else {**facts, **_manifest_facts(entry.manifest)}


def _manifest_facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "user_id": None if manifest.is_sealed else manifest.user_id,
        "version": manifest.version,
        "layout": manifest.layout.to_dict(),
        "fingerprint": manifest.fingerprint or None,
        "created": manifest.created,
        "precision": dict(manifest.precision),
        "key_id": manifest.key_id,
        "retention": None if manifest.retention is None else dict(manifest.retention),
        "files": {name: dict(described) for name, described in manifest.files.items()},
    }


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=True, allow_nan=False))
