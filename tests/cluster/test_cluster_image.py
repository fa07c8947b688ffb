"""The Dockerfile, what is copied into it, SkyPilot's file and Prometheus's."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import milp_ray

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster"


def dockerfile() -> str:
    """Its instructions, without comments, one a line."""
    lines = (FOLDER / "Dockerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return re.sub(r"\\\n\s*", " ", text)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in (line.split("==") for line in lines if "==" in line)
    }


def test_the_base_image_is_an_argument_of_a_fixed_version() -> None:
    assert re.search(r"^ARG CUDA_IMAGE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04$", dockerfile(), re.M)
    stages = re.findall(r"^FROM (\S+)", dockerfile(), re.M)
    assert stages == ["${CUDA_IMAGE}", "${CUDA_IMAGE}"]


def test_the_image_installs_with_the_pins_and_runs_without_privileges() -> None:
    installs = [line for line in dockerfile().splitlines() if "pip install" in line]
    assert "-c constraints.txt ." in installs[0]
    assert all("-c constraints.txt" in line or "--no-deps" in line for line in installs)
    after_last_from = dockerfile().split("FROM ")[-1]
    assert re.findall(r"^USER (\S+)", after_last_from, re.M) == ["1000"]
    assert "sudo" not in after_last_from


def test_the_image_is_named_by_the_version() -> None:
    assert f"-t milp-ray:{milp_ray.__version__} ." in (FOLDER / "Dockerfile").read_text("utf-8")


def test_all_that_is_copied_is_in_the_build_context_and_nothing_else_is() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+)$", dockerfile(), re.M)
    sources = {word.split("/")[0] for line in copied for word in line.split()[:-1]}
    rules = (FOLDER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert rules[1] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)
    needed = {"pyproject.toml", project()["readme"], *project()["license-files"], "milp_ray"}
    assert needed <= sources


def test_pins_meet_what_the_package_asks_for() -> None:
    found = pins()
    for requirement in map(Requirement, project()["dependencies"]):
        pin = found[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(pin), f"{requirement} and {pin}"


def test_every_python_that_nodes_may_get_is_new_enough() -> None:
    allowed = SpecifierSet(project()["requires-python"])
    named = re.findall(r"python(3\.\d+)", (FOLDER / "setup.sh").read_text("utf-8"))
    assert named
    assert all(allowed.contains(Version(version)) for version in named)
    assert "sys.version_info < (3, 11)" in (FOLDER / "setup.sh").read_text("utf-8")


def test_skypilot_starts_ray_inside_the_run() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text("utf-8"))
    known = {"name", "resources", "num_nodes", "envs", "secrets", "file_mounts", "setup", "run"}
    assert set(task) == known
    assert set(task["resources"]) == {"accelerators", "memory", "disk_size", "use_spot"}
    assert task["num_nodes"] == 1
    assert task["resources"]["use_spot"] is True
    assert all(each.endswith(":4") for each in task["resources"]["accelerators"])
    assert not any(task["secrets"].values())
    assert task["file_mounts"]["/mnt/milp"]["mode"] == "MOUNT_CACHED"
    for local in ("cluster/setup.sh", "constraints.txt"):
        assert local in task["file_mounts"].values()
        assert (ROOT / local).is_file()


def test_skypilots_settings_are_ones_that_the_configuration_knows(repository: Path) -> None:
    from milp_ray.config_loader import load_config

    run = yaml.safe_load((FOLDER / "skypilot.yaml").read_text("utf-8"))["run"]
    settings = re.findall(r"\b[a-z_.]+=\S+", run)
    config = load_config(repository / "experiments" / "paper_llama2_7b.yaml", settings)
    assert config.ray.address is None
    assert config.ray.num_gpus == 4
    assert str(config.output_dir) == "/mnt/milp/runs"


def test_prometheus_reads_the_file_that_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert discovery["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
