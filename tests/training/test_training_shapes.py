"""Feed-forward sizes are the same from the weights' headers, from the configuration, and as loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milp_ray.config.base import BaseSection
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


def test_torch_is_not_imported_for_a_folder(tiny_llama_dir: Path) -> None:
    code = (
        "import sys\nfrom milp_ray.config.base import BaseSection\n"
        "from milp_ray.training.shapes import base_shapes\n"
        "base_shapes(BaseSection(model=sys.argv[1]))\nprint('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_llama_dir)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
