"""Ray's launcher files: what Ray itself checks of them, and what it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster"
CLOUDS = ("gcp.yaml", "gcp_ultra.yaml", "azure.yaml", "aws.yaml")
ALL = (*CLOUDS, "local.yaml")
GPU_NODES = {
    "gcp.yaml": ("a2-highgpu-4g", {"CPU": 48, "GPU": 4}),
    "gcp_ultra.yaml": ("a2-ultragpu-4g", {"CPU": 48, "GPU": 4}),
    "azure.yaml": ("Standard_NC96ads_A100_v4", {"CPU": 96, "GPU": 4}),
    "aws.yaml": ("p4d.24xlarge", {"CPU": 96, "GPU": 8}),
}
BYTES_7B, BYTES_13B = 2 * 6_738_415_616, 2 * 13_015_864_320  # Llama-2's parameters in bfloat16


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def node_config(name: str, node_type: str) -> dict[str, Any]:
    config = read(name)["available_node_types"][node_type]["node_config"]
    return config.get("azure_arm_parameters", config)


def start_commands(name: str) -> list[str]:
    config = read(name)
    kinds = ("head_start_ray_commands", "worker_start_ray_commands")
    return [line for kind in kinds for line in config[kind] if "ray start" in line]


def option(command: str, name: str) -> str:
    found = re.findall(rf"--{name}=(\S+)", command)
    assert len(found) == 1, f"--{name} in {command!r}"
    return found[0]


def test_every_launcher_file_is_looked_at() -> None:
    with_provider = {
        path.name for path in FOLDER.glob("*.yaml") if "provider" in yaml.safe_load(path.read_text("utf-8"))
    }
    assert with_provider == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_ray_takes_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(ROOT)
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["cluster_name"].startswith("milp-ray")


@pytest.mark.parametrize("name", ALL)
def test_a_key_that_ray_does_not_know_would_be_refused(name: str) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config({**read(name), "idle_timeout_minute": 5}))


@pytest.mark.parametrize("name", ALL)
def test_both_start_commands_ask_for_the_token(name: str) -> None:
    head, worker = start_commands(name)
    for command in (head, worker):
        before = command[: command.index("ray start")]
        assert "export RAY_AUTH_MODE=token " in before
        assert "RAY_JOB_STOP_SIGNAL=SIGINT RAY_JOB_STOP_WAIT_TIME_S=60;" in before
    assert read(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", ALL)
def test_ray_start_has_the_options(name: str) -> None:
    from ray.scripts.scripts import start

    for command in start_commands(name):
        words = command[command.index("ray start") + len("ray start") :].split(";")[0].split()
        start.make_context("start", words)  # an option that is not there raises


@pytest.mark.parametrize("name", ALL)
def test_the_dashboard_is_on_loopback(name: str) -> None:
    head, worker = start_commands(name)
    assert option(head, "dashboard-host") == "127.0.0.1"
    assert "dashboard" not in worker
    assert "0.0.0.0" not in (FOLDER / name).read_text("utf-8")


@pytest.mark.parametrize("name", ALL)
def test_no_secret_is_written_down(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    assert not re.search(
        r"(?i)(password|secret|api_?key|access_?key|RAY_AUTH_TOKEN=|hf_[A-Za-z0-9]{8,})", text
    )
    assert "credentials" not in read(name)["provider"]


@pytest.mark.parametrize("name", ALL)
def test_what_is_copied_to_the_nodes_is_there(name: str) -> None:
    mounts = read(name)["file_mounts"]
    ours = {local for local in mounts.values() if not local.startswith("~")}
    assert ours == {"cluster/setup.sh", "constraints.txt", "cluster/prometheus.yaml", "dist"}
    for local in ours - {"dist"}:  # made by `pip wheel`, and ignored by git
        assert (ROOT / local).is_file()
    (setup,) = read(name)["setup_commands"]
    assert setup == 'MILP_SHARED="" bash ~/milp_ray/setup.sh ~/milp_ray/dist'


@pytest.mark.parametrize("name", ALL)
def test_all_files_start_the_head_node_alike(name: str) -> None:
    for part in ("head_start_ray_commands", "file_mounts", "setup_commands"):
        assert read(name)[part] == read("gcp.yaml")[part]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("gcp.yaml", BYTES_7B),
        ("aws.yaml", BYTES_7B),
        ("gcp_ultra.yaml", BYTES_13B),
        ("azure.yaml", BYTES_13B),
        ("local.yaml", BYTES_13B),
    ],
)
def test_the_object_store_holds_one_base(name: str, base: int) -> None:
    size = int(option(start_commands(name)[1], "object-store-memory"))
    assert base < size < 2 * base
    assert size % 2**30 == 0


@pytest.mark.parametrize("name", CLOUDS)
def test_node_types_say_what_they_have(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert set(types) == {"head", "gpu"}
    for node_type in types.values():
        assert all(type(count) is int and count > 0 for count in node_type["resources"].values())
    assert "GPU" not in types["head"]["resources"]
    machine, resources = GPU_NODES[name]
    assert machine in node_config(name, "gpu").values()
    assert types["gpu"]["resources"] == resources


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_are_there_before_a_study_counts_its_slots(name: str) -> None:
    config = read(name)
    head, gpu = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert 1 <= gpu["min_workers"] <= gpu["max_workers"] <= config["max_workers"]


def test_workers_are_spot_nodes_and_heads_are_not() -> None:
    for name in ("gcp.yaml", "gcp_ultra.yaml"):
        scheduling = node_config(name, "gpu")["scheduling"]
        assert scheduling["provisioningModel"] == "SPOT"
        assert scheduling["onHostMaintenance"] == "TERMINATE"
        assert scheduling["automaticRestart"] is False
        assert "scheduling" not in node_config(name, "head")
    assert node_config("azure.yaml", "gpu")["priority"] == "Spot"
    assert "priority" not in node_config("azure.yaml", "head")
    assert node_config("aws.yaml", "gpu")["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in node_config("aws.yaml", "head")


@pytest.mark.parametrize("name", ["azure.yaml", "aws.yaml"])
def test_nodes_that_went_are_not_paid_for(name: str) -> None:
    assert read(name)["provider"]["cache_stopped_nodes"] is False


def test_eight_gpus_say_how_four_trials_are_kept() -> None:
    from milp_ray.config import Config

    text = (FOLDER / "aws.yaml").read_text("utf-8")
    (line,) = re.findall(r"#\s+(search: \{max_concurrent_trials: 4\})", text)
    assert Config(name="aws", **yaml.safe_load(line)).search.max_concurrent_trials == 4
    assert "p4de.24xlarge" in text


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_nodes_installs_are_pinned(name: str) -> None:
    (command,) = read(name)["head_setup_commands"]
    packages = [word for word in command.split() if "==" in word]
    plain = [
        word
        for word in command.split()
        if word not in packages and word not in {"pip", "install", "-q", "-c", "~/milp_ray/constraints.txt"}
    ]
    assert packages
    assert plain == []


def test_machines_of_ones_own_all_stay() -> None:
    config = read("local.yaml")
    n_workers = len(config["provider"]["worker_ips"])
    assert config["min_workers"] == config["max_workers"] == n_workers
    assert "RAY_UP_enable_autoscaler_v2=0" in (FOLDER / "local.yaml").read_text("utf-8")


def test_a_worker_of_ones_own_is_started_until_it_works() -> None:
    _, worker = start_commands("local.yaml")
    assert re.search(r"; until ray start [^;]+; do ray stop; sleep \d+; done$", worker)
