"""Disks that only a test sees."""

from __future__ import annotations

import subprocess

import pytest


def in_own_mounts(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount what nobody else sees; needs user namespaces, not root."""
    shell = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-ec", script, "bash"]
    try:
        return subprocess.run([*shell, *map(str, arguments)], capture_output=True, text=True, timeout=480)
    except FileNotFoundError:
        pytest.fail("unshare is not there: install util-linux")
