"""The folder that holds everything one configuration produced.

    runs/NAME/
      config.yaml      the resolved configuration
      versions.json    packages, platform, git commit, base model and revision, dataset hash, seed
      status.json      what the last command on the run is doing, or how it ended
      gauges.json      the latest of the numbers that the dashboard shows
      tensorboard/     the same over time, and the values of trials
      mlflow.json      which MLflow run this one is, where there is one
      seconds.json     time by stage
      peak_memory.json the largest memory that a command needed, workers included
      study/           the search: its journal (the truth), and what is rebuilt from it
      chosen.yaml      the layout, and why
      adapters/        the store: one PEFT folder a user
      failed.jsonl     users that could not be personalised, with the reason
      updates.jsonl    users whose adapter the last update did not replace, with the reason
      scores.parquet   one row a (user, method, example)
      judgements.parquet  which answers judges preferred, one row a (user, example, pair of methods, judge)
      ability.parquet  one row a user: the loss on texts about nobody, under the base and under the adapter
      leakage.json     the latest leakage audit, where there was one
      compare/         `milp-ray compare`: scores, costs and tables of every method
      report/          index.html and figures
      summary.json     the results, for programs
      governance/      who was forgotten or withdrew consent, as keyed hashes; kept by --fresh

Each file is written whole or not at all (:mod:`milp_ray.atomic_files`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.atomic_files import write_json, write_text
from milp_ray.buckets import child_uri, is_bucket_uri
from milp_ray.errors import MilpError
from milp_ray.run_mirror import ADAPTERS, INDEX, Mirror

if TYPE_CHECKING:
    from milp_ray.config import Config

# What a rerun of the same folder may give differently, because no result that is already there depends on it:
# where and how wide the work runs, and what later stages make anew from what earlier ones left.
RESUMABLE = (
    "output_dir",
    "tracking",
    "ray",
    "users.consent",
    "search.max_concurrent_trials",
    "search.cpus_per_trial",
    "search.gpus_per_trial",
    "search.processes_per_trial",
    "search.trials_per_gpu",
    "search.trials_per_process",
    "search.max_failures",
    "personalize",
    "update",
    "choice",
    "evaluation.methods",
    "evaluation.n_bootstrap",
    "evaluation.confidence",
    "evaluation.task",
    "evaluation.labels",
    "evaluation.scale",
)
GROWING = ("search.n_trials",)  # may become larger: a search goes on where it stood

GOVERNANCE = "governance"  # what must not be forgotten about people when a run starts over

_MARKER = "milp_ray"  # the key of versions.json by which a run folder is known


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the few files that belong to no stage."""

    path: Path
    uri: str | None = None  # of the run in a bucket whose copy ``path`` is

    @classmethod
    def at(cls, place: Path | str) -> RunFolder:
        """A folder of this machine, or by URI one in a bucket, of which the copy here is brought up to date.

        Raises:
            MilpError: the bucket cannot be read.
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

    @property
    def place(self) -> Path | str:
        """What people call the run by: its folder, or its URI."""
        return self.path if self.uri is None else self.uri

    @property
    def store(self) -> Path | str:
        """Where the run's own adapter store is, by path or URI."""
        return self.adapters if self.uri is None else child_uri(self.uri, ADAPTERS)

    def refresh(self) -> None:
        """Bring the copy of a run in a bucket up to date; of a folder here there is nothing to bring."""
        if self.uri is not None:
            Mirror(self.uri).pull()

    def is_held(self) -> bool:
        """Whether some process works on the run."""
        if self.uri is not None:
            return Mirror(self.uri).holder() is not None
        try:
            with self.lock():
                return False
        except MilpError:
            return True

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def versions_file(self) -> Path:
        """What the run was made with."""
        return self.path / "versions.json"

    @property
    def status_file(self) -> Path:
        """What the last command is doing, or how it ended."""
        return self.path / "status.json"

    @property
    def gauges_file(self) -> Path:
        """The latest numbers of a run, for who watches it."""
        return self.path / "gauges.json"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def mlflow_file(self) -> Path:
        """Which MLflow run this one is."""
        return self.path / "mlflow.json"

    @property
    def seconds_file(self) -> Path:
        """Seconds by stage."""
        return self.path / "seconds.json"

    @property
    def peak_memory_file(self) -> Path:
        """The largest memory of any command."""
        return self.path / "peak_memory.json"

    @property
    def study(self) -> Path:
        """Folder of the search."""
        return self.path / "study"

    @property
    def journal(self) -> Path:
        """The search's append-only events."""
        return self.study / "journal.jsonl"

    @property
    def trials_file(self) -> Path:
        """One row a trial, rebuilt from the journal."""
        return self.study / "trials.parquet"

    @property
    def chosen_file(self) -> Path:
        """The chosen layout and the reason."""
        return self.path / "chosen.yaml"

    @property
    def adapters(self) -> Path:
        """Root of the adapter store."""
        return self.path / "adapters"

    @property
    def failed_file(self) -> Path:
        """Users that could not be personalised."""
        return self.path / "failed.jsonl"

    @property
    def updates_file(self) -> Path:
        """Users whose adapter an update did not replace."""
        return self.path / "updates.jsonl"

    @property
    def scores_file(self) -> Path:
        """Scores, one row a (user, method, example)."""
        return self.path / "scores.parquet"

    @property
    def judgements_file(self) -> Path:
        """What judges preferred, one row a (user, example, pair of methods, judge)."""
        return self.path / "judgements.parquet"

    @property
    def ability_file(self) -> Path:
        """The loss on texts about nobody under each user's adapter, one row a user."""
        return self.path / "ability.parquet"

    @property
    def leakage_file(self) -> Path:
        """The latest leakage audit."""
        return self.path / "leakage.json"

    @property
    def compare(self) -> Path:
        """Folder of the comparison of all methods."""
        return self.path / "compare"

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.path / "report"

    @property
    def summary_file(self) -> Path:
        """Results for programs."""
        return self.path / "summary.json"

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
                something that is no run at all.
        """
        from milp_ray.config_loader import dump_config
        from milp_ray.versions import versions

        run = cls.of(config) if at is None else cls.at(at)
        if fresh:
            run.remove(keep=(GOVERNANCE,))
        if run.config_file.exists():
            run._check_same(config)
        elif run.path.exists() and not run.path.is_dir():
            raise MilpError(f"{run.path} is a file; choose another name=… or output_dir=…")
        elif run._holds_something_else():
            raise MilpError(
                f"{run.path} exists and is no run folder of milp_ray; choose another name=… or output_dir=…"
            )
        run.path.mkdir(parents=True, exist_ok=True)
        # The marker goes first: a folder that holds a configuration can always be told to be a run's.
        earlier = run._read_json(run.versions_file)
        write_json(run.versions_file, {**earlier, **versions(), "seed": config.seed})
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
        return _MARKER in self._read_json(self.versions_file)

    def config(self) -> Config:
        """The configuration of the run."""
        from milp_ray.config_loader import load_config

        return load_config(self.config_file)

    def _holds_something_else(self) -> bool:
        """Whether the folder is no run's, nor what an earlier run of the name left about people."""
        if not self.path.is_dir() or self.is_run():
            return False
        return any(entry.name not in {GOVERNANCE, ".lock", INDEX} for entry in self.path.iterdir())

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

    def _check_same(self, config: Config) -> None:
        """Refuse a configuration whose results cannot be mixed with what the folder holds."""
        before = _flat(self.config().model_dump(mode="json"))
        now = _flat(config.model_dump(mode="json"))
        differing = [key for key in now if before.get(key) != now[key] and not _may_differ(key, before, now)]
        if differing:
            lines = [f"  {key}: was {before.get(key)!r}, now {now[key]!r}" for key in differing]
            raise MilpError(
                f"{self.place} holds a run of a different configuration:\n"
                + "\n".join(lines)
                + "\nUse another name=…, or --fresh to delete that run and start over."
            )

    # ------------------------------------------------------------------------------------- small files

    def record_facts(self, **facts: Any) -> None:
        """Add to ``versions.json`` what becomes known later, such as base_model, revision, dataset_hash."""
        write_json(self.versions_file, {**self._read_json(self.versions_file), **facts})

    def facts(self) -> dict[str, Any]:
        """What :meth:`record_facts` and the making of the run recorded."""
        return self._read_json(self.versions_file)

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
            MilpError: another process is working on the run.
        """
        import fcntl

        with (self.path / ".lock").open("w") as file, ExitStack() as stack:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MilpError(
                    f"another milp-ray process works on {self.place}; wait for it, or choose another name=…"
                ) from None
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


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def _may_differ(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(key == free or key.startswith(free + ".") for free in RESUMABLE):
        return True
    return key in GROWING and now[key] >= before.get(key, now[key])
