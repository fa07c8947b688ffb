"""The record of a run: what was changed, cut off or taken away is noticed, and a crash is no damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.errors import MilpError
from milp_ray.personalize.governance.consent import record_consent
from milp_ray.personalize.governance.record import Record
from milp_ray.rundir import RunFolder

IDS = ("ann-0001", "bob-0002", "cleo-0003")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose record has three lines."""
    found = RunFolder.create(Config(name="recorded", output_dir=tmp_path))
    for user_id in IDS:
        record_consent(Record(found.path), user_id, "withdrawn", "the officer")
    return found


def files(run: RunFolder) -> tuple[Path, Path]:
    path = Record(run.path).path
    return path, path.with_name("head")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


CUTS: dict[str, tuple[Callable[[list[bytes]], bytes | None], str]] = {
    "the last line": (lambda lines: b"".join(lines[:2]), "it holds 2 whole lines, and 3 were written"),
    "half of the last line": (
        lambda lines: b"".join(lines[:2]) + lines[2][:50],
        "2 whole lines and 50 bytes of a line that is cut off, and 3 were written",
    ),
    "the last line's end": (lambda lines: b"".join(lines)[:-1], "2 whole lines and [0-9]+ bytes of a line"),
    "the middle of a line to the end": (lambda lines: lines[0][:80], "it holds 0 whole lines and 80 bytes"),
    "all lines": (lambda lines: b"", "it holds 0 whole lines, and 3 were written"),
    "the file": (lambda lines: None, "it holds 0 whole lines, and 3 were written, the last on 20"),
}


@pytest.mark.parametrize("what", CUTS)
def test_an_end_that_was_cut_off_is_noticed_and_nobody_is_served(run: RunFolder, what: str) -> None:
    cut, said = CUTS[what]
    path, _ = files(run)
    left = cut(lines_of(path))
    path.unlink() if left is None else path.write_bytes(left)
    with pytest.raises(MilpError, match=said) as told:
        Record(run.path)
    assert "nobody is trained or served" in str(told.value)
    for command in (["audit", str(run.path), IDS[0]], ["consent", str(run.path), IDS[2]]):
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code == 2
        assert re.search(said, answer.stderr)
        assert "Traceback" not in answer.output


@pytest.mark.parametrize("what", ["removed", "of fewer lines", "changed", "of another run"])
def test_a_head_that_was_taken_away_or_changed_is_noticed(run: RunFolder, tmp_path: Path, what: str) -> None:
    path, head = files(run)
    content = json.loads(head.read_bytes())
    if what == "removed":
        head.unlink()
    elif what == "of another run":
        other = RunFolder(tmp_path / "other")
        record_consent(Record(other.path), IDS[0], "given", "x")
        head.write_bytes(files(other)[1].read_bytes())
    else:
        changed = {"of fewer lines": {"n": 2}, "changed": {"last": "0" * 64}}[what]
        head.write_text(json.dumps({**content, **changed}))
    path.write_bytes(b"".join(lines_of(path)[:2]))
    with pytest.raises(MilpError, match=r"head is (missing|not what was written)"):
        Record(run.path)


def test_lines_that_went_with_their_key_are_missed(run: RunFolder) -> None:
    path, head = files(run)
    path.unlink()
    head.with_name("key").unlink()
    with pytest.raises(MilpError, match="key is missing"):
        Record(run.path)


def test_lines_of_a_copy_that_was_gone_on_with_are_noticed(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    for one, user_id in ((run, IDS[0]), (copy, IDS[1])):
        record_consent(Record(one.path), user_id, "given", "the officer")
    files(run)[0].write_bytes(files(copy)[0].read_bytes())  # every line signed with the right key
    with pytest.raises(MilpError, match="line 4 is not the one that head names"):
        Record(run.path)


def test_a_crash_between_a_line_and_its_head_is_no_damage(run: RunFolder) -> None:
    path, head = files(run)
    before = head.read_bytes()
    record_consent(Record(run.path), IDS[0], "given", "the officer")
    head.write_bytes(before)
    record = Record(run.path)
    assert record.n_lines == 4
    assert record.state.consent[record.user_key(IDS[0])].state == "given"
    record_consent(record, IDS[1], "given", "the officer")
    assert Record(run.path).n_lines == 5
    path.write_bytes(b"".join(lines_of(path)[:4]))
    with pytest.raises(MilpError, match="4 whole lines, and 5 were written"):
        Record(run.path)


def test_a_crash_within_a_line_is_told_by_the_audit_and_written_over(run: RunFolder) -> None:
    path, _ = files(run)
    path.write_bytes(path.read_bytes() + b'{"n": 4, "eve')
    answer = CliRunner().invoke(app, ["audit", str(run.path), "nobody-0009"])
    assert answer.exit_code == 0, answer.output
    assert "ends in 13 bytes of a line that was never finished" in " ".join(answer.stdout.split())
    facts = json.loads(CliRunner().invoke(app, ["audit", str(run.path), "nobody-0009", "--json"]).stdout)
    assert facts["record"] == {"lines": 3, "cut_bytes": 13}
    record_consent(Record(run.path), IDS[0], "given", "the officer")
    assert Record(run.path).n_cut_bytes == 0
    assert len(lines_of(path)) == 4


def test_a_run_that_was_killed_before_its_first_line_can_be_gone_on_with(tmp_path: Path) -> None:
    made = RunFolder.create(Config(name="new", output_dir=tmp_path))
    Record(made.path).ensure_key()
    (made.path / "governance" / "key").unlink()  # the head was written, the key was not
    record_consent(Record(made.path), IDS[0], "withdrawn", "x")
    assert Record(made.path).n_lines == 1
    for name in ("key", "head"):
        assert (made.path / "governance" / name).stat().st_mode & 0o777 == 0o600


def test_a_key_that_could_not_be_written_signs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunFolder.create(Config(name="full", output_dir=tmp_path))
    governance = Record(made.path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            governance.ensure_key()
    assert governance.user_key(IDS[0]) == ""
    record_consent(governance, IDS[0], "withdrawn", "x")
    assert Record(made.path).state.consent[Record(made.path).user_key(IDS[0])].state == "withdrawn"
