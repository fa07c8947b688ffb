"""The batch as a command, and what may go wrong around it: odd users, full and read-only disks, Ctrl-C."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bad_users import HANDLED, REFUSED, SECRET
from support.mounts import in_own_mounts

from milp_ray.config.base import BaseSection
from milp_ray.config.cluster import RaySection
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.batch import StreamedSplits, personalize, worker_pool
from milp_ray.personalize.governance.consent import Gate
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.pool import WorkerPool
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder
from milp_ray.users.sources import find_users_files
from milp_ray.users.stream import UserStream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LAYOUT = CanonicalLayout((False, True, False, True), rank=4)
SECTION = PersonalizeSection(n_workers=2, cpus_per_worker=0.5)


def person(user_id: str) -> bytes:
    history = [f"{user_id} likes tea.", "My dog is red.", "My cat is blue."]
    examples = [{"query": f"What is {i}?", "response": f"It is {i}."} for i in range(6)]
    return json.dumps({"user_id": user_id, "history": history, "examples": examples}).encode()


def write_users(path: Path, *lines: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def adapters(run: RunFolder) -> dict[str, dict[str, bytes]]:
    """Every user's verified weights."""
    store = AdapterStore(run.adapters)
    for user in store.users():
        store.verify(user)
    return {u: {n: t.numpy().tobytes() for n, t in store.load(u).tensors.items()} for u in store.users()}


# --------------------------------------------------------------------------------------------- odd users


@pytest.fixture(scope="module")
def recipe(tiny_llama_dir: Path) -> Recipe:
    base = BaseSection(model=str(tiny_llama_dir), device="cpu")
    training = TrainingSection(memory_epochs=1, instruction_epochs=1)
    return Recipe(LAYOUT, base, training, PromptSection(), seed=5)


@pytest.fixture(scope="module")
def pool(ray_local: None, recipe: Recipe) -> Iterator[WorkerPool]:
    with worker_pool(recipe.base, SECTION, RaySection()) as opened:
        yield opened


def go(run: RunFolder, recipe: Recipe, pool: WorkerPool, *paths: Path) -> Any:
    from milp_ray.config.users import SplitSection

    stream = UserStream(find_users_files(map(str, paths)))
    splits = StreamedSplits(
        stream, SplitSection(), Gate(Record(run.path), "assumed"), AdapterStore(run.adapters)
    )
    return personalize(run, splits, recipe, section=SECTION, ray=RaySection(), pool=pool)


def test_odd_users_are_recorded_or_handled_and_touch_nobody_else(
    tmp_path: Path, recipe: Recipe, pool: WorkerPool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert len(REFUSED) + len(HANDLED) >= 60
    sound = [person(f"u-{i}") for i in range(4)]
    odd = [line for line, _ in REFUSED.values()] + [line for _, line in HANDLED.values()]
    mixed = write_users(tmp_path / "odd" / "users.jsonl", *sound[:2], *odd, *sound[2:], sound[0])
    alone = write_users(tmp_path / "sound" / "users.jsonl", *sound)
    outside = set(tmp_path.rglob("*"))

    run, plain = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "plain")
    summary = go(run, recipe, pool, mixed)
    go(plain, recipe, pool, alone)

    made, untouched = adapters(run), adapters(plain)
    assert set(made) == {user_id for user_id, _ in HANDLED.values()} | set(untouched)
    assert {user: made[user] for user in untouched} == untouched, "who their neighbours are changes no bit"
    failed = [json.loads(line) for line in run.failed_file.read_text().splitlines()]
    assert summary.failed == len(failed) >= len(REFUSED) + 1
    assert summary.done == len(made)
    told = "\n".join(line["reason"] for line in failed)
    for kind, (_, said) in REFUSED.items():
        assert said in told, kind
    assert "the user id occurs more than once" in told
    assert sum(summary.reasons.values()) == summary.failed
    assert len(summary.reasons) < summary.failed, "reasons are counted without their particulars"

    written = {path for path in tmp_path.rglob("*") if path.is_file()} - outside
    stores = (run.adapters, plain.adapters, run.failed_file, plain.failed_file)
    assert all(any(path.is_relative_to(place) for place in stores) for path in written)
    names = {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "failed.jsonl"}
    assert {path.name for path in written} == names
    captured = capfd.readouterr()
    for text in (run.failed_file.read_text(), captured.out, captured.err):
        assert SECRET not in text
        assert "my pin" not in text


def test_consent_withdrawn_in_a_later_record_undoes_what_was_made(
    tmp_path: Path, recipe: Recipe, pool: WorkerPool
) -> None:
    no = [json.dumps({"user_id": user, "consent": False}).encode() for user in ("early", "late")]
    path = write_users(tmp_path / "u.jsonl", no[0], person("early"), person("late"), person("u"), no[1])
    run = RunFolder(tmp_path / "run")
    summary = go(run, recipe, pool, path)
    assert set(adapters(run)) == {"u"}
    assert (summary.failed, summary.withdrawn) == (0, 3)


# --------------------------------------------------------------------------------------- as a command


def prepared_run(folder: Path, model: Path, **sections: Any) -> RunFolder:
    """A run whose layout is chosen already."""
    from milp_ray.config import Config

    settings: dict[str, Any] = {
        "name": "batch",
        "output_dir": folder / "runs",
        "base": {"model": str(model), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [write_users(folder / "config.jsonl", person("config"))]},
        "training": {"memory_epochs": 1, "instruction_epochs": 1, "pack_size": 1},
        "ray": {"num_cpus": 1, "num_gpus": 0, "object_store_mib": 100},
        **sections,
    }
    run = RunFolder.create(Config.model_validate(settings))
    layout = {"n_layers": 4, "layers": [1, 3], "rank": 4}
    run.chosen_file.write_text(yaml.safe_dump({"layout": layout}), encoding="utf-8")
    return run


def command(run: RunFolder, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "milp_ray", "personalize", str(run.path), *map(str, arguments)]


def milp(run: RunFolder, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run, *arguments), capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_users_of_a_uri_take_the_place_of_the_configurations(tmp_path: Path, tiny_llama_dir: Path) -> None:
    run = prepared_run(tmp_path, tiny_llama_dir)
    folder = tmp_path / "users"
    write_users(folder / "1.jsonl", person("a"), b"my pin is 4711", person("b"), person("a"))
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(person("c")))
    answer = milp(run, "--users", f"file://{folder}")
    assert answer.returncode == 3, answer.stdout + answer.stderr
    assert set(adapters(run)) == {"a", "b", "c"}
    assert "3 adapters made, 0 were finished before, 2 users failed" in answer.stdout
    assert "the user id occurs more than once" in answer.stdout
    assert "the line is no JSON" in answer.stdout
    assert "users a minute" in answer.stdout or "5/5 users" in answer.stdout
    summary = json.loads(run.summary_file.read_text())["personalize"]
    assert (summary["done"], summary["failed"], len(summary["reasons"])) == (3, 2, 2)
    assert not summary["interrupted"]

    again = milp(run, "--users", folder / "2.jsonl.gz")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 adapters made, 1 were finished before" in again.stdout

    missing = milp(run, "--users", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "there is no such file or folder" in missing.stderr
    assert "Traceback" not in missing.stderr


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the command ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def n_adapters(run: RunFolder) -> int:
    return sum(1 for _ in AdapterStore(run.adapters).users())


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_the_same_command_goes_on(tmp_path: Path, tiny_llama_dir: Path) -> None:
    long = {"memory_epochs": 20, "instruction_epochs": 20, "pack_size": 1, "batch_size": 2}
    run = prepared_run(tmp_path, tiny_llama_dir, training=long)
    users = write_users(tmp_path / "u.jsonl", *(person(f"u-{i}") for i in range(16)))
    arguments = command(run, "--users", users)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A terminal sends the signal to every process of its group, Ray's included. A shell starts what it puts
    # in the background with the signal ignored.
    process = subprocess.Popen(
        arguments,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **pipes,
    )
    try:
        wait_for(lambda: n_adapters(run) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "the same command goes on from here" in stderr
    assert "Traceback" not in stderr
    before = adapters(run)
    assert 2 <= len(before) < 16
    assert json.loads(run.summary_file.read_text())["personalize"]["interrupted"]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert answer.returncode == 0, answer.stderr
    after = adapters(run)
    assert len(after) == 16
    assert before.items() <= after.items()
    assert all(AdapterStore(run.adapters).versions(user) == [1] for user in after)


# ------------------------------------------------------------------------- disks that cannot be written


@pytest.fixture(scope="module")
def mounts() -> None:
    answer = in_own_mounts("mount -t tmpfs -o size=64k none /mnt")
    if answer.returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")


@pytest.mark.slow
def test_a_full_disk_ends_the_batch_and_with_room_it_goes_on(
    tmp_path: Path, tiny_llama_dir: Path, mounts: None
) -> None:
    run = prepared_run(tmp_path, tiny_llama_dir)
    users = write_users(tmp_path / "u.jsonl", *(person(f"u-{i}") for i in range(8)))
    run.adapters.mkdir()
    kept = tmp_path / "kept"
    # A filesystem with room for half of them or so; what is on it is copied off before it disappears.
    script = 'mount -t tmpfs -o size=80k none "$1"; shift; kept=$1; shift; rc=0; "$@" || rc=$?; '
    script += 'cp -r "$ADAPTERS" "$kept"; exit $rc'
    os.environ["ADAPTERS"] = str(run.adapters)
    try:
        arguments = (str(run.adapters), str(kept), *command(run, "--users", users))
        answer = in_own_mounts(script, *arguments)
    finally:
        del os.environ["ADAPTERS"]
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert f"the store {run.adapters} cannot be written: its disk is full" in answer.stderr
    assert "the same command goes on" in answer.stderr
    assert "Traceback" not in answer.stderr
    run.adapters.rmdir()
    kept.rename(run.adapters)
    before = adapters(run)
    assert 1 <= len(before) < 8, "what fitted is whole"
    assert milp(run, "--users", users).returncode == 0
    assert len(adapters(run)) == 8
    assert before.items() <= adapters(run).items()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["store", "run"])
def test_a_read_only_place_is_told(tmp_path: Path, tiny_llama_dir: Path, mounts: None, what: str) -> None:
    run = prepared_run(tmp_path, tiny_llama_dir)
    users = write_users(tmp_path / "u.jsonl", *(person(f"u-{i}") for i in range(2)))
    run.adapters.mkdir()
    place = run.adapters if what == "store" else run.path
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    answer = in_own_mounts(script, str(place), *command(run, "--users", users))
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert ("it is read-only" if what == "store" else "Read-only file system") in answer.stderr
    assert "the same command goes on" in answer.stderr
    assert str(place) in answer.stderr
    assert "Traceback" not in answer.stderr
    assert milp(run, "--users", users).returncode == 0
    assert set(adapters(run)) == {"u-0", "u-1"}
