"""What the launcher's one file makes of what it is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from milp_ray.buckets import Bucket
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


def test_a_bucket_is_read_without_a_filesystem_of_fsspecs(
    file: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # it is no dependency
    uri = f"s3://bucket/configs/run.yaml?{s3}"
    bucket = Bucket(uri)
    bucket.write(bucket.root, file.read_bytes())
    command = run_command([uri])
    assert load_config(Path(command[4])) == load_config(file)
    with pytest.raises(MilpError, match=r"there is no s3://bucket/configs/another\.yaml; copy"):
        run_command([uri.replace("run.yaml", "another.yaml")])


def test_a_filesystem_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(MilpError, match="install the fsspec filesystem for abfs://"):
        run_command(["abfs://container/run.yaml"])


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
