"""``tracking``: where else a run's numbers go."""

from __future__ import annotations

from milp_ray.config.section import Section


class TrackingSection(Section):
    """Experiment trackers. They get numbers and the layouts of trials, and nothing of a user."""

    tensorboard: bool = True  # events in the run folder's tensorboard/
    mlflow: str | None = None  # a tracking URI, such as http://mlflow.internal:5000; None: no MLflow
    mlflow_experiment: str = "milp_ray"
