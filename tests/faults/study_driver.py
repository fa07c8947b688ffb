"""A study on a cluster, of trials that take their time and train nothing: for the tests beside it.

    python study_driver.py FOLDER N_TRIALS SECONDS [JSON of search settings]

The cluster is the one of RAY_ADDRESS. Everything is real but the training. Each process of a trial writes
which node it is on to FOLDER/nodes, a file a process, and another one once it has done a trial.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SearchSection, SpaceSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.architecture import FfnShapes
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search import hung
from milp_ray.search.study import StudySettings, run_study
from milp_ray.telemetry import configure_logging, ray_session
from milp_ray.users.records import Example, UserSplit

SHAPES = FfnShapes(n_layers=16, modules=(("up_proj", 128, 512), ("down_proj", 512, 128)))
SPLIT = UserSplit("u", None, (), (), (Example("a", "b"),), ())


def trial_class(folder: Path, seconds: float) -> type[tune.Trainable]:
    """The trials of this study; a class made here is sent to the workers by value."""

    class SleepingTrial(tune.Trainable):
        def setup(self, config: dict[str, Any], task: object = None) -> None:
            import ray

            self._node = ray.get_runtime_context().get_node_id()
            (folder / str(os.getpid())).write_text(self._node, encoding="utf-8")

        def step(self) -> dict[str, Any]:
            # Many short naps: a process that is stopped for a while loses that time.
            for _ in range(round(seconds / 0.02)):
                time.sleep(0.02)
            (folder / f"{os.getpid()}.done").write_text(self._node, encoding="utf-8")
            layout = CanonicalLayout.from_dict(self.config["layout"])
            size = len(layout.layers) * (layout.rank or 1)
            values = {"validation_loss": 3.0 - size / 2000, "rouge_l": float(size)}
            return {**values, "adapter_parameters": size, "seconds": seconds, tune.result.DONE: True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

    return SleepingTrial


def main() -> None:
    """Run the study, or what is left of it."""
    folder, n_trials, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    more = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    hung.AT_LEAST = 8.0
    configure_logging()
    settings = StudySettings(
        base=BaseSection(),
        space=SpaceSection(),
        training=TrainingSection(),
        prompt=PromptSection(),
        search=SearchSection(**{"n_trials": n_trials, "n_initial": n_trials, **more}),
        evaluation=EvaluationSection(),
        seed=0,
    )
    nodes = folder / "nodes"
    nodes.mkdir(parents=True, exist_ok=True)
    with ray_session(RaySection()):
        run_study(folder, settings, [SPLIT], SHAPES, None, trial_class(nodes, seconds))


if __name__ == "__main__":
    main()
