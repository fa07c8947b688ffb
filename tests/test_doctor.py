"""The doctor: it looks at what is there, says what follows, and fails only where the main job would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from milp_ray import doctor as module
from milp_ray.doctor import Finding, doctor, pinned_versions


def printed(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> tuple[int, str]:
    monkeypatch.setattr(module, "examine", lambda: iter(findings))
    stream = StringIO()
    return doctor(Console(file=stream, width=120)), stream.getvalue()


def probe_of(*told: dict[str, Any], code: int = 0) -> Callable[..., subprocess.CompletedProcess[str]]:
    import json

    output = "noise of a library\n" + "\n".join(json.dumps(line) for line in told)
    return lambda *_, **__: subprocess.CompletedProcess([], code, output, "")


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_notes_do_not_fail_and_faults_do(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = printed(monkeypatch, Finding("a", "ok", "x"), Finding("b", "note", "y", "slower"))
    assert (code, "slower" in text, "can run here" in text) == (0, True, True)
    code, text = printed(monkeypatch, Finding("a", "fault", "gone", "no search"))
    assert (code, "cannot run here: see a." in text) == (1, True)


def test_here_the_dependencies_are_installed_within_their_ranges() -> None:
    states = {finding.state for finding in module._packages()}
    assert states <= {"ok", "note"}


def test_a_missing_and_an_old_package_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": None, "ray": "1.0"}
    real = module.package_version
    monkeypatch.setattr(module, "package_version", lambda name: installed.get(name, real(name)))
    found = by_name(module._packages())
    assert found["torch"].state == "fault"
    assert found["torch"].found == "not installed"
    assert found["ray"].state == "fault"
    assert "needs >=" in found["ray"].consequence


def test_another_version_than_the_tested_one_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.package_version
    monkeypatch.setattr(module, "package_version", lambda name: "99.0" if name == "ray" else real(name))
    found = by_name(module._packages())["packages"]
    assert found.state == "note"
    assert f"ray 99.0 (tested: {pinned_versions()['ray']})" in found.found


def test_the_constraints_pin_every_direct_dependency(repository: Path) -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = pinned_versions()
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{name} {pins[name]}"
        assert "+" not in pins[name], f"{name}: a local version is of one machine only"


def test_a_library_that_cannot_be_imported_is_a_fault_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = (
        {"begin": "torch"},
        {"name": "torch", "seconds": 1.0},
        {"begin": "deepspeed"},
        {"name": "deepspeed", "error": "ImportError: no ninja"},
    )
    monkeypatch.setattr(subprocess, "run", probe_of(*told))
    found = by_name(module._libraries(module._probe()))
    assert found["import deepspeed"] == Finding(
        "import deepspeed", "fault", "ImportError: no ninja", "no adapter can be trained"
    )
    assert found["imports"].found == "torch in 1 s"


def test_a_library_that_kills_the_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess,
        "run",
        probe_of({"begin": "torch"}, {"name": "torch", "seconds": 1.0}, {"begin": "ray"}, code=-11),
    )
    found = by_name(module._libraries(module._probe()))
    assert found["import ray"].state == "fault"
    assert "code -11" in found["import ray"].found


def test_a_gpu_is_named_and_one_without_bfloat16_gets_advice() -> None:
    line = {"devices": [{"name": "V100", "gib": 32.0}], "cuda": "12.8", "threads": 8, "bf16": False}
    found = module._accelerator(line)
    assert found.state == "note"
    assert "V100 (32 GiB)" in found.found
    assert "base.dtype=float16" in found.consequence


def test_a_ray_address_in_the_environment_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert module._ray_address().state == "note"
    monkeypatch.delenv("RAY_ADDRESS")
    assert module._ray_address().state == "ok"


def test_a_missing_compiler_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
    found = by_name(module._tools())
    assert found["compiler"].state == "note"
    assert found["git"].state == "note"
