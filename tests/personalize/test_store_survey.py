"""Going through a store: what is found, what is collected, and what a read costs in a large one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milp_ray.errors import MilpError
from milp_ray.personalize.store import (
    AdapterDamagedError,
    AdapterStore,
    StoreUnavailableError,
    hash_id,
    local,
    survey,
)
from milp_ray.training.adapters import Adapter


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def problems(store: AdapterStore, **options: list[str]) -> tuple[dict[str, str], survey.Findings]:
    found = survey.Findings()
    return dict(survey.verify_store(store, found, **options)), found


# ------------------------------------------------------------------------------------------------ finding


def test_damage_of_any_version_is_found_and_named(store: AdapterStore, adapter: Adapter) -> None:
    for user_id in ("u-1", "u-1", "u-2"):
        store.publish(user_id, adapter, {})
    assert problems(store) == ({}, survey.Findings(users=2, versions=3, n_bytes=problems(store)[1].n_bytes))
    for path in store.root.rglob("v1/adapter_config.json"):
        if hash_id("u-1") in str(path):
            path.unlink()
    for path in store.root.rglob("v1/manifest.json"):
        if hash_id("u-2") in str(path):
            path.unlink()
    found, counts = problems(store)
    assert "adapter_config.json is missing" in found[f"#{hash_id('u-1')[:12]}"]
    assert "manifest.json is missing" in found[f"#{hash_id('u-2')[:12]}"]
    assert (counts.users, counts.versions, counts.damaged) == (2, 3, 2)
    assert list(problems(store, user_ids=["u-2"])[0]) == [f"#{hash_id('u-2')[:12]}"]
    by_place = {entry.place: entry for entry in survey.entries(store)}
    assert by_place[hash_id("u-2")].manifest is None
    assert by_place[hash_id("u-1")].versions == (1, 2)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_changed_or_lost_byte_of_any_file_is_detected(
    tmp_path: Path, adapter: Adapter, data: st.DataObject
) -> None:
    store = AdapterStore(tmp_path / "one")
    if not store.versions("u-1"):
        store.publish("u-1", adapter, {"steps": 7, "base": "Ünïcode"}, fingerprint="f")
    path = data.draw(st.sampled_from(sorted(p for p in store.root.rglob("*") if p.is_file())))
    sound = path.read_bytes()
    position = data.draw(st.integers(0, len(sound) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "drop", "add"]))
    flipped = bytes([sound[position] ^ data.draw(st.integers(1, 255))])
    path.write_bytes(
        {
            "flip": sound[:position] + flipped + sound[position + 1 :],
            "cut": sound[:position],
            "drop": sound[:position] + sound[position + 1 :],
            "add": sound[:position] + b" " + sound[position:],
        }[change]
    )
    try:
        with pytest.raises(AdapterDamagedError, match=path.name):
            store.load("u-1")
    finally:
        path.write_bytes(sound)
    assert store.has("u-1", "f")


def test_manifests_of_format_1_are_read(store: AdapterStore, adapter: Adapter) -> None:
    from milp_ray.personalize.store.manifest import _encode

    store.publish("u-1", adapter, {"steps": 7}, fingerprint="f")
    [path] = store.root.rglob("manifest.json")
    body = json.loads(path.read_bytes())
    for name in ("sha256", "precision"):
        del body[name]
    path.write_bytes(_encode({**body, "format": 1}))
    assert store.has("u-1", "f")
    assert store.manifest("u-1").precision == {"name": "float32"}
    path.write_bytes(_encode({**body, "format": 3}))
    with pytest.raises(MilpError, match="has format 3, this version reads 2 and older"):
        store.load("u-1")


# --------------------------------------------------------------------------------------------- collecting


def test_only_what_is_unfinished_and_old_is_collected(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {})
    place = store.backend.folder(hash_id("u-1"))
    for name in (".new-1-young", ".new-1-old"):
        shutil.copytree(place / "v1", place / name)
    os.utime(place / ".new-1-old", (0, 0))
    (place.parent / f".deleted-{hash_id('gone')}-x").mkdir()
    dry = survey.collect(store, dry_run=True)
    assert (dry.unfinished, dry.too_young) == (1, 1)
    done = survey.collect(store)
    assert (done.unfinished, done.too_young, done.n_bytes) == (1, 1, dry.n_bytes)
    assert sorted(path.name for path in place.iterdir()) == [".new-1-young", "v1"]
    assert survey.collect(store, older_than_seconds=-60).unfinished == 1
    assert store.verify("u-1").version == 1


def test_an_interrupted_deletion_is_finished_by_collecting(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {})
    place = store.backend.folder(hash_id("u-1"))
    place.rename(place.with_name(f".deleted-{place.name}-0123"))
    assert list(store.users()) == []
    assert problems(store)[1].unfinished == 1
    assert survey.collect(store).unfinished == 1
    assert not list(store.root.rglob("*.safetensors"))


def test_the_newest_versions_are_kept_unless_the_current_one_is_damaged(
    store: AdapterStore, adapter: Adapter
) -> None:
    for user_id in ("u-1", "u-2"):
        for _ in range(3):
            store.publish(user_id, adapter, {})
    next(store.backend.folder(hash_id("u-2")).glob("v3/*.safetensors")).write_bytes(b"")
    removed = survey.collect(store, keep=2)
    assert (removed.versions, removed.needed) == (1, 1)
    assert store.versions("u-1") == [2, 3]
    assert store.versions("u-2") == [1, 2, 3]
    assert store.publish("u-1", adapter, {}) == 4


# --------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "its disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "Input/output error")],
)
def test_a_disk_that_refuses_is_named_and_what_was_there_stays(
    store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    store.publish("u-1", adapter, {}, fingerprint="f")
    plain = local._write_synced

    def refusing(path: Path, content: bytes) -> None:
        if path.name == "adapter_config.json":
            raise OSError(number, os.strerror(number))
        plain(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(local, "_write_synced", refusing)
        with pytest.raises(StoreUnavailableError, match=message):
            store.publish("u-1", adapter, {}, fingerprint="g")
    assert store.versions("u-1") == [1]
    assert store.has("u-1", "f")
    assert not list(store.root.rglob(".new-*"))


def test_a_file_in_the_place_of_the_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("")
    with pytest.raises(StoreUnavailableError, match="is a file; give a folder"):
        AdapterStore(tmp_path / "adapters").check()


# --------------------------------------------------------------------------------------------------- costs

_calls: Counter[str] = Counter()
_counting = False


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if _counting and event in {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"}:
        _calls[event] += 1


@pytest.fixture(scope="module")
def calls_of() -> Callable[[Callable[[], object]], dict[str, int]]:
    """``calls_of(use)``: the calls to the file system that ``use`` makes; Python tells of every one."""
    sys.addaudithook(_count)  # which cannot be taken off again

    def count(use: Callable[[], object]) -> dict[str, int]:
        global _counting
        _calls.clear()
        _counting = True
        try:
            use()
        finally:
            _counting = False
        return dict(_calls)

    return count


def test_a_read_costs_the_same_at_ten_and_at_ten_thousand_users(
    store: AdapterStore, adapter: Adapter, calls_of: Callable[[Callable[[], object]], dict[str, int]]
) -> None:
    store.publish("u-1", adapter, {}, fingerprint="f")
    folder = store.folder("u-1")
    uses: list[Callable[[], object]] = [
        lambda: store.load("u-1"),
        lambda: store.has("u-1", "f"),
        lambda: store.versions("nobody"),
        lambda: store.publish("u-2", adapter, {}),
        lambda: store.delete("u-2"),
    ]
    for use in uses:
        use()  # what is imported at the first call is not counted
    found = []
    for n_users in (10, 10_000):
        for index in range(n_users):
            place = store.backend.folder(hash_id(f"other {index}")) / "v1"
            if not place.exists():
                place.mkdir(parents=True)
                os.link(folder / "manifest.json", place / "manifest.json")
        found.append([calls_of(use) for use in uses])
    assert found[0] == found[1]
    assert found[0][0] == {"os.listdir": 1, "open": 3}
    largest = max(len(os.listdir(path)) for path in [store.root, *store.root.iterdir()])
    assert largest <= 256
