"""The store on objects in memory: how many requests it makes, and what happens between two of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from milp_ray.personalize.store import AdapterStore, hash_id
from milp_ray.personalize.store.objects import ObjectBackend
from milp_ray.training.adapters import Adapter


class CountedFiles(fs.FileSystemHandler):
    """Objects in memory that count the requests made to them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests = Counter[str]()

    def get_type_name(self) -> str:
        return "memory"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        self.requests["info"] += 1
        return [fs.FileInfo(path, fs.FileType.Directory) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        self.requests["list"] += 1
        inside = selector.base_dir + "/"
        found = {}
        for path, content in self.objects.items():
            if path.startswith(inside):
                name, deeper, _ = path[len(inside) :].partition("/")
                if selector.recursive or not deeper:
                    found[path] = fs.FileInfo(path, fs.FileType.File, size=len(content))
                else:
                    found[inside + name] = fs.FileInfo(inside + name, fs.FileType.Directory)
        return list(found.values())

    def open_input_stream(self, path: str) -> Any:
        self.requests["read"] += 1
        if path not in self.objects:
            raise FileNotFoundError(path)
        return pa.PythonFile(io.BytesIO(self.objects[path]), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.requests["write"] += 1
        handler = self

        class Object(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    handler.objects[path] = self.getvalue()
                super().close()

        return pa.PythonFile(Object(), mode="w")

    open_append_stream = open_output_stream

    def delete_file(self, path: str) -> None:
        self.requests["delete"] += 1
        self.objects.pop(path)

    def delete_dir(self, path: str) -> None:
        self.requests["delete"] += 1
        for name in [name for name in self.objects if name.startswith(path + "/")]:
            del self.objects[name]

    def _unused(self, *args: Any, **options: Any) -> None:
        raise AssertionError("the store has no use for this request")

    create_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = _unused


@pytest.fixture
def counted() -> tuple[AdapterStore, CountedFiles]:
    handler = CountedFiles()
    store = AdapterStore("s3://bucket/adapters")
    store.backend = ObjectBackend("s3://bucket/adapters", fs.PyFileSystem(handler))
    return store, handler


def requests_of(handler: CountedFiles, use: Callable[[], object]) -> dict[str, int]:
    handler.requests.clear()
    use()
    return dict(handler.requests)


def test_requests_for_one_user_are_the_same_at_ten_and_at_ten_thousand_users(
    counted: tuple[AdapterStore, CountedFiles], adapter: Adapter
) -> None:
    store, handler = counted
    store.publish("u-1", adapter, {}, fingerprint="f")
    one = dict(handler.objects)
    mine = hash_id("u-1")
    uses: list[Callable[[], object]] = [
        lambda: store.load("u-1"),
        lambda: store.has("u-1", "f"),
        lambda: store.publish("u-1", adapter, {}, fingerprint="f"),
        lambda: store.delete("u-1"),
    ]
    found = []
    for n_users in (10, 10_000):
        handler.objects = dict(one)
        for index in range(n_users):
            place = hash_id(f"other {index}")
            for path, content in one.items():
                tail = path.rpartition(mine)[2]
                handler.objects[f"bucket/adapters/{place[:2]}/{place[2:4]}/{place}{tail}"] = content
        found.append([requests_of(handler, use) for use in uses])
    assert found[0] == found[1]
    assert found[0][0] == {"list": 1, "read": 3}
    assert found[0][2] == {"list": 2, "write": 3}


def test_two_writers_that_meet_both_withdraw_and_both_publish(
    counted: tuple[AdapterStore, CountedFiles], adapter: Adapter
) -> None:
    """The other's manifest appears between this writer's look at the numbers and its own manifest."""
    store, handler = counted
    store.publish("u-1", adapter, {}, fingerprint="first")
    plain = handler.open_output_stream
    [manifest] = [path for path in handler.objects if "/v1-" in path]
    folder = manifest.rpartition("/")[0]

    def meeting(path: str, metadata: Any) -> Any:
        if "/v2-" in path:
            handler.objects[f"{folder}/v2-0123456789abcdef.json"] = b"the other's"
        return plain(path, metadata)

    handler.open_output_stream = meeting
    version = store.publish("u-1", adapter, {}, fingerprint="second")
    assert version > 2
    assert store.verify("u-1").fingerprint == "second"
    assert f"{folder}/v2-0123456789abcdef.json" in handler.objects
