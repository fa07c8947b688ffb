"""A run folder that lives in a bucket: commands work on a copy on this machine, which is kept the same.

The copy is under ``$MILP_MIRRORS`` (``~/.cache/milp_ray/runs`` unless set). What is newer in the bucket is
brought when a run is opened; what changed here is taken there every few seconds while a command holds the
run, and at its end. A command that was killed loses nothing on the same machine; on another one it loses what
was not taken yet, at most :data:`PUSH_SECONDS`. Adapters have no copy: the store writes them to the bucket.

A lease in the bucket keeps two machines from working on one run. It is renewed with every push and runs out
by itself, so that a machine that is lost stands in nobody's way for long. (Two that take it in the very same
moment may both believe that they have it: pyarrow cannot write on a condition.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from milp_ray.atomic_files import write_bytes, write_json
from milp_ray.buckets import Bucket
from milp_ray.errors import MilpError
from milp_ray.held_file import held_file

ADAPTERS = "adapters"  # of the store, which writes to the bucket itself
PUSH_SECONDS = 10.0
_LEASE_SECONDS = 60.0  # without renewal, after which another machine may take a run up
_MIRRORS = "MILP_MIRRORS"
LOCK = ".lock"
INDEX = ".mirror.json"  # what the bucket and the copy were like when they were last the same
_LEASE, _LEASE_LENGTH = "lease.json", 512
logger = logging.getLogger("milp_ray")

# Of this machine alone: locks, temporary files, and Tune's own state, which nothing is resumed from.
_LOCAL_FILES = (LOCK, INDEX, _LEASE)
_LOCAL_FOLDERS = (ADAPTERS, "study/tune")


def mirror_folder(uri: str) -> Path:
    """Where the copy of a run in a bucket is on this machine; its last part is the run's name."""
    root = os.environ.get(_MIRRORS) or Path.home() / ".cache" / "milp_ray" / "runs"
    name = urlsplit(uri).path.rstrip("/").rpartition("/")[2]
    if not name:
        raise MilpError(f"{uri} names no run; write s3://BUCKET/RUNS/NAME")
    return Path(root) / hashlib.sha256(uri.encode("utf-8")).hexdigest()[:16] / name


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
        self._pushing = threading.Lock()

    def pull(self) -> None:
        """Bring what changed in the bucket since the two were last the same.

        What is newer here, because a command was killed before it could take it there, stays. While a process
        of this machine holds the run nothing is brought: its copy is the newest, and its files are open.

        Raises:
            MilpError: the bucket cannot be read.
        """
        if not self.folder.is_dir():
            self._bring()
            return
        with held_file(self.folder / LOCK) as is_free:
            if is_free:
                self._bring()

    def _bring(self) -> None:
        index = self._index()
        there = {name: mark for name, mark in self._there().items() if name != _LEASE}
        for name, mark in there.items():
            if index.get(name, {}).get("there") != mark:
                try:
                    content = self._bucket.read(self._path(name))
                except FileNotFoundError:
                    continue  # removed since it was listed: the next look sees that
                if len(content) != int(mark.partition("-")[0]):
                    continue  # replaced while it was read: what is here stays until the next look
                write_bytes(self.folder / name, content)
                index[name] = {"there": mark, "here": _mark(self.folder / name)}
        for name in index.keys() - there.keys():
            (self.folder / name).unlink(missing_ok=True)
            del index[name]
        if there or self.folder.is_dir():
            self._write_index(index)

    def push(self) -> None:
        """Take what changed here to the bucket, and remove there what was removed here.

        Raises:
            MilpError: the bucket cannot be written.
        """
        with self._pushing:
            index, here = self._index(), self._here()
            changed = [name for name, mark in here.items() if index.get(name, {}).get("here") != mark]
            for name in changed:
                try:
                    content = (self.folder / name).read_bytes()
                except FileNotFoundError:
                    continue  # replaced or removed meanwhile: the next push sees what became of it
                self._bucket.write(self._path(name), content)
            removed = sorted(index.keys() - here.keys())
            for name in removed:
                self._bucket.delete_file(self._path(name))
                del index[name]
            if changed or removed:
                there = self._there()
                index |= {
                    name: {"there": there[name], "here": here[name]} for name in changed if name in there
                }
                self._write_index(index)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process, and push while the block lasts and at its end.

        Raises:
            MilpError: another machine works on the run, or the bucket cannot be written.
        """
        self._check_free()
        self._renew()
        self._check_free()  # another machine may have taken it in the same moment
        self._bring()  # what changed between the opening and now
        stop = threading.Event()
        thread = threading.Thread(target=self._keep_pushing, args=(stop,), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.push()
            self._bucket.delete_file(self._path(_LEASE))

    def _check_free(self) -> None:
        holder = self.holder()
        if holder is not None and holder != _me():
            raise MilpError(
                f"another milp-ray process works on {self._bucket.shown} (on {holder['host']}); wait for it, "
                f"or choose another name=…. Of a machine that was lost, the run is free after "
                f"{_LEASE_SECONDS:.0f} s"
            )

    def holder(self) -> dict[str, Any] | None:
        """Which process works on the run: its host and pid; ``None``: none does."""
        try:
            lease = json.loads(self._bucket.read(self._path(_LEASE)))
            holder, renewed = {"host": lease["host"], "pid": lease["pid"]}, float(lease["time"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if time.time() - renewed > _LEASE_SECONDS:
            return None
        if holder["host"] == socket.gethostname() and not psutil.pid_exists(int(holder["pid"])):
            return None
        return holder

    def remove(self, keep: Collection[str]) -> None:
        """Remove the run from the bucket, adapters included, but for ``keep``; the copy stays."""
        for info in self._bucket.list(self._bucket.root):
            if info.base_name in keep:
                continue
            if info.is_file:
                self._bucket.delete_file(info.path)
            else:
                self._bucket.delete_folder(info.path)

    def _keep_pushing(self, stop: threading.Event) -> None:
        """Push from time to time; the end of the command tells of a bucket that is still away then."""
        while not stop.wait(PUSH_SECONDS):
            try:
                self._renew()
                self.push()
            except MilpError as error:
                logger.warning("%s", error)

    def _renew(self) -> None:
        # Always of one length: a reader asks for the length first, and may meet two versions.
        text = json.dumps({**_me(), "time": time.time()}).ljust(_LEASE_LENGTH)
        self._bucket.write(self._path(_LEASE), text.encode("utf-8"))

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


def _mark(path: Path) -> str | None:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}
