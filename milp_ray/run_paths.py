"""Where everything is that one configuration produced.

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

from dataclasses import dataclass
from pathlib import Path

from milp_ray.buckets import child_uri
from milp_ray.run_mirror import ADAPTERS, GOVERNANCE, INDEX, LOCK


@dataclass(frozen=True)
class RunPaths:
    """Paths of a run."""

    path: Path
    uri: str | None = None  # of the run in a bucket whose copy ``path`` is

    @property
    def place(self) -> Path | str:
        """What people call the run by: its folder, or its URI."""
        return self.path if self.uri is None else self.uri

    @property
    def store(self) -> Path | str:
        """Where the run's own adapter store is, by path or URI."""
        return self.adapters if self.uri is None else child_uri(self.uri, ADAPTERS)

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
    def kept_by_any_command(self) -> frozenset[str]:
        """Names of what a command leaves that has measured and made nothing."""
        made = (
            *(self.config_file, self.versions_file, self.status_file, self.gauges_file),
            *(self.tensorboard, self.mlflow_file, self.seconds_file, self.peak_memory_file),
        )
        return frozenset({*(path.name for path in made), GOVERNANCE, LOCK, INDEX})

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
