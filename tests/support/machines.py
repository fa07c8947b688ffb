"""Machines in network namespaces of this one, joined by a bridge, that Ray's launcher reaches by ssh.

Each has processes, a network, a host name, a home folder and a /tmp of its own, so that `ray stop`, which the
launcher gives, ends nothing else. All see this machine's files without being able to change them, and share
one folder, mounted at ``/mnt/milp``. They end with the process that made them, however it ends.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path("/mnt/milp")  # the shared folder, on every machine
HOME = Path(pwd.getpwuid(0).pw_dir)
_SCRIPT = Path(__file__).with_name("machine.sh")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NETWORK = "10.77.0"
_SECONDS = 30.0  # that a command of the operating system may take
# Programs, and the packages of Debian that have them.
_PROGRAMS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}
# Ray's workers give way to whatever else runs on a machine unless they are told not to; here that is more.
_SSHD_CONFIG = """\
Port 22
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
HostKey /run/sshd/host_key
AuthorizedKeysFile /run/sshd/key.pub
MaxStartups 50
SetEnv PYTHONPATH={root} RAY_worker_niceness=0
"""


def what_is_missing() -> str | None:
    """What this machine lacks to have machines in it, and what to do; ``None``: nothing."""
    if os.geteuid() != 0:
        return "machines in namespaces need root; run `sudo make test-launcher`"
    absent = sorted({package for name, package in _PROGRAMS.items() if _found(name) is None})
    if absent:
        command = f"apt-get install -y --no-install-recommends {' '.join(absent)}"
        return f"{', '.join(absent)}: not installed; `{command}`"
    isolated = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"]
    trial = subprocess.run(
        [*isolated, "ip", "link", "add", "bridge", "type", "bridge"], capture_output=True, text=True
    )
    if trial.returncode:
        return f"this machine lets root make no namespace with a bridge in it: {trial.stderr.strip()}"
    return None


def _found(program: str) -> str | None:
    return shutil.which(program, path=_PATH)


@dataclass(frozen=True)
class Machine:
    """A machine, by the process that it lives and dies with."""

    name: str
    address: str
    process: subprocess.Popen[str]
    pid: int  # of its first process, as it is counted outside

    def start(self, command: Sequence[str | Path], output: IO[str] | int) -> subprocess.Popen[str]:
        """Start a command on it, in the root of the checkout; all that it prints goes to ``output``."""
        return subprocess.Popen(
            [*_within(self.pid), "--mount", "--pid", "env", f"--chdir={ROOT}", *map(str, command)],
            env={
                "HOME": str(HOME),
                "PATH": f"{Path(sys.executable).parent}:{_PATH}",
                "LANG": "C.UTF-8",
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_UP_enable_autoscaler_v2": "0",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str | Path, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a command on it to its end; ``stdout`` is all that it printed."""
        process = self.start(command, subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # what it has started goes with the machine
            raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def processes(self) -> list[str]:
        """What runs on it, as processes call themselves."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                found.append(" ".join(process.cmdline()))
        return found

    def kill(self) -> None:
        """End all that runs on it at once, as a loss of power does."""
        first = psutil.Process(self.pid) if psutil.pid_exists(self.pid) else None
        self.process.kill()
        self.process.wait()
        if first is not None:
            first.wait(_SECONDS)


class Network:
    """Machines, and the one that a person sits at; a context manager.

    Args:
        folder: for keys, settings and the machines' home folders. ``home`` in it, where it is there, is what
            those begin with; ``shared`` becomes the machines' storage.
        names: of the machines, which get the addresses 10.77.0.2 and on.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.storage = folder / "shared"
        self.key = folder / "key"
        self.addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(names, start=2)}
        self.machines: dict[str, Machine] = {}

    def __enter__(self) -> Network:
        self._write_settings()
        try:
            self.laptop = self._boot("laptop", f"{_NETWORK}.1", [self.folder])
            self._ip(self.laptop, "link add bridge type bridge")
            self._ip(self.laptop, f"address add {self.laptop.address}/24 dev bridge")
            self._ip(self.laptop, "link set bridge up")
            for name in self.addresses:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in list(self.machines.values()):
            machine.kill()
        self.machines.clear()

    def start(self, name: str) -> Machine:
        """Switch a machine on and plug it in; of one that was killed before the home folder is left."""
        machine = self._boot(name, self.addresses[name])
        # The other end goes with the network namespace that holds this one.
        self._ip(self.laptop, f"link add {name} type veth peer name eth0 netns {machine.pid}")
        self._ip(self.laptop, f"link set {name} master bridge up")
        self._ip(machine, f"address add {machine.address}/24 dev eth0")
        self._ip(machine, "link set eth0 up")
        # Nothing answers there, but without a route a machine does not know its own address.
        self._ip(machine, f"route add default via {self.laptop.address}")
        return machine

    def unplug(self, name: str) -> None:
        """Take a machine's link down: it runs on, and hears and says nothing."""
        self._ip(self.laptop, f"link set {name} down")

    def plug_in(self, name: str) -> None:
        """Bring its link up again."""
        self._ip(self.laptop, f"link set {name} up")

    def _boot(self, name: str, address: str, kept: Sequence[Path] = ()) -> Machine:
        python, installed = Path(sys.base_prefix), Path(sys.prefix).resolve()
        isolated = ["--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            ["unshare", *isolated, "bash", _SCRIPT, name, self.folder, ROOT, installed, python, *kept],
            env={"HOME": str(HOME), "PATH": _PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = process.stdout.readline()
        if said != "up\n":
            process.kill()
            raise RuntimeError(f"machine {name} did not come up: {_SCRIPT.name} has said why")
        [first] = psutil.Process(process.pid).children()
        machine = self.machines[name] = Machine(name, address, process, first.pid)
        self._ip(machine, "link set lo up")
        return machine

    @staticmethod
    def _ip(machine: Machine, command: str) -> None:
        """Change the network of a machine, also one whose own processes are gone from sight."""
        done = subprocess.run(
            [*_within(machine.pid), "ip", *command.split()],
            env={"PATH": _PATH},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"ip {command} on {machine.name}: {done.stderr.strip()}")

    def _write_settings(self) -> None:
        self.storage.mkdir()
        (self.folder / "home").mkdir(exist_ok=True)
        for name in ("laptop", *self.addresses):
            shutil.copytree(self.folder / "home", self.folder / "homes" / name, symlinks=True)
        sshd = self.folder / "sshd"
        sshd.mkdir()
        for key in (self.key, sshd / "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key]
            subprocess.run(command, check=True, timeout=_SECONDS)
        shutil.copy(self.key.with_suffix(".pub"), sshd)
        (sshd / "config").write_text(_SSHD_CONFIG.format(root=ROOT), encoding="utf-8")
        etc = self.folder / "etc"
        etc.mkdir()
        named = {"localhost": "127.0.0.1", "laptop": f"{_NETWORK}.1", **self.addresses}
        lines = "".join(f"{address} {name}\n" for name, address in named.items())
        (etc / "hosts").write_text(lines, encoding="utf-8")
        # Without a password, and not locked, which sshd takes for "no one may come in".
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n", encoding="utf-8")


def _within(pid: int) -> list[str]:
    """The beginning of a command in the network and under the name of a machine."""
    return ["nsenter", f"--target={pid}", "--net", "--uts", "--ipc"]
