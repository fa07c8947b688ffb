"""The store in an object storage, on a local S3 server."""

from __future__ import annotations

import http.server
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from milp_ray.buckets import Bucket
from milp_ray.errors import MilpError
from milp_ray.personalize.store import (
    AdapterDamagedError,
    AdapterMissingError,
    AdapterStore,
    StoreUnavailableError,
    hash_id,
    survey,
)
from milp_ray.training.adapters import Adapter


def weights(adapter: Adapter) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in adapter.tensors.items()}


@pytest.fixture
def store(s3: str, request: pytest.FixtureRequest) -> AdapterStore:
    """A store of its own for each test."""
    return AdapterStore(f"s3://bucket/{request.node.name.partition('[')[0]}/{id(request)}?{s3}")


def files_of(store: AdapterStore) -> Any:
    return store.backend._bucket._files


def objects(store: AdapterStore) -> dict[str, Any]:
    """Path → information on every object of the store."""
    infos = files_of(store).get_file_info(
        fs.FileSelector(store.backend._root, recursive=True, allow_not_found=True)
    )
    return {info.path: info for info in infos if info.is_file}


def read(store: AdapterStore, path: str) -> bytes:
    with files_of(store).open_input_stream(path) as file:
        return bytes(file.read())


def write(store: AdapterStore, path: str, content: bytes) -> None:
    with files_of(store).open_output_stream(path) as file:
        file.write(content)


# --------------------------------------------------------------------------------------------- on a server


def test_adapters_come_back_bit_for_bit_and_versions_count_up(store: AdapterStore, adapter: Adapter) -> None:
    assert store.versions("u-1") == []
    assert store.publish("u-1", adapter, {"steps": 7}, fingerprint="f") == 1
    assert store.publish("u-1", adapter, {}, fingerprint="g") == 2
    assert store.publish("../u 2/\0", adapter, {}) == 1
    again = pickle.loads(pickle.dumps(store))  # as Ray sends it to workers
    assert weights(again.load("u-1")) == weights(adapter)
    assert again.versions("u-1") == [1, 2]
    assert again.manifest("u-1", version=1).meta == {"steps": 7}
    assert (again.has("u-1", "g"), again.has("u-1", "f")) == (True, False)
    assert sorted(again.users()) == ["../u 2/\0", "u-1"]
    with pytest.raises(AdapterMissingError, match='no adapter of user "nobody"'):
        again.load("nobody")


def test_peft_gets_a_private_copy(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {})
    folder = store.folder("u-1")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert folder.stat().st_mode & 0o077 == 0


def test_a_deleted_user_leaves_no_object_and_no_name(store: AdapterStore, adapter: Adapter) -> None:
    for user_id in ("u-1", "u-1", "u-2"):
        store.publish(user_id, adapter, {})
    assert store.delete("u-1")
    assert not store.delete("u-1")
    assert list(store.users()) == ["u-2"]
    root = store.backend._root
    everything = files_of(store).get_file_info(fs.FileSelector(root, recursive=True))
    assert not [info.path for info in everything if hash_id("u-1") in info.path]


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"])
def test_damage_is_detected_and_named(store: AdapterStore, adapter: Adapter, name: str) -> None:
    store.publish("u-1", adapter, {}, fingerprint="f")
    [path] = [p for p in objects(store) if p.endswith(name) or (name == "manifest.json" and "/v1-" in p)]
    sound = read(store, path)
    for content in (flipped(sound), sound[:-3], b""):
        write(store, path, content)
        with pytest.raises(AdapterDamagedError, match=f'user "u-1", version 1: {name} '):
            store.load("u-1")
        assert not store.has("u-1", "f")
    write(store, path, sound)
    assert store.has("u-1", "f")


def test_a_lost_file_and_a_lost_manifest_are_named(store: AdapterStore, adapter: Adapter) -> None:
    store.publish("u-1", adapter, {})
    [config] = [path for path in objects(store) if path.endswith("adapter_config.json")]
    content = read(store, config)
    files_of(store).delete_file(config)
    with pytest.raises(AdapterDamagedError, match=r"adapter_config\.json is missing"):
        store.load("u-1")
    write(store, config, content)
    [manifest] = [path for path in objects(store) if "/v1-" in path]
    files_of(store).delete_file(manifest)
    with pytest.raises(AdapterMissingError):
        store.load("u-1")
    [leftover] = store.backend.leftovers(hash_id("u-1"))
    assert leftover.n_bytes > len(content)


class Killed(BaseException):
    """In the place of a signal: nothing that the writer would still do is done."""


@pytest.mark.parametrize("n_written", [0, 1, 2])
def test_a_kill_while_publishing_leaves_what_was_there(
    store: AdapterStore, adapter: Adapter, n_written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("u-1", adapter, {}, fingerprint="old")
    plain, calls = Bucket.write, Counter[str]()

    def dying(self: Bucket, path: str, content: bytes) -> None:
        calls["write"] += 1
        if calls["write"] > n_written:
            raise Killed
        plain(self, path, content)

    def dead(self: Bucket, path: str) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", dying)
        patch.setattr(Bucket, "delete_folder", dead)
        with pytest.raises(Killed):
            store.publish("u-1", adapter, {}, fingerprint="new")
    assert store.versions("u-1") == [1]
    assert store.has("u-1", "old")
    found = survey.collect(store, older_than_seconds=-60.0)
    assert found.unfinished == (n_written > 0)
    assert len(objects(store)) == 3
    assert store.publish("u-1", adapter, {}, fingerprint="new") == 2


def test_writers_of_one_user_at_the_same_time_all_publish(store: AdapterStore, adapter: Adapter) -> None:
    barrier = threading.Barrier(4)

    def publish(number: int) -> int:
        barrier.wait()
        return store.publish("u-1", adapter, {}, fingerprint=f"f{number}")

    with ThreadPoolExecutor(4) as threads:
        versions = list(threads.map(publish, range(4)))
    assert sorted(versions) == store.versions("u-1")
    assert len(set(versions)) == 4
    for number, version in enumerate(versions):
        assert store.verify("u-1", version=version).fingerprint == f"f{number}"


def test_a_manifest_whose_answer_is_lost_does_not_outlive_its_files(
    store: AdapterStore, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish("u-1", adapter, {}, fingerprint="old")
    plain = Bucket.write

    def answerless(self: Bucket, path: str, content: bytes) -> None:
        plain(self, path, content)
        if "/v2-" in path:
            raise StoreUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", answerless)
        with pytest.raises(StoreUnavailableError):
            store.publish("u-1", adapter, {}, fingerprint="new")
    assert store.has("u-1", "old")
    assert len(objects(store)) == 3


# ------------------------------------------------------------------------------------------ what goes wrong


def test_a_missing_bucket_is_named(s3: str, adapter: Adapter) -> None:
    store = AdapterStore(f"s3://nowhere/adapters?{s3}")
    for use in (lambda: store.load("u-1"), lambda: store.publish("u-1", adapter, {}), store.check):
        with pytest.raises(StoreUnavailableError, match="there is no bucket 'nowhere'; make it"):
            use()


def test_a_server_that_does_not_answer_is_named(s3: str) -> None:
    store = AdapterStore("s3://bucket/adapters?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(StoreUnavailableError, match=r"the server at 127\.0\.0\.1:9 does not answer"):
        store.load("u-1")


class Refusing(http.server.BaseHTTPRequestHandler):
    """What S3 answers somebody without the right credentials."""

    def _refuse(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def refusing_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_missing_rights_say_where_credentials_come_from(
    s3: str, refusing_server: str, adapter: Adapter
) -> None:
    uri = f"s3://bucket/adapters?endpoint_override={refusing_server}&scheme=http&region=us-east-1"
    store = AdapterStore(uri)
    for use in (lambda: store.load("u-1"), lambda: store.publish("u-1", adapter, {}), store.check):
        with pytest.raises(StoreUnavailableError, match=r"access is denied.*AWS_ACCESS_KEY_ID"):
            use()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/x", "begins with ftp://; give a folder, s3://BUCKET"),
        ("s3:///x", "names no bucket"),
        ("s3://key:secret@bucket/x", "credentials come from the environment"),
        ("s3://bucket/x?acl=public", "unknown option 'acl'; allowed after '\\?': region"),
        ("file://host/x", "names no folder"),
        (" ", "is empty"),
    ],
)
def test_a_uri_that_no_store_can_have_is_refused(uri: str, message: str) -> None:
    with pytest.raises(MilpError, match=message) as caught:
        AdapterStore(uri)
    assert "secret" not in str(caught.value)


def test_a_file_uri_is_a_folder(tmp_path: Path, adapter: Adapter) -> None:
    AdapterStore(f"file://{tmp_path}/adapters").publish("u-1", adapter, {})
    assert AdapterStore(tmp_path / "adapters").versions("u-1") == [1]
