from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.store import AdapterDamagedError, AdapterMissingError, AdapterStore, local
from milp_ray.training.adapters import Adapter, attached
from milp_ray.training.base import Base

LAYOUT = CanonicalLayout((False, True, False, True), rank=4)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def weights(adapter: Adapter) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in adapter.tensors.items()}


# -------------------------------------------------------------------------------------------- round trip


def test_a_published_adapter_is_loaded_bit_for_bit(store: AdapterStore, adapter: Adapter) -> None:
    assert store.publish("u-1", adapter, {"steps": 7}, fingerprint="f") == 1
    loaded = store.load("u-1")
    assert weights(loaded) == weights(adapter)
    assert loaded.layout == adapter.layout
    manifest = store.manifest("u-1")
    assert (manifest.user_id, manifest.version, manifest.layout) == ("u-1", 1, LAYOUT)
    assert (manifest.fingerprint, manifest.meta) == ("f", {"steps": 7})
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}


def test_peft_loads_the_folder_with_equal_logits(
    store: AdapterStore, adapter: Adapter, base: Base, tiny_llama_dir: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    store.publish("u-1", adapter, {})
    ids = torch.tensor([base.tokenize(["My dog is red."])[0]])
    with torch.no_grad():
        plain = base.model(ids).logits
        with attached(base, adapter) as model:
            ours = model(ids).logits
        fresh_base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        theirs = PeftModel.from_pretrained(fresh_base, store.folder("u-1"))(ids).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, plain)


def test_versions_count_up_and_the_last_is_current(store: AdapterStore, adapter: Adapter) -> None:
    for expected in (1, 2, 3):
        assert store.publish("u-1", adapter, {}, fingerprint=f"f{expected}") == expected
    assert store.versions("u-1") == [1, 2, 3]
    assert store.has("u-1", "f3")
    assert not store.has("u-1", "f2")
    assert store.manifest("u-1", version=2).fingerprint == "f2"
    with pytest.raises(AdapterMissingError, match="version 4"):
        store.load("u-1", version=4)


def test_version_ten_comes_after_version_nine(store: AdapterStore, adapter: Adapter) -> None:
    for _ in range(11):
        store.publish("u-1", adapter, {})
    assert store.manifest("u-1").version == 11


def test_unknown_users_are_named_and_nothing_is_made(store: AdapterStore) -> None:
    with pytest.raises(AdapterMissingError, match='no adapter of user "nobody"'):
        store.load("nobody")
    assert not store.has("nobody", "f")
    assert not store.delete("nobody")
    assert list(store.users()) == []
    assert not store.root.exists()


def test_deletion_takes_all_versions_of_one_user_only(store: AdapterStore, adapter: Adapter) -> None:
    for user_id in ("u-1", "u-1", "u-2"):
        store.publish(user_id, adapter, {})
    assert store.delete("u-1")
    assert not store.delete("u-1")
    assert list(store.users()) == ["u-2"]
    store.verify("u-2")
    assert len(list(store.root.rglob("adapter_model.safetensors"))) == 1


def test_an_interrupted_deletion_is_finished_by_the_next(
    store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("u-1", adapter, {})

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.delete("u-1")
    assert store.versions("u-1") == []
    assert store.delete("u-1")
    assert not list(store.root.rglob("*.safetensors"))


# --------------------------------------------------------------------------------------------- atomicity


def kill_at(point: str, store: AdapterStore, adapter: Adapter) -> None:
    """Publish in a forked child that gets SIGKILL at a point inside ``publish``."""
    child = os.fork()
    if child == 0:
        write = local._write_synced

        def dying_write(path: Path, content: bytes) -> None:
            if path.name == point:  # a part of it reaches the disk
                path.write_bytes(content[:40])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)

        def dying_sync(path: Path) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        local._write_synced = dying_write
        if point == "before the rename":
            local.sync_folder = dying_sync
        try:
            store.publish("u-1", adapter, {}, fingerprint="new")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize(
    "point", ["adapter_model.safetensors", "adapter_config.json", "manifest.json", "before the rename"]
)
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_kill_while_publishing_leaves_what_was_there(
    store: AdapterStore, adapter: Adapter, point: str, earlier: int
) -> None:
    for _ in range(earlier):
        store.publish("u-1", adapter, {}, fingerprint="old")
    kill_at(point, store, adapter)
    assert list(store.root.rglob(".new-*")), "the kill came too early to test anything"
    assert store.versions("u-1") == [1][:earlier]
    assert list(store.users()) == ["u-1"][:earlier]
    assert not store.has("u-1", "new")
    assert store.has("u-1", "old") == bool(earlier)
    assert store.publish("u-1", adapter, {}, fingerprint="new") == earlier + 1
    assert store.has("u-1", "new")


def test_what_a_killed_writer_left_is_removed_once_it_is_old(store: AdapterStore, adapter: Adapter) -> None:
    kill_at("manifest.json", store, adapter)
    [leftover] = store.root.rglob(".new-*")
    store.publish("u-1", adapter, {})
    assert leftover.exists(), "it could be of a writer that is at work"
    os.utime(leftover, (0, 0))
    store.publish("u-1", adapter, {})
    assert not leftover.exists()


def test_writers_of_one_user_at_the_same_time_all_publish(
    store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see version 1 as free: the later rename must not replace the earlier one."""
    answers = iter([{}, {1: "v1"}])
    store.publish("u-1", adapter, {}, fingerprint="first")
    with monkeypatch.context() as patch:
        patch.setattr(local.LocalBackend, "find", lambda self, place: next(answers))
        assert store.publish("u-1", adapter, {}, fingerprint="second") == 2
    assert store.versions("u-1") == [1, 2]
    assert store.manifest("u-1", version=1).fingerprint == "first"
    assert store.verify("u-1").fingerprint == "second"


# ------------------------------------------------------------------------------------------------ damage


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
def test_damage_is_detected_and_named(
    store: AdapterStore, adapter: Adapter, damage: Callable[[Path], None], name: str
) -> None:
    store.publish("u-1", adapter, {}, fingerprint="f")
    before = (store.folder("u-1") / name).read_bytes()
    damage(store.folder("u-1") / name)
    for read in (store.load, store.folder, store.verify):
        with pytest.raises(AdapterDamagedError, match=f'user "u-1", version 1: {name} '):
            read("u-1")
    assert not store.has("u-1", "f"), "a rerun makes it again"
    [damaged] = store.root.rglob("v1")
    (damaged / name).write_bytes(before)
    assert store.has("u-1", "f")


def test_every_flipped_byte_of_a_manifest_is_detected(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {"steps": 12}, fingerprint="f")
    path = store.folder("u-1") / "manifest.json"
    sound = path.read_bytes()
    for position in range(0, len(sound)):
        content = bytearray(sound)
        content[position] ^= 0x01
        path.write_bytes(content)
        assert not store.has("u-1", "f"), sound[position : position + 20]


def test_a_folder_moved_to_another_user_is_refused(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {})
    store.publish("u-2", adapter, {})
    mine, other = store.folder("u-1"), store.folder("u-2")
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    with pytest.raises(AdapterDamagedError, match="belongs to another place"):
        store.load("u-1")


# ------------------------------------------------------------------------------------------- hostile ids

HOSTILE = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "\0",
    "a\0b",
    "x" * 5000,
    "\ud800",
    "🙂" * 90,
]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(user_id=st.text(st.characters(), max_size=40), other=st.text(st.characters(), max_size=40))
def test_any_id_stays_inside_the_store_and_comes_back(
    tmp_path: Path, adapter: Adapter, user_id: str, other: str
) -> None:
    _check_id(tmp_path, adapter, user_id, other)


@pytest.mark.parametrize("user_id", HOSTILE, ids=repr)
def test_hostile_ids_stay_inside_the_store(tmp_path: Path, adapter: Adapter, user_id: str) -> None:
    _check_id(tmp_path, adapter, user_id, "u-1")


def _check_id(tmp_path: Path, adapter: Adapter, user_id: str, other: str) -> None:
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    store = AdapterStore(root)
    store.publish(user_id, adapter, {}, fingerprint="f")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    folder = store.folder(user_id)
    assert folder.resolve().is_relative_to(root.resolve())
    assert len(folder.relative_to(root).parts) == 4
    assert list(store.users()) == [user_id]
    assert store.has(user_id, "f")
    assert store.has(other, "f") == (other == user_id)
    assert store.delete(user_id)
    assert not list(root.rglob("*.*")), "nothing of the user is left"


def test_messages_show_an_id_escaped_and_cut(store: AdapterStore) -> None:
    with pytest.raises(AdapterMissingError) as caught:
        store.load("\x1b[31m\n" + "x" * 10_000)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
