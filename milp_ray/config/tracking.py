"""``tracking``: where else a run's numbers go."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import field_validator

from milp_ray.config.section import Section


class TrackingSection(Section):
    """Experiment trackers. They get numbers and the layouts of trials, and nothing of a user."""

    tensorboard: bool = True  # events in the run folder's tensorboard/
    mlflow: str | None = None  # a tracking URI, such as http://mlflow.internal:5000; None: no MLflow
    mlflow_experiment: str = "milp_ray"

    @field_validator("mlflow")
    @classmethod
    def _no_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and "@" in urlsplit(uri).netloc:
            raise ValueError(
                "the URI holds no user name or password, as it is written into the run folder and its "
                "report: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri
