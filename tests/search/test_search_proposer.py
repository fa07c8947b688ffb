"""The process that proposes layouts, lost more often than Ray restarts it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from milp_ray.errors import MilpError
from milp_ray.search.suggest import ActorProposer, Proposal, Question

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUESTION = Question((), batch=1, n=1)


def dying(folder: Path, n_deaths: int) -> Any:
    """A suggester whose process is killed so many times; made here, it is sent to the actor by value."""

    class DyingSuggester:
        def warm_up(self) -> None:
            pass

        def propose(self, question: Question) -> list[Proposal]:
            n_before = len(list(folder.iterdir()))
            if n_before < n_deaths:
                (folder / str(n_before)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return [Proposal({"rank": question.batch}, "saas_nehvi")]

    return DyingSuggester()


def answer(proposer: ActorProposer) -> list[Proposal]:
    proposer.submit(QUESTION)
    deadline = time.monotonic() + 200
    while (found := proposer.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_proposer_that_is_lost_for_good_is_replaced_and_asked_the_same(
    ray_local: None, tmp_path: Path
) -> None:
    proposer = ActorProposer(dying(tmp_path, 4))
    try:
        assert answer(proposer) == [Proposal({"rank": 1}, "saas_nehvi")]
    finally:
        proposer.close()
    assert len(list(tmp_path.iterdir())) == 4


def test_one_that_is_lost_again_and_again_ends_the_search(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milp_ray.search.suggest._MOST_LOSSES", 0)
    proposer = ActorProposer(dying(tmp_path, 99))
    try:
        with pytest.raises(MilpError, match=r"lost again and again.*out of memory.*same command"):
            answer(proposer)
    finally:
        proposer.close()
