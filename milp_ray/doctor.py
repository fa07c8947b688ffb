"""``milp-ray doctor``: what is installed, which accelerator, and what would not work and why.

Libraries are imported in a process of their own, so that one that crashes or writes to the terminal is
reported like any other finding.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from packaging.requirements import Requirement

import milp_ray
from milp_ray.data import EMBEDDED_BASE
from milp_ray.versions import package_version

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["ok", "note", "fault"]
_GIB = 2**30
_NEEDED_MEMORY_GIB = 4.0  # what the main job peaks at
_NEEDED_DISK_GIB = 1.0
_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "ray",
    "ax",
    "botorch",
    "jax",
    "numpyro",
    "rouge_score",
)

# Imports one library after the other and tells about each before the next, so that a crash names its cause.
_PROBE = """
import importlib, json, sys, time
real, sys.stdout = sys.stdout, sys.stderr
def tell(**finding):
    print(json.dumps(finding), file=real, flush=True)
for name in sys.argv[1:]:
    tell(begin=name)
    started = time.perf_counter()
    try:
        importlib.import_module(name)
        tell(name=name, seconds=time.perf_counter() - started)
    except Exception as error:
        tell(name=name, error=f"{type(error).__name__}: {str(error).strip()[:300]}")
torch = sys.modules.get("torch")
if torch is not None:
    devices = [
        {"name": p.name, "gib": p.total_memory / 2**30}
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]
    tell(devices=devices, cuda=torch.version.cuda, threads=torch.get_num_threads(),
         bf16=bool(devices) and torch.cuda.is_bf16_supported())
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table. A ``fault`` means that the main job cannot run here."""

    name: str
    state: State
    found: str
    consequence: str = ""


def examine() -> Iterator[Finding]:
    """Everything that is looked at, the quick things first."""
    yield _python()
    yield from _packages()
    yield from _machine()
    yield from _tools()
    yield _embedded_base()
    yield _ray_address()
    yield from _libraries(_probe())


def doctor(console: Console) -> int:
    """Print the table; 0 where the main job can run, else 1."""
    from rich.box import SIMPLE
    from rich.table import Table

    with console.status("looking at the machine and importing the libraries …"):
        findings = list(examine())
    table = Table(title=f"milp_ray {milp_ray.__version__}", title_justify="left", box=SIMPLE)
    for heading in ("", "what", "found", "what follows"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fault": "[red]fault[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, finding.found, finding.consequence)
    console.print(table)
    faults = [finding.name for finding in findings if finding.state == "fault"]
    if faults:
        console.print(f"[red]The main job cannot run here:[/] see {', '.join(faults)}.")
        return 1
    console.print("The main job can run here: milp-ray run experiments/demo.yaml")
    return 0


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Every dependency against the range it must be in and the version that the tests ran with."""
    tested = pinned_versions()
    others: list[str] = []
    n_packages = 0
    for text in metadata.requires("milp_ray") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        n_packages += 1
        installed = package_version(requirement.name)
        if installed is None:
            yield Finding(requirement.name, "fault", "not installed", "run `make demo`, or pip install -e .")
        elif not requirement.specifier.contains(installed, prereleases=True):
            needs = f"milp_ray needs {requirement.specifier}"
            yield Finding(requirement.name, "fault", installed, needs)
        elif tested.get(requirement.name.lower(), installed) != installed.partition("+")[0]:
            others.append(f"{requirement.name} {installed} (tested: {tested[requirement.name.lower()]})")
    if others:
        follows = "within the allowed range, other than the tested versions of constraints.txt"
        yield Finding("packages", "note", ", ".join(others), follows)
    else:
        against = "at the tested versions" if tested else "within their ranges (no constraints.txt here)"
        yield Finding("packages", "ok", f"{n_packages} dependencies, {against}")


def pinned_versions() -> dict[str, str]:
    """Name → version of ``constraints.txt`` in the checkout; empty outside one."""
    path = Path(milp_ray.__file__).resolve().parent.parent / "constraints.txt"
    if not path.exists():
        return {}
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    pins = (line.partition("==") for line in lines if "==" in line)
    return {name.strip().lower().replace("_", "-"): version.strip() for name, _, version in pins}


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slow = "trials run one at a time" if cores < 2 else ""
    yield Finding("processor", "note" if slow else "ok", f"{cores} cores, {platform.machine()}", slow)
    memory = psutil.virtual_memory()
    available = memory.available / _GIB
    short = available < _NEEDED_MEMORY_GIB
    follows = f"the demo peaks near {_NEEDED_MEMORY_GIB:g} GiB; set personalize.n_workers=1" if short else ""
    found = f"{available:.1f} GiB available of {memory.total / _GIB:.1f}"
    yield Finding("memory", "note" if short else "ok", found, follows)
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    short = free < _NEEDED_DISK_GIB
    follows = f"a run writes up to {_NEEDED_DISK_GIB:g} GiB; free some, or set output_dir=…" if short else ""
    yield Finding(
        "disk", "fault" if short else "ok", f"{free:.1f} GiB free in the working directory", follows
    )
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).free / _GIB
        short = size < 0.5
        follows = "Ray keeps shared objects on disk instead (slower)" if short else ""
        yield Finding("shared memory", "note" if short else "ok", f"{size:.1f} GiB free in /dev/shm", follows)


def _tools() -> Iterator[Finding]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    compiler = shutil.which("c++", path=path) or shutil.which("g++", path=path)
    ninja = shutil.which("ninja", path=path)
    missing = [name for name, where in (("a C++ compiler", compiler), ("ninja", ninja)) if where is None]
    if missing:
        follows = "DeepSpeed cannot compile operators: optimizer offload is slower; all else works"
        yield Finding("compiler", "note", "no " + " and no ".join(missing), follows)
    else:
        yield Finding("compiler", "ok", f"{compiler}, {ninja}")
    if shutil.which("git", path=path) is None:
        yield Finding("git", "note", "not installed", "versions.json records no commit")


def _embedded_base() -> Finding:
    folder = EMBEDDED_BASE
    names = ("config.json", "model.safetensors", "tokenizer.json")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        follows = "base.model=embedded cannot be loaded; install the package again, or name a model"
        return Finding("embedded base", "fault", f"{', '.join(missing)} missing", follows)
    size = sum((folder / name).stat().st_size for name in names) / 2**20
    return Finding("embedded base", "ok", f"{size:.1f} MiB")


def _ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        follows = "Ray joins that cluster even where ray.address is not set; unset it to start one here"
        return Finding("ray cluster", "note", f"RAY_ADDRESS={address}", follows)
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        found = current.read_text(encoding="utf-8").strip()
    except OSError:
        return Finding("ray cluster", "ok", "none running here", "a run starts Ray in its own process")
    return Finding("ray cluster", "ok", f"one at {found} was started here", "ray.address=auto joins it")


def _probe() -> list[dict[str, Any]]:
    """What the importing process told, and ``{"died": name}`` where it ended inside an import."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", _PROBE, *_LIBRARIES],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    told = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    if answer.returncode != 0:
        begun = [line["begin"] for line in told if "begin" in line]
        told.append({"died": begun[-1] if begun else "python", "code": answer.returncode})
    return told


def _libraries(told: list[dict[str, Any]]) -> Iterator[Finding]:
    seconds = 0.0
    imported = []
    for line in told:
        if "error" in line:
            yield Finding(f"import {line['name']}", "fault", line["error"], _without(line["name"]))
        elif "died" in line:
            found = f"the process ended with code {line['code']}"
            yield Finding(f"import {line['died']}", "fault", found, _without(line["died"]))
        elif "seconds" in line:
            seconds += line["seconds"]
            imported.append(line["name"])
        elif "devices" in line:
            yield _accelerator(line)
    if imported:
        yield Finding("imports", "ok", f"{', '.join(imported)} in {seconds:.0f} s")


def _without(name: str) -> str:
    return {
        "deepspeed": "no adapter can be trained",
        "ray": "no search and no batch of users",
        "ax": "no search",
        "botorch": "no search",
        "jax": "no search with surrogate.inference=nuts",
        "numpyro": "no search with surrogate.inference=nuts",
        "rouge_score": "no scores",
    }.get(name, "no model can be loaded")


def _accelerator(line: dict[str, Any]) -> Finding:
    devices = line["devices"]
    if not devices:
        built = f"torch is built for CUDA {line['cuda']}" if line["cuda"] else "torch is built for the CPU"
        follows = "float32 on the CPU: right for small bases, too slow for billions of parameters"
        return Finding("accelerator", "ok", f"none ({built}, {line['threads']} threads)", follows)
    names = ", ".join(f"{device['name']} ({device['gib']:.0f} GiB)" for device in devices)
    follows = "" if line["bf16"] else "no bfloat16: set base.dtype=float16 or float32"
    return Finding("accelerator", "ok" if line["bf16"] else "note", f"CUDA {line['cuda']}: {names}", follows)
