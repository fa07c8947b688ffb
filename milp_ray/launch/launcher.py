"""Runs through Ray's cluster launcher: `ray submit` with the one file that it copies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.launch.jobs import check_paths

if TYPE_CHECKING:
    from milp_ray.config import Config

# What `ray submit` copies and runs: the installed package's driver.
_DRIVER = "import sys\n\nfrom milp_ray.launch.driver import main\n\nraise SystemExit(main(sys.argv[1:]))\n"


def submit_with_launcher(config: Config, cluster: Path) -> int:
    """Copy the resolved configuration to the head node and run it there; the exit code of `ray submit`.

    `ray submit` gives 1 for any failure: what it was is in the run's ``status.json``.

    Raises:
        MilpError: there is no such cluster file, the run's files would not be shared, or rsync is missing.
    """
    from milp_ray.config_loader import dump_config

    if not cluster.is_file():
        raise MilpError(f"{cluster}: there is no such file; cluster/ holds examples for Ray's launcher")
    if shutil.which("rsync") is None:
        raise MilpError("Ray's launcher copies files with rsync, which is not installed here; install it")
    check_paths(config)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    with tempfile.TemporaryDirectory(prefix="milp_ray-") as folder:
        local, script = Path(folder) / f"{config.name}.yaml", Path(folder) / "milp_ray_submit.py"
        local.write_text(dump_config(config), encoding="utf-8")
        script.write_text(_DRIVER, encoding="utf-8")
        # Of a name without spaces, at the head node's home, where `ray submit` starts.
        remote = f"~/{local.name}"
        copied = subprocess.run([*ray, "rsync-up", str(cluster), str(local), remote], check=False)
        if copied.returncode:
            raise MilpError(
                f"the configuration could not be copied to the head node of {cluster} (above is why); is the "
                f"cluster up? `ray up {cluster}` starts it"
            )
        return subprocess.run([*ray, "submit", str(cluster), str(script), remote], check=False).returncode
