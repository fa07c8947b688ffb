"""cluster/setup.sh, on a machine whose Python, pip, sudo and apt-get only write down their calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "setup.sh"
TOOLS = ("bash", "cat", "chmod", "cp", "dirname", "grep", "id", "mkdir", "rm", "sha256sum", "touch")

PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import ensurepip"*) exit {old} ;;
  "--version "*) echo "Python 3.12.3" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv" >> "$CALLS" ;;
  "-m pip") echo "pip ${{*:3}}" >> "$CALLS" ;;
  *) echo "python $*" >> "$CALLS"; exit "${{TORCH_SEES_NO_GPU:-0}}" ;;
esac
"""
RECORDED = '#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n'


class Machine:
    """A home folder, a PATH with nothing real on it that could change this machine, and a record of calls."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin, self.mount = (folder / name for name in ("home", "bin", "mount"))
        self.node, self.calls_file = folder / "node", folder / "calls"
        for each in (self.home, self.bin, self.mount, self.node / "dist"):
            each.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        (self.bin / "env").symlink_to(str(shutil.which("env")))
        for name in ("sudo", "apt-get", "mount.nfs"):
            self.install(name, RECORDED.format(name=name))
        self.install("mountpoint", "#!/usr/bin/env bash\nexit 1\n")
        self.install("python3.12", PYTHON.format(old=0))
        shutil.copy(SCRIPT, self.node)
        shutil.copy(ROOT / "constraints.txt", self.node)
        self.wheel = self.node / "dist" / "milp_ray-0.1.0-py3-none-any.whl"
        self.wheel.write_bytes(b"PK\0a wheel\0")

    def install(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def setup(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "HOME": self.home,
            "PATH": self.bin,
            "CALLS": self.calls_file,
            "MILP_MOUNT": self.mount,
        }
        return subprocess.run(
            ["bash", str(self.node / "setup.sh"), *map(str, arguments)],
            env={**{key: str(value) for key, value in environment.items()}, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[str]:
        found = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "with spaces")  # an unquoted variable in the script fails every test


def test_it_installs_the_wheel_with_the_pins(machine: Machine) -> None:
    done = machine.setup(machine.node / "dist")
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [
        "venv",
        f"pip install -q -c {machine.node}/constraints.txt {machine.wheel}",
        f"pip install -q --no-deps --force-reinstall {machine.wheel}",
    ]


def test_a_second_time_it_installs_nothing_and_writes_nothing_twice(machine: Machine) -> None:
    for _ in range(2):
        assert machine.setup(machine.wheel).returncode == 0
    assert len(machine.calls()) == 3
    assert (machine.home / ".bashrc").read_text() == '. "$HOME/.milp_ray/env.sh"\n'


def test_another_wheel_of_the_same_version_is_installed(machine: Machine) -> None:
    machine.setup(machine.wheel)
    machine.calls()
    machine.wheel.write_bytes(b"PK\0other code\0")
    assert machine.setup(machine.wheel).returncode == 0
    assert len(machine.calls()) == 3


def test_an_install_that_failed_is_begun_again(machine: Machine) -> None:
    machine.install("python3.12", PYTHON.format(old=0).replace('"-m pip")', '"-m pip") exit 1 ;; "never")'))
    assert machine.setup(machine.wheel).returncode == 1
    machine.install("python3.12", PYTHON.format(old=0))
    machine.calls()
    assert machine.setup(machine.wheel).returncode == 0
    assert len(machine.calls()) == 3


def test_of_several_wheels_the_newest_is_taken(machine: Machine) -> None:
    newer = machine.wheel.with_name("milp_ray-0.0.9-py3-none-any.whl")
    newer.write_bytes(b"PK\0")
    os.utime(machine.wheel, (1, 1))
    assert machine.setup(machine.node / "dist").returncode == 0
    assert all(str(newer) in call for call in machine.calls() if call.startswith("pip"))


@pytest.mark.parametrize("revision", ["@v0.1.0", "@298a04e"])
def test_a_git_url_is_installed_at_its_revision(machine: Machine, revision: str) -> None:
    url = f"git+https://example.org/team/milp_ray.git{revision}"
    assert machine.setup(url).returncode == 0
    assert f"pip install -q --no-deps --force-reinstall {url}" in machine.calls()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give the package"),
        (["a", "b"], "give the package"),
        (["nowhere"], "no wheel of milp_ray at nowhere"),
        (["nowhere.whl"], "no wheel of milp_ray at nowhere.whl"),
        (["git+https://example.org/team/milp_ray.git"], "names no tag or commit"),
        (["git+ssh://git@example.org/team/milp_ray.git"], "names no tag or commit"),
    ],
)
def test_what_it_cannot_install_it_names(machine: Machine, arguments: list[str], said: str) -> None:
    done = machine.setup(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert machine.calls() == []


def test_without_a_python_it_asks_apt_and_then_says_what_is_missing(machine: Machine) -> None:
    for name in ("python3.12", "python3.11", "python3.13", "python3"):
        machine.install(name, PYTHON.format(old=1))
    done = machine.setup(machine.wheel)
    assert done.returncode == 2
    assert "milp_ray needs Python 3.11 or later" in done.stderr
    assert any("install -y python3.12-venv" in call for call in machine.calls())


def test_shared_storage_is_mounted_once(machine: Machine) -> None:
    assert machine.setup(machine.wheel, MILP_SHARED="10.0.0.2:/milp").returncode == 0
    assert f"sudo mount -t nfs -o hard,noatime 10.0.0.2:/milp {machine.mount}" in machine.calls()
    machine.install("mountpoint", "#!/usr/bin/env bash\nexit 0\n")
    assert machine.setup(machine.wheel, MILP_SHARED="10.0.0.2:/milp").returncode == 0
    assert machine.calls() == []


def test_without_shared_storage_it_warns(machine: Machine) -> None:
    assert "MILP_SHARED is empty" in machine.setup(machine.wheel).stderr


def test_shells_of_the_launcher_find_the_package_and_the_token(machine: Machine) -> None:
    machine.setup(machine.wheel)
    asked = 'source ~/.bashrc; printf "%s\\n" "$RAY_AUTH_MODE" "$HF_HOME" "${PATH%%:*}"'
    environment = {"HOME": str(machine.home), "PATH": str(machine.bin)}
    said = subprocess.run(
        ["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines() == [
        "token",
        f"{machine.mount}/huggingface",
        f"{machine.home}/.milp_ray/venv/bin",
    ]


def test_a_gpu_that_torch_does_not_see_fails_the_node(machine: Machine) -> None:
    machine.install("nvidia-smi", '#!/usr/bin/env bash\necho "GPU 0: NVIDIA A100-SXM4-40GB"\n')
    assert machine.setup(machine.wheel).returncode == 0
    done = machine.setup(machine.wheel, TORCH_SEES_NO_GPU="1")
    assert done.returncode == 2
    assert "driver is too old" in done.stderr


def test_the_script_is_careful_bash() -> None:
    text = SCRIPT.read_text("utf-8")
    code = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)
    assert "set -euo pipefail" in code[:2]
    for line in code:
        assert not re.search(r"\b(curl|wget)\b|\beval\b|`|rm -rf|--break-system-packages", line)
        assert not re.search(r"\breadonly \w+=\$\(|\blocal \w+=\$\(", line), "hides the command's failure"
