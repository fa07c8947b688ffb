"""A run folder that lives in a bucket: commands work on a copy on this machine, which is kept the same.

The copy is under ``$MILP_MIRRORS`` (``~/.cache/milp_ray/runs`` unless set). What is newer in the bucket is
brought when a run is opened; what changed here is taken there every few seconds while a command holds the
run, and at its end; what is said of a person, at once. A command that was killed loses nothing on the same
machine, unless the record of people changed in the bucket meanwhile: what was not taken there may be about
somebody who was forgotten, and is removed. On another machine it loses what was not taken yet, at most
:data:`PUSH_SECONDS`. Adapters have no copy: the store writes them to the bucket.

A lease in the bucket (:mod:`milp_ray.run_lease`) keeps two machines from working on one run. A process that
has lost it takes nothing there any more, and ends with an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from milp_ray.atomic_files import write_bytes, write_json
from milp_ray.buckets import Bucket
from milp_ray.errors import MilpError
from milp_ray.held_file import held_file
from milp_ray.run_lease import LEASE, Lease, LeaseLostError

ADAPTERS = "adapters"  # of the store, which writes to the bucket itself
GOVERNANCE = "governance"  # what must not be forgotten about people when a run starts over
PUSH_SECONDS = 10.0
_MIRRORS = "MILP_MIRRORS"
LOCK = ".lock"
VERSIONS = "versions.json"
MARKER = "milp_ray"  # the key of it by which a run is known
INDEX = ".mirror.json"  # what the bucket and the copy were like when they were last the same
_HEAD = f"{GOVERNANCE}/head"  # changes with every line of the record
_RECORD = (f"{GOVERNANCE}/records.jsonl", _HEAD, f"{GOVERNANCE}/key")  # as a reader may find them, one by one
logger = logging.getLogger("milp_ray")

# Of this machine alone: locks, temporary files, and Tune's own state, which nothing is resumed from.
_LOCAL_FILES = (LOCK, INDEX, LEASE)
_LOCAL_FOLDERS = (ADAPTERS, "study/tune")
_OWNER_ALONE, _FOLDER_OF_OWNER = 0o600, 0o700

_held: dict[Path, Mirror] = {}  # what this process holds, by the copy's folder


def mirror_folder(uri: str) -> Path:
    """Where the copy of a run in a bucket is on this machine; its last part is the run's name."""
    root = os.environ.get(_MIRRORS) or Path.home() / ".cache" / "milp_ray" / "runs"
    name = urlsplit(uri).path.rstrip("/").rpartition("/")[2]
    if not name:
        raise MilpError(f"{uri} names no run; write s3://BUCKET/RUNS/NAME")
    return Path(root) / hashlib.sha256(uri.encode("utf-8")).hexdigest()[:16] / name


def is_run(versions: str | bytes) -> bool:
    """Whether what stands in a ``versions.json`` is of a run."""
    try:
        found = json.loads(versions)
    except ValueError:
        return False
    return isinstance(found, dict) and MARKER in found


def is_run_in(bucket: Bucket) -> bool:
    """Whether the root of a bucket's URI is a run. Raises ``MilpError`` where the bucket cannot be read."""
    try:
        return is_run(bucket.read(f"{bucket.root}/{VERSIONS}"))
    except FileNotFoundError:
        return False


def push_now(folder: Path) -> None:
    """Take what changed in a run's folder to its bucket, where this process holds such a run; else nothing.

    Raises:
        MilpError: the bucket cannot be written, or another machine works on the run.
    """
    mirror = _held.get(folder)
    if mirror is not None:
        mirror.push()


class Mirror:
    """A run in a bucket and its copy.

    Args:
        uri: of the run: ``s3://BUCKET/RUNS/NAME`` or ``gs://…``, as a store's.

    Raises:
        MilpError: the URI has an unknown option, or names no run.
    """

    def __init__(self, uri: str) -> None:
        self.folder = mirror_folder(uri)
        self._bucket = Bucket(uri, "run")
        self._lease = Lease(self._bucket)
        self._pushing = threading.Lock()

    def pull(self) -> None:
        """Bring what changed in the bucket since the two were last the same.

        What is newer here, because a command was killed before it could take it there, stays. While a process
        of this machine holds the run nothing is brought: its copy is the newest, and its files are open.

        Raises:
            MilpError: the bucket cannot be read, or what is there is no run.
        """
        if not self.folder.is_dir():
            self._bring()
            return
        with held_file(self.folder / LOCK) as is_free:
            if is_free:
                self._bring()

    def make_folder(self) -> None:
        """Make the copy's folder where it is missing, for its owner alone."""
        own = self.folder.parent
        # (Where the copies of all runs go may be somebody else's folder: only what is made here is closed.)
        own.parent.mkdir(mode=_FOLDER_OF_OWNER, parents=True, exist_ok=True)
        own.mkdir(exist_ok=True)
        own.chmod(_FOLDER_OF_OWNER)
        self.folder.mkdir(exist_ok=True)

    def _check_is_run(self) -> None:
        """Look whether what the URI names is a run, before anything is brought.

        A URI that stops short of the run's name is that of other runs with their adapters, and one of users'
        files that of their histories. What an earlier run of the name left about people is let through.

        Raises:
            MilpError: it is none.
        """
        try:
            if is_run((self.folder / VERSIONS).read_bytes()):
                return  # as the copy says
        except (FileNotFoundError, NotADirectoryError):
            pass
        if is_run_in(self._bucket):
            return
        names = {info.base_name for info in self._bucket.list(self._bucket.root)}
        if others := sorted(names - {GOVERNANCE, LEASE, LOCK}):
            raise MilpError(
                f"{self._bucket.shown} is not a run folder: it has no {VERSIONS} of milp_ray, and holds "
                f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''}; give a run as "
                "s3://BUCKET/RUNS/NAME, or choose another name=… or output_dir=… for a new one"
            )

    def _bring(self) -> None:
        self._check_is_run()
        index, there = self._index(), self._there()
        if there:
            self.make_folder()
        if self.folder.is_dir() and self._record_changed(index, there):
            index = self._without_unpushed(index)
        if _HEAD in there:
            (self.folder / GOVERNANCE).mkdir(parents=True, exist_ok=True)
            (self.folder / GOVERNANCE).chmod(_FOLDER_OF_OWNER)
        for name, mark in there.items():
            if index.get(name, {}).get("there") != mark:
                try:
                    content = self._bucket.read(self._path(name))
                except FileNotFoundError:
                    continue  # removed since it was listed: the next look sees that
                if len(content) != int(mark.partition("-")[0]):
                    continue  # replaced while it was read: what is here stays until the next look
                write_bytes(self.folder / name, content, mode=_OWNER_ALONE if _is_of_record(name) else None)
                index[name] = {"there": mark, "here": _mark(self.folder / name)}
        for name in index.keys() - there.keys():
            (self.folder / name).unlink(missing_ok=True)
            del index[name]
        if there or self.folder.is_dir():
            self._write_index(index)

    def _record_changed(self, index: dict[str, dict[str, Any]], there: dict[str, str]) -> bool:
        """Whether the bucket has lines about people that the copy has not, or has lost some."""
        if there.get(_HEAD) == index.get(_HEAD, {}).get("there"):
            return False
        try:  # a process that was killed may have taken it there itself, and not noted that
            return self._bucket.read(self._path(_HEAD)) != (self.folder / _HEAD).read_bytes()
        except FileNotFoundError:
            return True

    def _without_unpushed(self, index: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Remove what is not as it is in the bucket, but for the record; the index of what is left."""
        here = self._here()
        left = {
            name: marks
            for name, marks in index.items()
            if _is_of_record(name) or here.get(name) == marks["here"]
        }
        self._write_index(left)  # first: what is in the index and not here is taken for removed by a command
        unpushed = sorted(name for name in here if name not in left and not _is_of_record(name))
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.folder).as_posix()
                if name not in left and name not in _LOCAL_FILES and not _is_of_record(name):
                    path.unlink(missing_ok=True)
        if unpushed:
            logger.warning(
                "%d files in %s were not in the bucket yet and are removed: the record of people has changed "
                "there, and they may be about somebody who was forgotten",
                len(unpushed),
                self.folder,
            )
        return left

    def push(self) -> None:
        """Take what changed here to the bucket, and remove there what was removed here.

        The caller holds the run. The record of people goes last: what it says was done is done there by then.

        Raises:
            MilpError: the bucket cannot be written, or another machine works on the run.
        """
        with self._pushing:
            index, here = self._index(), self._here()
            removed = sorted(index.keys() - here.keys())
            for name in removed:
                self._lease.check()
                self._bucket.delete_file(self._path(name))
                del index[name]
            changed = [name for name, mark in here.items() if index.get(name, {}).get("here") != mark]
            for name in sorted(changed, key=_turn):
                try:
                    content = (self.folder / name).read_bytes()
                except FileNotFoundError:
                    continue  # replaced or removed meanwhile: the next push sees what became of it
                self._lease.check()
                self._bucket.write(self._path(name), content)
            if changed or removed:
                there = self._there()
                self._lease.check()  # what was listed is what this process wrote
                index |= {
                    name: {"there": there[name], "here": here[name]} for name in changed if name in there
                }
                self._write_index(index)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process, and push while the block lasts and at its end.

        Raises:
            MilpError: another machine works on the run, at the begin or later, when the block is interrupted;
                or the bucket cannot be written.
        """
        with self._lease.held():
            self._bring()  # what changed between the opening and now
            self._lease.check()
            stop = threading.Event()
            thread = threading.Thread(target=self._keep_pushing, args=(stop,), name="mirror", daemon=True)
            thread.start()
            _held[self.folder] = self
            try:
                yield
            finally:
                del _held[self.folder]
                stop.set()
                thread.join()
                self.push()

    def holder(self) -> dict[str, Any] | None:
        """Which process works on the run: its host and pid among others; ``None``: none does."""
        return self._lease.holder()

    def remove(self, keep: Collection[str]) -> None:
        """Remove the run from the bucket, adapters included, but for ``keep``; the copy stays.

        Raises:
            MilpError: the bucket cannot be written, or another machine works on the run.
        """
        there = self._bucket.list(self._bucket.root)
        # What marks it as a run goes last, so that an interrupted removal can be repeated from anywhere.
        for info in sorted(there, key=lambda info: info.base_name == VERSIONS):
            if info.base_name in keep or info.base_name == LEASE:
                continue
            self._lease.check()
            if info.is_file:
                self._bucket.delete_file(info.path)
            else:
                self._bucket.delete_folder(info.path)

    def _keep_pushing(self, stop: threading.Event) -> None:
        """Push from time to time; the end of the command tells of a bucket that is still away then."""
        while not stop.wait(PUSH_SECONDS):
            try:
                self.push()
            except LeaseLostError:
                return  # who renews it tells
            except MilpError as error:
                logger.warning("%s", error)

    def _there(self) -> dict[str, str]:
        """The run's files in the bucket, less the store's, and a mark that changes with each.

        The providers' listings tell times by the second: of two versions of one length within a second the
        mark is the same. Machines take turns far more slowly than that.
        """
        files = {}
        for first in self._bucket.list(self._bucket.root):
            inside = [first] if first.is_file else []
            if not first.is_file and first.base_name != ADAPTERS:
                inside = self._bucket.list(first.path, recursive=True)
            for info in inside:
                name = info.path[len(self._bucket.root) + 1 :]
                if info.is_file and _is_shared(name):
                    files[name] = f"{info.size}-{info.mtime.timestamp() if info.mtime else 0:.6f}"
        return files

    def _here(self) -> dict[str, str]:
        """The copy's files and a mark that changes with each."""
        files = {}
        for folder, folders, names in os.walk(self.folder):
            inside = os.path.relpath(folder, self.folder)
            prefix = "" if inside == "." else f"{Path(inside).as_posix()}/"
            folders[:] = [name for name in folders if prefix + name not in _LOCAL_FOLDERS]
            for name in names:
                if _is_shared(prefix + name) and (mark := _mark(Path(folder, name))) is not None:
                    files[prefix + name] = mark
        return files

    def _path(self, name: str) -> str:
        return f"{self._bucket.root}/{name}"

    def _index(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}  # everything is compared anew
        return dict(found)

    def _write_index(self, index: dict[str, dict[str, Any]]) -> None:
        write_json(self.folder / INDEX, index)


def _is_shared(name: str) -> bool:
    last = name.rpartition("/")[2]
    is_temporary = last.startswith(".") and last.endswith(".tmp")
    return name not in _LOCAL_FILES and not is_temporary and not name.startswith(_LOCAL_FOLDERS)


def _turn(name: str) -> int:
    """When a file is taken to the bucket: what marks a run first; the record last, in its order."""
    if name == VERSIONS:
        return -2
    return _RECORD.index(name) if name in _RECORD else -1


def _is_of_record(name: str) -> bool:
    return name.startswith(f"{GOVERNANCE}/")


def _mark(path: Path) -> str | None:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return f"{facts.st_size}-{facts.st_mtime_ns}"
