"""The folder that holds everything one configuration produced: made, continued, opened, held and removed.

What is where in it is in :mod:`milp_ray.run_paths`, what a rerun may change in :mod:`milp_ray.resumption`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import write_json, write_text
from milp_ray.buckets import child_uri, is_bucket_uri
from milp_ray.errors import MilpError
from milp_ray.held_file import held_file, last_holder
from milp_ray.resumption import differences
from milp_ray.run_mirror import GOVERNANCE, INDEX, LOCK, MARKER, Mirror
from milp_ray.run_paths import RunPaths

if TYPE_CHECKING:
    from milp_ray.config import Config


@dataclass(frozen=True)
class RunFolder(RunPaths):
    """The folder of a run, and the few files in it that belong to no stage."""

    @classmethod
    def at(cls, place: Path | str) -> RunFolder:
        """A folder of this machine, or by URI one in a bucket, of which the copy here is brought up to date.

        Raises:
            MilpError: the bucket cannot be read, or what is there is no run.
        """
        if not is_bucket_uri(place):
            return cls(Path(place))
        mirror = Mirror(str(place))
        mirror.pull()
        return cls(mirror.folder, str(place))

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Where a configuration's run is, or will be. Raises as :meth:`at`."""
        return cls.at(place_of(config))

    def refresh(self) -> None:
        """Bring the copy of a run in a bucket up to date; of a folder here there is nothing to bring."""
        if self.uri is not None:
            Mirror(self.uri).pull()

    def is_held(self) -> bool:
        """Whether some process works on the run."""
        return self.holder() is not None

    def holder(self) -> dict[str, Any] | None:
        """The process that works on the run, as it told of itself; ``None``: none does."""
        if self.uri is not None:
            return Mirror(self.uri).holder()
        try:
            with self.lock():
                return None
        except MilpError:
            return last_holder(self.path / LOCK)

    # ------------------------------------------------------------------------------- making and opening

    @classmethod
    def create(cls, config: Config, *, fresh: bool = False, at: Path | str | None = None) -> RunFolder:
        """The folder of a configuration, new or continued.

        Args:
            config: is written into the folder.
            fresh: remove an existing run first.
            at: the folder or URI; ``None``: ``output_dir/name``.

        Raises:
            MilpError: the folder holds a run of a different configuration (the differing keys are named), or
                something that is no run at all; another process works on the run.
        """
        from milp_ray.config_loader import dump_config
        from milp_ray.versions import versions

        run = cls.of(config) if at is None else cls.at(at)
        stores = run.other_stores()
        if fresh:
            run.remove(keep=(GOVERNANCE,))
        if run.path.exists() and not run.path.is_dir():
            raise MilpError(f"{run.path} is a file; choose another name=… or output_dir=…")
        if not run.config_file.exists() and run._holds_something_else():
            raise MilpError(
                f"{run.path} exists and is no run folder of milp_ray; choose another name=… or output_dir=…"
            )
        if run.uri is not None:
            Mirror(run.uri).make_folder()
        run.path.mkdir(parents=True, exist_ok=True)
        # Held, so that nothing changes under a command that works on the run, nor what it records is lost.
        with run.lock():
            earlier = run.facts()
            if run.config_file.exists() and not run._goes_on_with(config):
                earlier = {}
            stores = [*stores, *(uri for uri in run.other_stores() if uri not in stores)]
            # The marker goes first: a folder that holds a configuration can always be told to be a run's.
            facts = {**earlier, **versions(), "seed": config.seed, "stores": stores}
            write_json(run.versions_file, facts)
            write_text(run.config_file, dump_config(config))
        return run

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """An existing run folder.

        Raises:
            MilpError: there is none at ``path``.
        """
        run = cls.at(path)
        if not run.path.is_dir():
            raise MilpError(f"{run.place}: there is no such run folder; `milp-ray run CONFIG` makes one")
        if not run.is_run():
            raise MilpError(
                f"{run.place} is not a run folder: it has no config.yaml with a versions.json of milp_ray; "
                "give a folder that `milp-ray run` made, such as runs/demo"
            )
        return run

    def is_run(self) -> bool:
        """Whether the folder was made by :meth:`create`."""
        return MARKER in self._read_json(self.versions_file)

    def config(self) -> Config:
        """The configuration of the run."""
        from milp_ray.config_loader import load_config

        return load_config(self.config_file)

    def _holds_something_else(self) -> bool:
        """Whether the folder is no run's, nor what an earlier run of the name left about people."""
        if not self.path.is_dir() or self.is_run():
            return False
        return any(entry.name not in {GOVERNANCE, LOCK, INDEX} for entry in self.path.iterdir())

    def remove(self, *, keep: Collection[str] = ()) -> None:
        """Delete the run with everything in it but the entries to ``keep``; nothing where there is none.

        Raises:
            MilpError: the folder is no run folder, or a link to one: what it holds is not ours to delete.
        """
        if self.path.is_symlink():
            raise MilpError(f"{self.path} is a link; remove it by hand, or choose another name=…")
        if not self.path.exists():
            return
        if keep and self.path.is_dir() and not self._holds_something_else() and not self.is_run():
            return
        if not self.path.is_dir() or not self.is_run():
            raise MilpError(
                f"{self.path} is not a run folder of milp_ray, so --fresh does not delete it; "
                "do so by hand, or choose another name=… or output_dir=…"
            )
        with self.lock():
            if self.uri is not None:
                Mirror(self.uri).remove(keep)
            # What marks the folder as a run goes last, so that an interrupted removal can be repeated.
            entries = [entry for entry in self.path.iterdir() if entry.name not in keep]
            for entry in sorted(entries, key=lambda entry: entry == self.versions_file):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def _goes_on_with(self, config: Config) -> bool:
        """Whether a configuration goes on with the folder's run; otherwise that one has made nothing yet.

        Raises:
            MilpError: its results cannot be mixed with those that the folder holds.
        """
        found = differences(self.config(), config)
        if found and self._holds_results():
            lines = [f"  {line}" for line in found]
            raise MilpError(
                f"{self.place} holds a run of a different configuration:\n"
                + "\n".join(lines)
                + "\nUse another name=…, or `milp-ray run CONFIG --fresh` to delete that run and start over."
            )
        return not found

    def _holds_results(self) -> bool:
        """Whether anything was measured or made: a run that was refused before that may become another."""
        return any(
            entry.is_file() or any(path.is_file() for path in entry.rglob("*"))
            for entry in self.path.iterdir()
            if entry.name not in self.kept_by_any_command
        )

    # ------------------------------------------------------------------------------------- small files

    def record_facts(self, **facts: Any) -> None:
        """Add to ``versions.json`` what becomes known later, such as base_model, revision, dataset_hash."""
        write_json(self.versions_file, {**self._read_json(self.versions_file), **facts})

    def facts(self) -> dict[str, Any]:
        """What :meth:`record_facts` and the making of the run recorded."""
        return self._read_json(self.versions_file)

    def other_stores(self) -> list[str]:
        """Stores beside the run's own that its adapters went to, also under earlier configurations.

        Of a run in which an earlier version of this package recorded none, the one that its configuration
        names.
        """
        recorded = self.facts().get("stores")
        if recorded is None and self.is_run():
            with suppress(MilpError):  # a configuration that this version cannot read
                recorded = [self.config().personalize.store]
        return [str(uri) for uri in recorded or [] if uri is not None]

    def record_seconds(self, stage: str, seconds: float) -> None:
        """Add to a stage's time; a stage that was interrupted and continued counts all its parts."""
        before = self.seconds()
        write_json(self.seconds_file, {**before, stage: round(before.get(stage, 0.0) + seconds, 3)})

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far."""
        return self._read_json(self.seconds_file)

    def record_peak_memory(self, mib: float) -> None:
        """Keep the largest memory, in MiB, that any command on the run needed."""
        write_json(self.peak_memory_file, {"mib": round(max(mib, self.peak_memory()), 1)})

    def peak_memory(self) -> float:
        """The largest memory so far, in MiB; 0 where it was never measured."""
        return float(self._read_json(self.peak_memory_file).get("mib", 0.0))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_json(self.summary_file, dict(summary))

    def update_summary(self, **part: Any) -> None:
        """Add what a stage made to ``summary.json``, or make it with that alone."""
        self.write_summary({**self._read_json(self.summary_file), **part})

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends, however it ends.

        A run in a bucket is held for this machine, too, and what changes in the copy is taken there.

        Raises:
            MilpError: another process is working on the run, or has taken it up in a bucket meanwhile: then
                the block is interrupted.
        """
        with held_file(self.path / LOCK) as is_free, ExitStack() as stack:
            if not is_free:
                raise MilpError(
                    f"another milp-ray process works on {self.place}; wait for it, or choose another name=…"
                )
            if self.uri is not None:
                stack.enter_context(Mirror(self.uri).held())
            yield

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise MilpError(f"{path} cannot be read as JSON ({error}); remove it and run again") from None
        return data if isinstance(data, dict) else {}


def place_of(config: Config) -> Path | str:
    """The folder or URI of a configuration's run."""
    root = config.output_dir
    return child_uri(root, config.name) if isinstance(root, str) else root / config.name
