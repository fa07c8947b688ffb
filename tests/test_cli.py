"""The command line: what it answers, how it fails, and that it starts at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from milp_ray import __version__
from milp_ray.cli import app
from milp_ray.config_loader import load_config
from milp_ray.errors import MilpError

HEAVY = (
    "torch",
    "ray",
    "transformers",
    "peft",
    "deepspeed",
    "pandas",
    "pyarrow",
    "matplotlib",
    "ax",
    "pydantic",
    "rich",
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['milp-ray', '--help']\nfrom milp_ray.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == "[]"
    assert "personalize" in answer.stdout


def test_help_costs_less_than_half_a_second_of_processor_time() -> None:
    # Processor time rather than the clock, which other processes of the machine delay.
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'milp_ray', '--help']\n"
        "subprocess.run(command, check=True, stdout=subprocess.DEVNULL)\n"
        "print(os.times().children_user + os.times().children_system)"
    )
    seconds = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    )
    assert seconds < 0.5


def test_every_command_has_help_that_fits_its_line() -> None:
    names = re.findall(r"^  ([a-z]+) +\S", call("--help").output.split("Commands:")[1], flags=re.MULTILINE)
    assert {"run", "search", "choose", "personalize", "evaluate", "report", "generate", "doctor"} <= set(
        names
    )
    assert "..." not in call("--help").output.split("Commands:")[1]
    for name in names:
        assert call(name, "--help").exit_code == 0


def test_version_is_the_package_s() -> None:
    assert call("--version").output == f"milp-ray {__version__}\n"


def test_config_show_prints_what_loads_back(tmp_path: Path, repository: Path) -> None:
    demo = repository / "experiments" / "demo.yaml"
    shown = call("config", "show", demo, "search.n_trials=30")
    assert shown.exit_code == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(shown.output, encoding="utf-8")
    assert load_config(copy) == load_config(demo, ["search.n_trials=30"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "show", "nowhere.yaml"], "there is no such configuration file"),
        (["run", "nowhere.yaml"], "there is no such configuration file"),
        (["search", "nowhere"], "there is no such run folder"),
        (["generate", "nowhere", "--user", "u", "Why?"], "there is no such run folder"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_exit_code_2(arguments: list[str], said: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_misspelt_key_names_the_right_one(repository: Path) -> None:
    result = call("config", "show", repository / "experiments" / "demo.yaml", "search.n_trails=3")
    assert result.exit_code == 2
    assert result.stderr == "command line: unknown key search.n_trails; did you mean search.n_trials?\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = call("serach")
    assert result.exit_code == 2
    assert "No such command" in result.stderr


def failed_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException) -> Result:
    """What ``milp-ray run`` makes of an error in a stage."""
    from milp_ray.pipeline import stages

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run_all", fail)
    config = tmp_path / "c.yaml"
    config.write_text(f"name: a\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    return call("run", config)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (KeyboardInterrupt("interrupted: 3 adapters made"), 130, "interrupted: 3 adapters made"),
        (MilpError("base.model is wrong"), 2, "base.model is wrong"),
    ],
)
def test_an_interruption_and_a_mistake_in_a_stage_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int, said: str
) -> None:
    result = failed_run(monkeypatch, tmp_path, error)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_a_defect_of_the_program_tells_where_it_is_and_not_its_message_which_may_quote_a_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from milp_ray.pipeline import stages

    text = " ".join(["my", "secret", "text"])

    def fail(*_: object, **__: object) -> None:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ZeroDivisionError(text) from error

    monkeypatch.setattr(stages, "run_all", fail)
    config = tmp_path / "c.yaml"
    config.write_text(f"name: a\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    result = call("run", config)
    assert result.exit_code == 1
    assert "in fail" in result.output
    assert "ZeroDivisionError" in result.output
    assert "KeyError" in result.output
    assert text not in result.output
    monkeypatch.setenv("MILP_TRACEBACK", "1")
    assert isinstance(call("run", config).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("my secret text"), "OSError: (its message is withheld"),
        (ConnectionRefusedError(111, "my secret text"), "ConnectionRefusedError: Connection refused"),
    ],
)
def test_a_systems_error_that_was_not_foreseen_is_told_without_its_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, said: str
) -> None:
    result = failed_run(monkeypatch, tmp_path, error)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "in fail" in result.stderr
    assert "secret" not in result.output


def test_the_cause_of_a_systems_error_is_told() -> None:
    from milp_ray.errors import safe_traceback

    assert safe_traceback(OSError(28, "anything")).endswith("OSError: No space left on device")


@pytest.mark.parametrize(("cause", "said"), [(None, "c.yaml: No space left"), ("the store is full", "store")])
def test_a_full_disk_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cause: str | None, said: str
) -> None:
    import errno

    from milp_ray.pipeline import stages

    def fail(*_: object, **__: object) -> None:
        full = OSError(errno.ENOSPC, "No space left on device", "c.yaml")
        if cause is None:
            raise full
        try:
            raise MilpError(cause)
        finally:
            raise full  # what a stage notes at its end cannot be written either

    monkeypatch.setattr(stages, "run_all", fail)
    config = tmp_path / "c.yaml"
    config.write_text(f"name: a\noutput_dir: {tmp_path / 'runs'}", encoding="utf-8")
    result = call("run", config)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_the_module_runs_like_the_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "milp_ray", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert answer.stdout == f"milp-ray {__version__}\n"
