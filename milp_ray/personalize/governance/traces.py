"""The places in a run where something of a user lies, and taking it out of each without changing the rest.

Every function can be repeated: it finds what is left of an earlier, interrupted call. A file that others
share is written anew beside itself and renamed; lines and rows of others stay as they were, byte for byte and
value for value.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from milp_ray.atomic_files import write_bytes, write_json
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.id_places import is_of_run
from milp_ray.personalize.governance.needles import IdFinder
from milp_ray.personalize.governance.rewriting import Renamed, is_among, line_without, rewrite_table
from milp_ray.personalize.governance.scan import walk
from milp_ray.run_mirror import GOVERNANCE
from milp_ray.rundir import RunFolder

SCRATCH_PREFIXES = ("milp-ray-trial-",)  # folders of the system's temporary one that a trial keeps


@dataclass
class Removed:
    """What a step took away, or would: a count of things, and the files that it changed or removed."""

    what: str
    count: int = 0
    files: list[Path] = field(default_factory=list)

    def add(self, path: Path, count: int = 1) -> None:
        """Count something in a file."""
        self.count += count
        self.files.append(path)


def own_files(run: RunFolder, finder: IdFinder, dry_run: bool) -> Removed:
    """Files and folders that are filed under a hash of the id: checkpoints, caches, memory sets.

    Not by the id itself, which may be a name of the run's own, as "report" is.
    """
    removed = Removed("files of the user's own")
    for folder, folders, files in os.walk(run.path):
        _pass_over(run, Path(folder), folders)
        for name in [*folders, *files]:
            if finder.in_place(name):
                path = Path(folder, name)
                removed.add(path)
                if name in folders:
                    folders.remove(name)
                if not dry_run:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return removed


def temporary_files(run: RunFolder, dry_run: bool) -> Removed:
    """What writers that were killed left half-written, whoever it is about: nobody works on the run now."""
    removed = Removed("half-written files")
    found = [path for path in _files(run) if _is_temporary(path.name)]
    found += [path for path in abandoned_scratch() if path.is_dir()]
    for path in found:
        removed.add(path)
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return removed


def tables(run: RunFolder, finder: IdFinder, dry_run: bool, pseudonym: str | None = None) -> Removed:
    """Rows of Parquet files (scores, and parts of them) that are the user's, and what their metadata says.

    The pseudonym is for other users' rows that mention the id; ``None``: these stay. The search's trials are
    nobody's.
    """
    removed = Removed("rows")
    for path in _files(run):
        if path.suffix == ".parquet" and path != run.trials_file:
            count = rewrite_table(path, finder, pseudonym, dry_run)
            if count:
                removed.add(path, count)
    return removed


def lines(run: RunFolder, finder: IdFinder, dry_run: bool, pseudonym: str | None = None) -> Removed:
    """Lines of JSONL files that are the user's; the search's journal is not among them.

    The pseudonym is for other users' lines that mention the id; ``None``: these stay.
    """
    removed = Removed("lines")
    for path in _files(run):
        if path.suffix != ".jsonl" or path == run.journal:
            continue
        before = path.read_bytes().splitlines(keepends=True)
        after = [line_without(line, finder, pseudonym) for line in before]
        count = sum(old != new for old, new in zip(before, after, strict=True))
        if count:
            removed.add(path, count)
            if not dry_run:
                write_bytes(path, b"".join(line for line in after if line is not None))
    return removed


def facts(run: RunFolder, finder: IdFinder, pseudonym: str, dry_run: bool) -> Removed:
    """The id in values of JSON files, where the pseudonym takes its place, and in maps by users."""
    removed = Removed("mentions")
    for path in _files(run):
        if path.suffix != ".json":
            continue
        try:
            data = json.loads(path.read_bytes())
        except ValueError:
            continue
        is_own = is_of_run(path.relative_to(run.path).as_posix())
        renamed = Renamed(finder, pseudonym, is_own=is_own)
        changed = renamed.apply(data)
        if renamed.count:
            removed.add(path, renamed.count)
            if not dry_run:
                write_json(path, changed)
    return removed


def dataset_hashes(run: RunFolder, dry_run: bool) -> Removed:
    """The hash of all users' data together, this one's too; the next stage that reads users makes it anew."""
    removed = Removed("hashes of all data")
    recorded = run.facts()
    parts = [part for part in (recorded, recorded.get("batch_users") or {}) if part.get("dataset_hash")]
    if parts:
        removed.add(run.versions_file, len(parts))
        for part in parts:
            part["dataset_hash"] = None
        if not dry_run:
            write_json(run.versions_file, recorded)
    return removed


def leakage_audit(run: RunFolder, finder: IdFinder, dry_run: bool) -> Removed:
    """The leakage audit, where the user was among the audited ones; it can be repeated with the others.

    It goes as a whole: with the others' values beside it, its means would tell the user's own.
    """
    removed = Removed("leakage audits")
    if run.leakage_file.is_file() and is_among(run.leakage_file.read_bytes(), finder):
        removed.add(run.leakage_file)
        if not dry_run:
            run.leakage_file.unlink()
    return removed


def search_values(run: RunFolder, place: int | None, dry_run: bool) -> Removed:
    """A probe user's own values in the journal, and Tune's files; the means over all probe users stay.

    Args:
        run: the run.
        place: of the user among the probe users, in their order; ``None``: is none of them.
        dry_run: count only.
    """
    from milp_ray.search.journal import read_events, replay

    removed = Removed("values in the search")
    if place is None:
        return removed
    events = read_events(run.journal)
    changed = [without_place(event, place) for event in events]
    count = sum(before != after for before, after in zip(events, changed, strict=True))
    if count:
        replay(changed, run.journal)  # a journal that could not be read afterwards is never written
        removed.add(run.journal, count)
        if not dry_run:
            told = (json.dumps(event, allow_nan=False, separators=(",", ":")) for event in changed)
            write_bytes(run.journal, "".join(line + "\n" for line in told).encode("utf-8"))
    tune = run.study / "tune"
    if tune.is_dir():
        removed.add(tune, sum(1 for _ in walk(tune)))
        if not dry_run:
            shutil.rmtree(tune)
    return removed


def without_place(event: dict[str, Any], place: int) -> dict[str, Any]:
    """An event with ``null`` for the values of one probe user; the others keep their places."""

    def blanked(values: Any) -> Any:
        if not isinstance(values, list) or len(values) <= place:
            return values
        return [*values[:place], None, *values[place + 1 :]]

    changed = dict(event)
    metrics = event.get("metrics")
    if isinstance(metrics, dict) and isinstance(metrics.get("per_user"), dict):
        by_user = {name: blanked(values) for name, values in metrics["per_user"].items()}
        changed["metrics"] = {**metrics, "per_user": by_user}
    values = event.get("values")
    if isinstance(values, dict):
        changed["values"] = {n: blanked(v) if n.endswith("_by_user") else v for n, v in values.items()}
    return changed


def pages(run: RunFolder, dry_run: bool) -> Removed:
    """The report, the summary and the comparison of methods, which hold the user's part in means and weights.

    They are made again from what is left.
    """
    removed = Removed("pages and figures")
    folders = [run.report, run.compare]
    for path in [*(path for folder in folders if folder.is_dir() for path in walk(folder)), run.summary_file]:
        if path.is_file():
            removed.add(path)
    if dry_run:
        return removed
    run.summary_file.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise MilpError(f"{folder} cannot be removed; change its permissions and run the command again")
    return removed


def abandoned_scratch() -> Iterator[Path]:
    """Folders of trials under the system's temporary one whose process is gone."""
    for prefix in SCRATCH_PREFIXES:
        for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            pid = path.name.removeprefix(prefix).partition("-")[0]
            if (
                pid.isdecimal()
                and path.is_dir()
                and path.stat().st_uid == os.getuid()
                and not psutil.pid_exists(int(pid))
            ):
                yield path


# ------------------------------------------------------------------------------------------------ internals


def _files(run: RunFolder) -> Iterator[Path]:
    """The run's files but the store's, which has its own ways, and the record."""
    for folder, folders, files in os.walk(run.path):
        _pass_over(run, Path(folder), folders)
        yield from (Path(folder, name) for name in sorted(files) if not Path(folder, name).is_symlink())


def _pass_over(run: RunFolder, folder: Path, folders: list[str]) -> None:
    for name in (run.adapters.name, GOVERNANCE):
        if folder == run.path and name in folders:
            folders.remove(name)


def _is_temporary(name: str) -> bool:
    return name.endswith(".part") or (name.startswith(".") and name.endswith(".tmp"))
