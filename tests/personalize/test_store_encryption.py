"""Adapters encrypted at rest: what can be read with the key, without it, and with another one."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milp_ray.config.personalize import EncryptionSection, PersonalizeSection
from milp_ray.personalize.store import AdapterDamagedError, AdapterStore, KeyProblemError, run_store, survey
from milp_ray.personalize.store.encryption import Cipher, KeySource
from milp_ray.training.adapters import Adapter, load_adapter

KEY = "MILP_TEST_KEY"
META = {"validation_loss": 1.2507918346, "n_turns": 41}
USER = "alice@example.org"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> KeySource:
    monkeypatch.setenv(KEY, base64.b64encode(bytes(range(32))).decode())
    return KeySource("variable", KEY)


@pytest.fixture
def store(tmp_path: Path, key: KeySource, adapter: Adapter) -> AdapterStore:
    store = AdapterStore(tmp_path / "adapters", key=key)
    store.publish(USER, adapter, META, fingerprint="f")
    return store


def weights(adapter: Adapter) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in adapter.tensors.items()}


def files(store: AdapterStore) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.is_file())


def test_with_the_key_everything_comes_back(store: AdapterStore, adapter: Adapter) -> None:
    again = pickle.loads(pickle.dumps(store))
    assert weights(again.load(USER)) == weights(adapter)
    assert again.manifest(USER).meta == META
    assert again.has(USER, "f")
    assert list(again.users()) == [USER]


def test_what_stands_in_the_files_says_nothing_of_the_user(store: AdapterStore, adapter: Adapter) -> None:
    for path in files(store):
        content = path.read_bytes()
        for word in (
            USER.encode(),
            b"validation_loss",
            b"n_turns",
            b"lora_A",
            b"target_modules",
            b"1.2507918346",
        ):
            assert word not in content, path.name
        assert not any(tensor[:32] in content for tensor in weights(adapter).values())


def test_the_key_itself_is_nowhere(store: AdapterStore) -> None:
    secret, text = bytes(range(32)), base64.b64encode(bytes(range(32)))
    for content in [pickle.dumps(store), *(path.read_bytes() for path in files(store))]:
        assert secret not in content
        assert text not in content
    assert text.decode() not in repr(store.key) + repr(store._cipher)


def test_two_equal_adapters_are_stored_as_different_bytes(store: AdapterStore, adapter: Adapter) -> None:
    store.publish(USER, adapter, META, fingerprint="f")
    first, second = ((store.root.rglob(f"v{n}/adapter_model.safetensors")) for n in (1, 2))
    assert next(first).read_bytes() != next(second).read_bytes()


def test_without_a_key_the_store_says_what_is_needed(store: AdapterStore) -> None:
    bare = AdapterStore(store.uri)
    for read in (lambda: bare.load(USER), lambda: bare.has(USER, "f"), lambda: list(bare.users())):
        with pytest.raises(KeyProblemError, match=r"no key is given; name its variable in personalize\.enc"):
            read()


def test_a_wrong_key_is_told_apart_from_damage(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "ff" * 32)
    other = AdapterStore(store.uri, key=store.key)
    with pytest.raises(
        KeyProblemError, match=f"the variable {KEY} holds the key [0-9a-f]{{12}}; give the key"
    ):
        other.load(USER)


def test_the_store_is_checked_without_the_key(store: AdapterStore) -> None:
    bare = AdapterStore(store.uri)
    found = survey.Findings()
    assert list(survey.verify_store(bare, found)) == []
    assert (found.users, found.versions, found.damaged) == (1, 1, 0)
    [entry] = survey.entries(bare)
    assert entry.name.startswith("#")
    assert USER not in repr(entry)
    path = next(store.root.rglob("adapter_config.json"))
    path.write_bytes(path.read_bytes()[:-1])
    [(who, what)] = survey.verify_store(bare, survey.Findings())
    assert who == entry.name
    assert "adapter_config.json has" in what


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_detected(store: AdapterStore, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files(store)))
    sound = path.read_bytes()
    position = data.draw(st.integers(0, len(sound) - 1))
    flip = data.draw(st.integers(1, 255))
    path.write_bytes(sound[:position] + bytes([sound[position] ^ flip]) + sound[position + 1 :])
    try:
        with pytest.raises(AdapterDamagedError, match=path.name):
            store.load(USER)
    finally:
        path.write_bytes(sound)


def test_a_forger_without_the_key_is_found_out(store: AdapterStore) -> None:
    """The manifest's own hash can be made anew by anybody; the seal cannot."""
    from milp_ray.personalize.store.manifest import _encode

    path = next(store.root.rglob("manifest.json"))
    body = json.loads(path.read_bytes())
    del body["sha256"]
    path.write_bytes(_encode({**body, "created": "2020-01-01T00:00:00.000+00:00"}))
    with pytest.raises(AdapterDamagedError, match="changed by someone without the key"):
        store.load(USER)


def test_a_file_of_another_user_does_not_stand_in(store: AdapterStore, adapter: Adapter) -> None:
    """Also where its hash in the manifest is made to fit: a sealed file knows whose it is."""
    store.publish("bob", adapter, {})
    cipher = store._cipher
    assert cipher is not None
    mine, bobs = (
        next((store.root / store.backend.folder(place)).rglob("adapter_config.json"))
        for place in (survey.hash_id(USER), survey.hash_id("bob"))
    )
    with pytest.raises(ValueError, match="not what was sealed"):
        cipher.open(bobs.read_bytes(), f"milp_ray adapter\0{survey.hash_id(USER)}\0{mine.name}".encode())


def test_a_private_copy_is_made_for_peft(store: AdapterStore, adapter: Adapter) -> None:
    folder = store.folder(USER)
    assert not folder.is_relative_to(store.root)
    assert folder.stat().st_mode & 0o077 == 0
    assert weights(load_adapter(folder)) == weights(adapter)


def test_adapters_in_the_clear_are_read_counted_and_rewritten(
    tmp_path: Path, key: KeySource, adapter: Adapter
) -> None:
    plain = AdapterStore(tmp_path / "adapters")
    for user_id in ("u-1", "u-2"):
        plain.publish(user_id, adapter, META, fingerprint="f")
    store = AdapterStore(tmp_path / "adapters", key=key)
    assert weights(store.load("u-1")) == weights(adapter)
    found = survey.Findings()
    assert list(survey.verify_store(store, found)) == []
    assert found.in_the_clear == 2
    assert sorted(survey.rewrite(store)) == [("u-1", 2), ("u-2", 2)]
    assert list(survey.rewrite(store)) == []
    assert store.versions("u-1") == [2]
    assert store.manifest("u-1").meta == META
    assert store.has("u-1", "f")
    assert not any(b"lora_A" in path.read_bytes() for path in files(store))


# ------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("encode", [bytes.hex, lambda key: base64.b64encode(key).decode() + "\n"])
def test_a_key_is_read_from_a_file_in_either_notation(tmp_path: Path, encode: Callable[[bytes], str]) -> None:
    (tmp_path / "key").write_text(encode(bytes(range(32))))
    section = EncryptionSection(key_file=tmp_path / "key")
    store = run_store(tmp_path / "adapters", PersonalizeSection(encryption=section))
    assert store.key is not None
    assert store.key.cipher().key_id == Cipher(bytes(range(32)), "test").key_id


@pytest.mark.parametrize("text", ["short", "00" * 31, "ü", base64.b64encode(bytes(33)).decode()])
def test_a_key_that_is_none_is_refused_without_being_shown(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY, text)
    with pytest.raises(KeyProblemError, match=r"32 bytes in base64 \(44 characters\)") as caught:
        AdapterStore(tmp_path, key=KeySource("variable", KEY)).check()
    assert text not in str(caught.value)


def test_a_missing_key_is_named_before_any_work(tmp_path: Path) -> None:
    for source, message in (
        (
            KeySource("variable", "MILP_NO_SUCH"),
            "MILP_NO_SUCH, which is to hold the encryption key, is not set",
        ),
        (KeySource("file", str(tmp_path / "none")), "there is no file .*none"),
    ):
        with pytest.raises(KeyProblemError, match=message):
            AdapterStore(tmp_path / "adapters", key=source).check()


def test_a_user_moved_in_the_store_is_refused(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("bob", adapter, {})
    mine, bobs = (store.backend.folder(survey.hash_id(user)) / "v1" for user in (USER, "bob"))
    shutil.rmtree(mine)
    shutil.copytree(bobs, mine)
    with pytest.raises(AdapterDamagedError, match="belongs to another place"):
        store.load(USER)
