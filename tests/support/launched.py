"""A cluster that Ray's launcher brings up by ``cluster/local.yaml`` on the machines of a network."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from milp_ray import __version__
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.personalize.store import AdapterStore, run_store
from milp_ray.run_status import RunStatus, read_status
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import StudyState, read_study
from support.machines import HOME, ROOT, SHARED, Network

N_WORKERS, GPUS_PER_WORKER = 2, 2
NAMES = ("head", *(f"worker-{number}" for number in range(1, N_WORKERS + 1)))
_WHEEL = f"milp_ray-{__version__}-py3-none-any.whl"
ALL_GPUS = {name: 0.0 if name == "head" else float(GPUS_PER_WORKER) for name in NAMES}
_POLL_SECONDS = 0.2
_ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request("http://127.0.0.1:8265" + sys.argv[1])
for token in sys.argv[2:]:
    request.add_header("Authorization", "Bearer " + token)
try:
    answer = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode(), sep="\\n")
"""


def prepare(folder: Path) -> None:
    """What the machines of a network have when they are switched on: the package, as setup.sh leaves it.

    There is nothing that setup.sh could install from, so it finds its own stamp. (Were the stamp made of
    other things than it is here, `ray up` would fail in pip.)
    """
    home = folder / "home"
    shutil.copytree("/etc/skel", home)
    (home / "bin").mkdir()
    for name in ("python3.12", "python3.11", "python3.13", "python3"):  # as setup.sh looks for them
        (home / "bin" / name).symlink_to(Path(sys.executable).resolve())
    (home / ".milp_ray").mkdir()
    (home / ".milp_ray" / "venv").symlink_to(sys.prefix)
    wheel = b"installed already"
    (folder / "dist").mkdir()
    (folder / "dist" / _WHEEL).write_bytes(wheel)
    named = f"{HOME}/milp_ray/dist/{_WHEEL}\nPython {platform.python_version()}\n"
    stamp = hashlib.sha256(named.encode() + (ROOT / "constraints.txt").read_bytes() + wheel).hexdigest()
    (home / ".milp_ray" / "stamp").write_text(f"{stamp}  -\n", encoding="utf-8")


def launcher_file(network: Network) -> dict[str, Any]:
    """``cluster/local.yaml`` with the lines changed that are for its reader to change, and smaller nodes.

    The GPUs are logical ones: Ray counts them, and nothing computes on them.
    """
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text("utf-8"))
    head, *workers = (network.addresses[name] for name in NAMES)
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(network.key)}
    config["min_workers"] = config["max_workers"] = len(workers)
    config["file_mounts"]["~/milp_ray/dist"] = str(network.folder / "dist")
    for kind, n_gpus in (("head", 0), ("worker", GPUS_PER_WORKER)):
        commands = config[f"{kind}_start_ray_commands"]
        size = f"--num-cpus=2 --num-gpus={n_gpus} --object-store-memory={128 * 2**20}"
        commands[-1], n_changed = re.subn(r"--object-store-memory=\d+", size, commands[-1])
        assert n_changed == 1, commands[-1]
    return config


class Submission:
    """A command on the laptop that follows a run to its end."""

    def __init__(self, network: Network, command: list[str | Path], log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as output:
            self._process: subprocess.Popen[str] = network.laptop.start(command, output)

    @property
    def output(self) -> str:
        """What it has printed, without colours and progress bars."""
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", self._log.read_text(encoding="utf-8", errors="replace"))
        lines = (line.strip() for line in text.splitlines())
        return "\n".join(line for line in lines if line and "━" not in line)

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    def exit_code(self, seconds: float) -> int:
        """Wait for its end."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end within {seconds:.0f} s:\n{self.output}") from None

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> float:
        """Wait for something that has to come before its end; the seconds that it took."""
        started = time.monotonic()
        while not condition():
            passed = time.monotonic() - started
            ended = self.has_ended and not condition()
            assert not ended, f"it ended before {what}:\n{self.output}"
            assert passed < seconds, f"not within {seconds:.0f} s: {what}\n{self.output}"
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - started


class Cluster:
    """Commands to the cluster, given on the laptop, and the files that its runs leave."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.file = network.folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(launcher_file(network)), encoding="utf-8")
        self._n_submitted = 0

    def ray(self, command: str, *arguments: str, seconds: float = 300.0) -> str:
        """Run ``ray COMMAND`` with the launcher file; what it prints."""
        words = ["ray", command, *(["--yes"] if command in {"up", "down"} else []), self.file, *arguments]
        done = self.network.laptop.run(*words, seconds=seconds)
        assert done.returncode == 0, f"ray {command} {arguments} gave {done.returncode}:\n{done.stdout}"
        return done.stdout

    def answer(self, path: str, token: str | None) -> tuple[int, str]:
        """Status and body of what the dashboard answers on the head node."""
        words = ["python3", "-c", _ASK, path, *([token] if token else [])]
        done = self.network.machines["head"].run(*words)
        assert done.returncode == 0, done.stdout
        status, _, body = done.stdout.partition("\n")
        return int(status), body

    def gpus(self) -> dict[str, float]:
        """GPUs of the nodes that the cluster takes to be alive, by the machine's name."""
        token = self.network.machines["head"].run("cat", HOME / ".ray" / "auth_token").stdout.strip()
        status, body = self.answer("/api/v0/nodes", token)
        assert status == 200, body
        names = {address: name for name, address in self.network.addresses.items()}
        alive = [node for node in json.loads(body)["data"]["result"]["result"] if node["state"] == "ALIVE"]
        return {names[node["node_ip"]]: node["resources_total"].get("GPU", 0.0) for node in alive}

    def wait_for_gpus(self, wanted: dict[str, float], seconds: float = 600.0) -> float:
        """Wait until the nodes that are alive have these GPUs; the seconds that it took."""
        started = time.monotonic()
        while (found := self.gpus()) != wanted:
            passed = time.monotonic() - started
            assert passed < seconds, f"{found} instead of {wanted}, after {passed:.0f} s:\n{self._monitor()}"
            time.sleep(1.0)
        return time.monotonic() - started

    def rays(self, name: str) -> list[str]:
        """The processes of Ray's own on a machine."""
        titles = self.network.machines[name].processes()
        return [title for title in titles if "/raylet/raylet " in title or "/gcs/gcs_server " in title]

    def submit(self, config: Path) -> Submission:
        """Run a configuration of the shared folder with ``ray submit``."""
        return self._follow(["ray", "submit", self.file, "experiments/submit.py", config])

    def milp_submit(self, config: Path) -> Submission:
        """Run it with ``milp-ray submit``."""
        return self._follow([sys.executable, "-m", "milp_ray", "submit", config, "--cluster", self.file])

    def milp_ray(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of ``milp-ray`` on the laptop to its end."""
        return self.network.laptop.run(sys.executable, "-m", "milp_ray", *words)

    def _follow(self, command: list[str | Path]) -> Submission:
        self._n_submitted += 1
        log = self.network.folder / f"submission-{self._n_submitted}.log"
        return Submission(self.network, command, log)

    def _monitor(self) -> str:
        show = "tail -n 60 /tmp/ray/session_latest/logs/monitor.log"
        return self.network.machines["head"].run("bash", "-c", show).stdout


class Run:
    """A run on a cluster, seen from here."""

    def __init__(self, cluster: Cluster, name: str, model: str, **changes: Any) -> None:
        self.name = name
        self._storage = cluster.network.storage
        self.folder = RunFolder(self._storage / "runs" / name)
        self.n_users = changes.pop("n_users", 2)
        self._write_users()
        settings = {
            "name": name,
            "output_dir": str(SHARED / "runs"),
            "base": {"model": str(SHARED / model), "device": "cpu"},
            "users": {"format": "jsonl", "paths": [str(SHARED / f"{name}.jsonl")]},
            "space": {"ranks": [2, 4]},
            "choice": {"rule": "best_loss"},
            "evaluation": {"methods": ["base", "milp"], "max_new_tokens": 4, "n_bootstrap": 50},
            **changes,
        }
        # On the storage, and there under a path with spaces.
        self.config = SHARED / "all runs" / f"a run of {name}.yaml"
        written = self._storage / self.config.relative_to(SHARED)
        written.parent.mkdir(exist_ok=True)
        written.write_text(yaml.safe_dump(settings), encoding="utf-8")

    @property
    def status(self) -> RunStatus | None:
        """What its ``status.json`` says."""
        return read_status(self.folder)

    @property
    def study(self) -> StudyState:
        """What its journal says; there has to be one."""
        return read_study(self.folder.journal)

    @property
    def n_ended(self) -> int:
        """Trials that have ended."""
        return sum(trial.has_ended for trial in self.study.trials) if self.folder.journal.exists() else 0

    @property
    def running(self) -> set[int]:
        """Indices of the trials that run."""
        return {trial.index for trial in self.study.trials if trial.status == "started"}

    @property
    def store(self) -> AdapterStore:
        """Its adapters."""
        return run_store(self.folder.adapters, PersonalizeSection())

    @property
    def n_adapters(self) -> int:
        """Users that have one."""
        return sum(1 for _ in self.store.users()) if self.folder.adapters.exists() else 0

    def summary(self) -> dict[str, Any]:
        """Its results."""
        return dict(json.loads(self.folder.summary_file.read_text(encoding="utf-8")))

    def _write_users(self) -> None:
        pairs = [{"query": f"Which pet, {i}?", "response": "A dog."} for i in range(10)]
        users = (
            {"user_id": f"u-{i}", "history": [f"I have {i} dogs."] * 4, "examples": pairs}
            for i in range(self.n_users)
        )
        lines = "".join(json.dumps(user) + "\n" for user in users)
        (self._storage / f"{self.name}.jsonl").write_text(lines, encoding="utf-8")
