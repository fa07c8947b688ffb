from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.evaluation import EvaluationSection
from milp_ray.evaluation.compare import compare
from milp_ray.evaluation.scores import as_table
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.report.content import ReportContent, StudyContent, study_content
from milp_ray.report.study_figures import Trial
from milp_ray.search.insight import load_study

METHODS = ("base", "text_prompt", "oracle_profile", "memory_only", "instruction_only", "milp")
KINDS = (
    ("direct", "seen"),
    ("direct", "unseen"),
    ("implicit", "unseen"),
    ("changed", "unseen"),
    ("generic", "none"),
)


class MadeUp:
    """Scores and trials of no run."""

    methods = METHODS

    def scores(
        self, n_users: int = 5, methods: tuple[str, ...] = METHODS, tagged: bool = True
    ) -> list[dict[str, Any]]:
        """Rows of made-up scores: every second user has a long history."""
        rng = random.Random(0)
        rows = []
        for u in range(n_users):
            for strength, method in enumerate(methods):
                for i, (kind, exposure) in enumerate(KINDS):
                    rows.append(
                        {
                            "user_id": f"u{u}",
                            "method": method,
                            "example": i,
                            "kind": kind if tagged else "example",
                            "exposure": exposure if tagged else "none",
                            "order": ("fact_first", "choice_first")[i % 2] if tagged else "none",
                            "mentions": "none",
                            "attribute": ("pet", "diet")[i % 2] if tagged else "none",
                            "history_fits": u % 2 == 0,
                            "loss": 3.0 - 0.2 * strength + 0.1 * rng.random(),
                            "n_tokens": 6,
                            "rouge_1": 20.0 + 5 * strength + rng.random(),
                            "rouge_l": 18.0 + 5 * strength + rng.random(),
                            "persona_f1": 1.0 + 0.3 * strength,
                            "fact_accuracy": float(rng.random() < strength / 5)
                            if tagged and kind != "generic"
                            else None,
                        }
                    )
        return rows

    def comparison(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Of scores, with the arguments of :meth:`scores`."""
        return self.comparison_of(self.scores(*arguments, **options))

    def comparison_of(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Of given scores."""
        return compare(as_table(rows), EvaluationSection(n_bootstrap=50), seed=0)

    def trials(self, n: int = 12, diverged: bool = False) -> list[Trial]:
        """Trials of which every fourth is on the front; a diverged one comes last."""
        rng = random.Random(1)
        trials = []
        for i in range(n):
            mask = tuple(rng.random() < 0.5 for _ in range(4))
            loss = 2.0 - 0.2 * sum(mask) + 0.1 * rng.random()
            values = {
                "validation_loss": loss,
                "rouge_l": 60 - 15 * loss,
                "adapter_parameters": 100.0 * sum(mask),
            }
            generator = "sobol" if i < 8 else "saas_nehvi"
            trials.append(
                Trial(i, generator, mask, rng.choice((8, 16)), values, on_front=i % 4 == 0, chosen=i == 4)
            )
        if diverged:
            values = {"validation_loss": 50.0, "rouge_l": 0.0, "adapter_parameters": 400.0}
            trials.append(Trial(n, "saas_nehvi", (True,) * 4, 16, values))
        return trials

    def size_of(self, picture: Path) -> tuple[int, int]:
        """Width and height of a PNG file."""
        head = picture.read_bytes()[:24]
        assert head.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", head[16:24])
        return width, height


@pytest.fixture(scope="session")
def made() -> MadeUp:
    return MadeUp()


@pytest.fixture(scope="session")
def study(
    study_events: Any, make_study_run: Any, build_analysis: Any, tmp_path_factory: pytest.TempPathFactory
) -> StudyContent:
    """Ten trials with values, one that failed and one that was stopped; trial 6 was chosen; with a model."""
    run = make_study_run(tmp_path_factory.mktemp("studied"), study_events())
    return study_content(load_study(run), {"trial": 6}, build_analysis)


@pytest.fixture(scope="session")
def content(study: StudyContent, made: MadeUp) -> ReportContent:
    return ReportContent(
        name="demo",
        study=study,
        chosen={
            "layout": {**CanonicalLayout((True, True, True, False), 8).to_dict(), "key": "1110-r8"},
            "rule": "best_loss",
            "reason": "It is the lowest.",
            "adapter_parameters": 12345,
            "trial": 6,
        },
        comparison=made.comparison(),
        seconds={"search": 71.2, "personalize": 30.0},
        peak_rss_mib=2048.0,
        failures={"personalize": {"training <diverged>": 2}},
        versions={"milp_ray": "0.1.0", "packages": {"torch": "2.13.0"}},
        config_yaml="name: demo\n",
    )
