"""The driver's side of a batch without Ray: who is let in, what is counted, and what it holds in memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.config.users import SplitSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.outcome import failures_table
from milp_ray.personalize import hands, tally
from milp_ray.personalize.batch import StreamedSplits, personalize
from milp_ray.personalize.governance.consent import Gate
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.hands import Outcome, Queue
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.personalize.tally import BatchSummary, Tally
from milp_ray.progress import progress
from milp_ray.rundir import RunFolder
from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem
from milp_ray.users.records import UserSplit
from milp_ray.users.sources import find_users_files
from milp_ray.users.stream import UserStream

MADE = {"steps": 1, "tokens": 1, "bytes": 1, "seconds": 0.1, "peak_rss_mib": 1.0, "peak_gpu_mib": None}


class InstantPool:
    """Every item is done as soon as it is dealt."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def start(self, n_workers: int) -> None:
        """Nothing to start."""

    def map(self, function: Any, items: Any, *, key: Any, size: Any, at_once: int) -> Iterator[Outcome]:
        queue: Queue[Any] = Queue(items, key, size)
        while queue:
            for task in queue.deal(2, at_once):
                self.keys.append(task.key)
                yield Outcome(task.key, "done", MADE)


@pytest.fixture
def recipe(tiny_llama_dir: Path) -> Recipe:
    base = BaseSection(model=str(tiny_llama_dir), device="cpu")
    layout = CanonicalLayout((False, True, False, True), rank=4)
    return Recipe(layout, base, TrainingSection(), PromptSection(), seed=0)


def go(folder: Path, users: Any, recipe: Recipe, **section: Any) -> tuple[BatchSummary, list[str], RunFolder]:
    run, pool = RunFolder(folder / "run"), InstantPool()
    settings: Any = {"section": PersonalizeSection(**section), "ray": RaySection(), "pool": pool}
    return personalize(run, users, recipe, **settings), pool.keys, run


def test_who_is_not_let_in_is_counted_by_reason(
    tmp_path: Path, recipe: Recipe, make_split: Callable[..., UserSplit]
) -> None:
    users = [
        make_split("a"),
        Problem("users.jsonl", 2, "history[3].text is empty", "b"),
        Problem("users.jsonl", 3, "history[14].text is empty"),
        Problem("users.jsonl", 4, CONSENT_WITHDRAWN, "c"),
        make_split("c"),
        make_split("a"),
        make_split("long", n_turns=500),
        make_split("empty", n_turns=0, n_train=0),
    ]
    summary, keys, run = go(tmp_path, users, recipe, max_characters=5_000)
    assert keys == ["a"]
    assert (summary.done, summary.failed, summary.withdrawn, summary.n_users) == (1, 5, 2, 8)
    assert summary.reasons["history[…].text is empty"] == 2
    failed = [json.loads(line) for line in run.failed_file.read_text().splitlines()]
    assert [line["user_id"] for line in failed] == ["b", None, "a", "long", "empty"]
    assert failed[1]["place"] == "users.jsonl:3"
    assert "personalize.max_characters is 5,000" in failed[3]["reason"]
    assert summary.to_dict()["reasons"] == dict(summary.reasons)


def test_users_are_taken_longest_first_of_those_that_are_looked_at(
    tmp_path: Path, recipe: Recipe, make_split: Callable[..., UserSplit]
) -> None:
    users = [make_split(f"{n}", n_turns=n) for n in (3, 30, 6, 12, 24)]
    _, keys, _ = go(tmp_path, iter(users), recipe)
    assert keys[0] == "30"
    assert sorted(keys, key=int) == ["3", "6", "12", "24", "30"]


def test_reasons_without_end_are_counted_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tally, "MOST_REASONS", 3)
    with progress("x", file=io.StringIO()) as bar, Tally(tmp_path / "failed.jsonl", bar) as counts:
        for letter in "abcdeabc":
            counts.failed("u", "E", letter)
    assert counts.summary.reasons == {"a": 2, "b": 2, "c": 2, tally.OTHER_REASONS: 2}


def test_reasons_that_differ_by_user_alone_are_one_and_hold_no_id(tmp_path: Path) -> None:
    with progress("x", file=io.StringIO()) as bar, Tally(tmp_path / "failed.jsonl", bar) as counts:
        for number, user_id in enumerate(("ann", 'b "o" b', "zoë 7")):
            counts.failed(user_id, "E", f"user {json.dumps(user_id)}, version {number}: a file is missing")
    assert counts.summary.reasons == {"user …, version …: a file is missing": 3}


def test_a_reason_is_shown_as_it_is() -> None:
    from rich.console import Console

    written = io.StringIO()
    table = failures_table({"history[…].text is empty": 1, "no JSON [/red]": 1200}, 1201)
    Console(file=written, width=100).print(table)
    shown = written.getvalue()
    assert "1201 users failed" in shown
    assert "history[…].text is empty" in shown
    assert shown.index("1,200") < shown.index("no JSON [/red]") < shown.index("history")


def test_a_hand_and_the_look_ahead_are_bounded_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hands, "LOOKAHEAD_SIZE", 100)
    monkeypatch.setattr(hands, "MOST_SIZE_AT_ONCE", 30)
    source = iter([40, *[10] * 50])
    queue: Queue[int] = Queue(source, key=str, size=float)
    assert len(queue) == 7, "until the sizes reach 100"
    assert [task.item for task in queue.deal(1, 64)] == [40], "one that is too large comes alone"
    assert [task.item for task in queue.deal(1, 64)] == [10, 10, 10]
    assert len(list(source)) > 20


def test_one_whose_worker_was_lost_waits_behind_the_others() -> None:
    queue: Queue[int] = Queue([9, 5, 1], key=str, size=float)
    [first] = queue.deal(1, 1)
    first.alone = True
    queue.push_back(first)
    assert queue.deal(1, 1) == [first], "lost in company: its turn is as it was"
    first.lost_on.append("node")
    queue.push_back(first)
    assert [queue.deal(1, 1)[0].item for _ in range(3)] == [5, 1, 9]


@pytest.mark.parametrize("n_users", [300, pytest.param(1200, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_users(
    n_users: int, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hands, "LOOKAHEAD", 128)
    turns = ["I have a red dog that likes to swim in the sea." * 4] * 30
    with (tmp_path / "users.jsonl").open("w") as file:
        for index in range(n_users):
            turns[0] = f"I am number {index}."
            file.write(json.dumps({"user_id": f"user-{index}", "history": turns}) + "\n")
    stream = UserStream(find_users_files([str(tmp_path / "users.jsonl")]))
    store = AdapterStore(tmp_path / "adapters")
    splits = StreamedSplits(stream, SplitSection(), Gate(Record(tmp_path), "assumed"), store)
    tracemalloc.start()
    try:
        summary, _, _ = go(tmp_path, splits, recipe)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert summary.done == n_users
    assert peak < 4 << 20, "128 users of 6 kB and a table of ids; 1,200 of them would be 8 MB"
