"""``milp-ray compare``: what it prints for programs, and what may change on a run that has been compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.inline import InlinePool, use_inline_pool
from support.runs import write_small_run
from typer.testing import CliRunner

from milp_ray.cli import app


@pytest.fixture
def pool(base: Any, monkeypatch: pytest.MonkeyPatch) -> InlinePool:
    return use_inline_pool(monkeypatch, base)


@pytest.fixture
def config(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    section = {"methods": ["base", "shared_adapter"], "n_seeds": 1, "layout": {"layers": [1], "rank": 2}}
    return write_small_run(tmp_path, tiny_llama_dir, compare=section)


def compared(config: Path, *settings: str) -> Any:
    """What the command prints as JSON: all of its standard output."""
    called = CliRunner().invoke(app, ["compare", str(config), *settings, "--json"])
    assert called.exit_code == 0, called.output
    return json.loads(called.stdout)


def test_standard_output_is_json_and_nothing_else(config: Path, pool: InlinePool) -> None:
    found = compared(config)
    assert found["methods"] == ["base", "shared_adapter"]
    assert found["n_seeds"] == 1


def test_other_methods_seeds_and_layouts_may_be_compared_on_the_same_run(
    config: Path, pool: InlinePool
) -> None:
    first = compared(config)
    pool.keys.clear()
    again = compared(config, "compare.methods=[base,retrieval_recency]", "compare.n_seeds=2")
    assert again["methods"] == ["base", "retrieval_recency"]
    assert again["scores"].keys() == {"base", "retrieval_recency"}
    assert again["scores"]["base"] == first["scores"]["base"]
    assert not [key for key in pool.keys if key.startswith("base")]
    other = compared(config, "compare.layout.rank=4", "compare.methods=[shared_adapter]")
    alone = compared(config, "name=alone", "compare.layout.rank=4", "compare.methods=[shared_adapter]")
    assert other["scores"] == alone["scores"]
    pool.keys.clear()
    assert compared(config)["scores"] == first["scores"]
    assert [key for key in pool.keys if key.startswith("shared")]  # the other layout's took its place
