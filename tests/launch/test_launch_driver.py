"""What the launcher's one file makes of what it is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milp_ray.config import Config
from milp_ray.config_loader import dump_config, load_config
from milp_ray.errors import MilpError
from milp_ray.launch.driver import run_command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a run.yaml"
    path.write_text(dump_config(Config(name="r", output_dir=tmp_path)), encoding="utf-8")
    return path


def test_it_becomes_milp_ray_run_on_the_nodes_cluster(file: Path) -> None:
    # The launcher joins arguments unquoted, so that a path with spaces arrives in pieces.
    command = run_command(str(file).split())
    assert command[1:4] == ["-m", "milp_ray", "run"]
    assert command[4:] == [str(file), "ray.address=auto", "--preflight"]


def test_a_uri_is_fetched(file: Path) -> None:
    command = run_command([f"file://{file}"])
    assert load_config(Path(command[4])) == load_config(file)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["/nowhere/x.yaml"], ["memory://nowhere.yaml"]])
def test_what_is_no_configuration_is_told_with_the_exit_code_of_a_mistake(
    arguments: list[str], repository: Path
) -> None:
    with pytest.raises(MilpError):
        run_command(arguments)
    script = [sys.executable, repository / "experiments" / "submit.py", *arguments]
    answer = subprocess.run(script, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
