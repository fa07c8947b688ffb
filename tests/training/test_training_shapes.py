"""Feed-forward sizes are the same from the weights' headers, from the configuration, and as loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.errors import MilpError
from milp_ray.memory.architecture import ffn_shapes_of_config, ffn_spec
from milp_ray.training import shapes
from milp_ray.training.base import load_base, model_config


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_all_three_ways_agree(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{name}_dir")
    section = BaseSection(model=str(folder), device="cpu")
    config = model_config(section)
    loaded = load_base(section).shapes
    assert ffn_shapes_of_config(config, ffn_spec(config)) == loaded
    assert shapes._in_headers(folder, None) == loaded
    assert shapes.base_shapes(section) == loaded


def test_named_modules_are_the_ones_that_count(tiny_llama_dir: Path) -> None:
    section = BaseSection(model=str(tiny_llama_dir), ffn_modules=("mlp.down_proj",))
    assert shapes.base_shapes(section).modules == (("mlp.down_proj", 64, 32),)


def test_headers_that_do_not_hold_the_maps_settle_nothing(tiny_llama_dir: Path) -> None:
    assert shapes._in_headers(tiny_llama_dir, ("mlp.nothing",)) is None


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def _damaged(source: Path, folder: Path, name: str, content: bytes) -> BaseSection:
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    return BaseSection(model=str(folder), device="cpu")


@pytest.mark.parametrize("n_bytes", [0, 5, 100, 20_000])
def test_weights_that_are_cut_off_are_told_when_they_are_loaded(
    n_bytes: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    whole = (tiny_llama_dir / "model.safetensors").read_bytes()
    section = _damaged(tiny_llama_dir, tmp_path / "short", "model.safetensors", whole[:n_bytes])
    assert shapes.base_shapes(section).n_layers == 4
    with pytest.raises(MilpError, match=r"base\.model .* damaged or not whole"):
        load_base(section)


def test_a_git_lfs_pointer_is_told_with_how_to_fetch_weights(tiny_llama_dir: Path, tmp_path: Path) -> None:
    section = _damaged(tiny_llama_dir, tmp_path / "pointer", "model.safetensors", _POINTER)
    assert shapes.base_shapes(section).n_layers == 4, "the configuration settles it"
    with pytest.raises(MilpError, match=r"Git LFS pointer\? Run `git lfs pull`"):
        load_base(section)


@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"\xff\xfe", _POINTER])
def test_a_damaged_configuration_is_told(content: bytes, tiny_llama_dir: Path, tmp_path: Path) -> None:
    section = _damaged(tiny_llama_dir, tmp_path / "damaged", "config.json", content)
    for read in (shapes.base_shapes, load_base):
        with pytest.raises(MilpError, match=r"base\.model .* cannot be loaded"):
            read(section)


def test_torch_is_not_imported_for_a_folder(tiny_llama_dir: Path) -> None:
    code = (
        "import sys\nfrom milp_ray.config.base import BaseSection\n"
        "from milp_ray.training.shapes import base_shapes\n"
        "base_shapes(BaseSection(model=sys.argv[1]))\nprint('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_llama_dir)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
