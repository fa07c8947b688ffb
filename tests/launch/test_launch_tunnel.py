"""The way to a dashboard by a launcher file, where there is none; `make test-launcher` goes it to the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from milp_ray.cli import app
from milp_ray.errors import MilpError
from milp_ray.launch.tunnel import dashboard_of


def test_a_launcher_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(MilpError, match="no such file; cluster/ holds examples"),
        dashboard_of(tmp_path / "nowhere.yaml"),
    ):
        pass


def test_a_cluster_that_is_down_is_told_with_what_the_launcher_said(tmp_path: Path, repository: Path) -> None:
    content = yaml.safe_load((repository / "cluster" / "local.yaml").read_text(encoding="utf-8"))
    # A name of its own: the launcher keeps what it knows of a cluster by its name.
    content |= {"cluster_name": f"milp-ray-{tmp_path.name}", "file_mounts": {}}
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with (
        pytest.raises(MilpError, match=r"no dashboard could be reached by .*cluster\.yaml.*`ray up"),
        dashboard_of(file),
    ):
        pass


@pytest.mark.parametrize("command", ["status", "logs", "stop", "watch"])
def test_a_cluster_is_named_once(command: str) -> None:
    both = ["--address", "http://127.0.0.1:1", "--cluster", "nowhere.yaml"]
    done = CliRunner().invoke(app, [command, "run", *both])
    assert done.exit_code == 2
    assert "--address URL" in " ".join(done.output.split())
