"""Fixtures of recorded searches: a journal's events, a run that holds them, and a model's beliefs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from milp_ray.rundir import RunFolder


@pytest.fixture(scope="session")
def study_events() -> Callable[..., list[dict[str, Any]]]:
    """``study_events(n_completed, is_finished)``: what the journal of a search of four layers holds.

    Two slots; the trials end in pairs, ten seconds a pair; the loss and ROUGE-L fall with the number
    of LoRAs. Unless it is finished, four more were suggested: one was stopped 5 s after the last pair, one
    failed 6 s after it, one runs and one waits.
    """

    def event(second: float, kind: str, **fields: Any) -> dict[str, Any]:
        time = datetime(2024, 5, 1, tzinfo=UTC) + timedelta(seconds=second)
        return {"event": kind, **fields, "time": time.isoformat(timespec="milliseconds")}

    def suggested(second: float, index: int) -> dict[str, Any]:
        mask = [bool((index + 1) >> bit & 1) for bit in range(4)]
        layers = [layer for layer, bit in enumerate(mask) if bit]
        raw = {f"layer_{layer}": bit for layer, bit in enumerate(mask)} | {"n_loras": 4, "rank": 8}
        layout = {"n_layers": 4, "layers": layers, "rank": 8}
        key = "".join(str(int(bit)) for bit in mask) + "-r8"
        where = {"batch": int(index >= 4), "generator": "sobol" if index < 4 else "saas_nehvi"}
        return event(second, "trial_suggested", index=index, raw=raw, layout=layout, key=key, **where)

    def metrics(index: int) -> dict[str, Any]:
        n_loras = (index + 1).bit_count()
        per_user = {
            "validation_loss": [2.0 - 0.2 * n_loras + 0.01 * index + 0.1 * user for user in range(3)],
            "rouge_l": [40.0 - 5 * n_loras - (index * user) % 3 for user in range(3)],
        }
        means = {name: sum(values) / 3 for name, values in per_user.items()}
        sizes = {"adapter_parameters": 100 * n_loras, "seconds": 8.0, "tokens": 10, "steps": 5}
        return {**means, **sizes, "per_user": per_user}

    def make(n_completed: int = 10, is_finished: bool = False) -> list[dict[str, Any]]:
        space = {"n_layers": 4, "ranks": [8, 16], "factors": ["layers", "number", "rank"]}
        held = {"fixed_layers": None, "fixed_number": None, "fixed_rank": None}
        header = {"objectives": ["validation_loss", "rouge_l"], "n_initial": 4, "seed": 0, "worst": {}}
        events = [
            event(0, "study_started", digest="d", space={**space, **held}, n_probe_users=3, **header),
            event(0, "session_started", n_slots=2),
        ]
        for first in range(0, n_completed, 2):
            second, pair = 5 * first, range(first, min(first + 2, n_completed))
            events += [suggested(second, index) for index in pair]
            events += [event(second + 1, "trial_started", index=index) for index in pair]
            events += [
                event(second + 10, "trial_completed", index=index, metrics=metrics(index)) for index in pair
            ]
        second = 10 * ((n_completed + 1) // 2)
        if is_finished:
            return [
                *events,
                event(second, "study_finished", reason="all trials have ended"),
                event(second + 1, "session_ended", max_block_seconds=0.05),
            ]
        stopped, failed, running, waiting = range(n_completed, n_completed + 4)
        loss = {"validation_loss_at_rung": 9.0, "validation_loss_at_rung_sem": None}
        by_user = {"validation_loss_at_rung_by_user": [9.0] * 3, "adapter_parameters": 64}
        at_rung = {**loss, **by_user, "seconds_at_rung": 4.0, "tokens_at_rung": 90, "steps_at_rung": 8}
        events.append(event(second, "batch_proposed", batch=2, seconds=1.5))
        events += [suggested(second, index) for index in (stopped, failed, running, waiting)]
        events += [event(second, "trial_started", index=index) for index in (stopped, failed)]
        return [
            *events,
            event(second + 4, "trial_rung", index=stopped, rung=0, epoch=2, values=at_rung),
            event(second + 5, "trial_stopped", index=stopped, rung=0, epoch=2, seconds=4.0),
            event(second + 5, "trial_started", index=running),
            event(second + 6, "trial_failed", index=failed, reason="training diverged"),
        ]

    return make


@pytest.fixture(scope="session")
def make_study_run() -> Callable[..., RunFolder]:
    """``make_study_run(folder, events, **search)``: a run whose journal holds the events."""

    def make(folder: Path, events: list[dict[str, Any]], **search: Any) -> RunFolder:
        from milp_ray.config import Config
        from milp_ray.config.search import SearchSection
        from milp_ray.rundir import RunFolder

        section = SearchSection(n_trials=20, n_initial=4, **search)
        run = RunFolder.create(Config(name="study-run", output_dir=folder, search=section))
        run.study.mkdir()
        run.journal.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        return run

    return make


@pytest.fixture(scope="session")
def build_analysis() -> Callable[[Any], Any]:
    """``build_analysis(study)``: layer 2 matters most; layout i of the front has mean i, sd i + 0.5."""

    def build(study: Any) -> Any:
        from milp_ray.search.insight import Beliefs

        objectives, n_front = study.result.objectives, len(study.result.front)
        shares = {"layer 0": 0.1, "layer 1": 0.0, "layer 2": 0.8, "layer 3": 0.4, "n": 0.05, "rank": 0.2}
        importance = {factor: (m, m / 2, m + 0.1) for factor, m in shares.items()}
        return Beliefs(
            objectives,
            tuple(shares),
            {name: dict(importance) for name in objectives},
            dict.fromkeys(objectives, (0.35, 0.25, 0.45)),
            {name: [float(i) for i in range(n_front)] for name in objectives},
            {name: [i + 0.5 for i in range(n_front)] for name in objectives},
        )

    return build
