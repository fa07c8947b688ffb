"""cluster/README.md: its commands name what exists, and its sizes and versions are those of the files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster" / "README.md").read_text("utf-8")
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"(?:^    .+\n)+", TEXT, re.M)]
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines()]
RAY_COMMANDS = [line for line in COMMANDS if line.startswith("ray ")]
LAUNCHER_FILES = ("gcp.yaml", "azure.yaml", "aws.yaml", "local.yaml")


def test_every_file_that_it_names_exists() -> None:
    named = set(
        re.findall(r"\b(?:cluster|tests)/[\w./-]*\w|\bexperiments/\w+\.yaml|\bconstraints\.txt", TEXT)
    )
    assert len(named) > 10
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()


def test_every_file_of_the_folder_is_in_its_table() -> None:
    table = {
        name for row in re.findall(r"^\| (`.+?) \|", TEXT, re.M) for name in re.findall(r"`([^`]+)`", row)
    }
    there = {
        str(path.relative_to(ROOT / "cluster")) for path in (ROOT / "cluster").rglob("*") if path.is_file()
    }
    pictures = {name for name in there if name.startswith("images/")}
    assert there - table - pictures == {"README.md", "Dockerfile.dockerignore"}


@pytest.mark.parametrize("command", RAY_COMMANDS)
def test_ray_has_the_subcommands_and_options(command: str) -> None:
    import click
    from ray.scripts.scripts import cli

    words = shlex.split(command.split(" > ")[0].split(" && ")[0])
    found: Any = cli
    while isinstance(found, click.Group):
        words = words[1:]
        assert words[0] in found.commands, command
        found = found.commands[words[0]]
    found.make_context("ray", words[1:])  # an option that is not there raises


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_provider_has_the_way_from_start_to_end(name: str) -> None:
    commands = [line for line in RAY_COMMANDS if f"cluster/{name}" in line]
    order = [
        f"ray up cluster/{name}",
        f"ray submit cluster/{name} experiments/submit.py /mnt/milp/config.yaml",
        f"ray down cluster/{name}",
    ]
    positions = [commands.index(line) for line in order]
    assert positions == sorted(positions)


def test_what_is_installed_here_is_what_the_head_node_installs() -> None:
    for name in ("gcp.yaml", "azure.yaml", "aws.yaml"):
        (command,) = yaml.safe_load((ROOT / "cluster" / name).read_text("utf-8"))["head_setup_commands"]
        for package in (word for word in command.split() if "==" in word):
            assert package in " ".join(COMMANDS)


def test_the_configuration_that_it_shows_is_one() -> None:
    from milp_ray.config import Config

    (shown,) = re.findall(r"```yaml\n(.+?)```", TEXT, re.S)
    assert Config(**yaml.safe_load(shown)).ray.address == "auto"
    for inline in re.findall(r"`(search: \{.+?\})`", TEXT):
        assert Config(name="x", **yaml.safe_load(inline)).search.max_concurrent_trials == 4


def test_the_sizes_are_those_of_the_files() -> None:
    stores = re.findall(r"object store of a GPU node .*?\| (\d+) GiB \| (\d+) GiB", TEXT)
    small, large = (int(size) * 2**30 for size in stores[0])
    for name, size in {
        "gcp.yaml": small,
        "aws.yaml": small,
        "gcp_ultra.yaml": large,
        "azure.yaml": large,
    }.items():
        assert f"--object-store-memory={size} " in (ROOT / "cluster" / name).read_text("utf-8")
    assert f'object-store-memory: "{large}"' in (ROOT / "cluster/kuberay/raycluster.yaml").read_text("utf-8")
    assert f"ray.object_store_mib={large // 2**20}" in (ROOT / "cluster/skypilot.yaml").read_text("utf-8")
