"""What is told where there can be no machines in namespaces."""

from __future__ import annotations

import os

import pytest
from support import machines


def test_root_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo make test-launcher" in str(machines.what_is_missing())


def test_missing_programs_are_named_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        machines.shutil, "which", lambda name, path: None if name in {"sshd", "rsync"} else name
    )
    command = "apt-get install -y --no-install-recommends openssh-server rsync"
    assert machines.what_is_missing() == f"openssh-server, rsync: not installed; `{command}`"
