"""The pictures of the Ray dashboard in this folder's README, taken while the demo's search runs:

    .venv/bin/python cluster/screenshots.py        # needs chromium on PATH; some two minutes

Starts a Ray head on this machine, submits experiments/demo.yaml to it as a job, and photographs pages of the
dashboard with headless Chromium once the first trials have ended.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Path(__file__).resolve().parent / "images"
NAME = "demo"
PAGES = {"jobs": "#/jobs", "job": f"#/jobs/{NAME}", "actors": "#/actors"}
# Nothing of the browser's own goes to the network.
CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
CHROMIUM += ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
TRIALS_FIRST = 3  # that have ended before the pictures are taken
LONGEST_SECONDS = 600.0


def _main() -> None:
    """Take the pictures."""
    if shutil.which(CHROMIUM[0]) is None:
        raise SystemExit("chromium is not on PATH: install it (Debian: apt-get install chromium)")
    IMAGES.mkdir(exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    # Nobody but this machine reaches the dashboard, and a browser cannot be given a token from outside.
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # Jobs run the first `python` there.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        start += [f"--port={_free_port()}", f"--dashboard-port={port}", "--object-store-memory=268435456"]
        start += [f"--dashboard-agent-listen-port={_free_port()}", f"--temp-dir={folder}/ray"]
        head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            _submit_when_up(url, folder, environment)
            _wait_for_trials(Path(folder, "runs", NAME, "gauges.json"))
            for name, page in PAGES.items():
                _photograph(f"{url}/{page}", IMAGES / f"dashboard_{name}.png", Path(folder, "browser", name))
        finally:
            os.killpg(head.pid, 15)
            head.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _submit_when_up(url: str, folder: str, environment: dict[str, str]) -> None:
    config = str(ROOT / "experiments" / "demo.yaml")
    command = [
        sys.executable,
        "-m",
        "milp_ray",
        "submit",
        config,
        f"output_dir={folder}/runs",
        f"name={NAME}",
    ]
    command += ["--address", url, "--no-wait"]
    deadline = time.monotonic() + LONGEST_SECONDS
    while subprocess.run(command, env=environment, capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing could be submitted to {url}")
        time.sleep(2)


def _wait_for_trials(gauges: Path) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        if gauges.is_file():
            values = json.loads(gauges.read_text(encoding="utf-8"))["values"]
            if values.get("trials_finished", 0) >= TRIALS_FIRST:
                return
        time.sleep(1)
    raise SystemExit(f"{TRIALS_FIRST} trials did not end within {LONGEST_SECONDS:.0f} s")


def _photograph(address: str, image: Path, profile: Path) -> None:
    """A page after its scripts have had twenty seconds of the browser's time."""
    options = (f"--user-data-dir={profile}", "--window-size=1400,900", "--virtual-time-budget=20000")
    subprocess.run([*CHROMIUM, *options, f"--screenshot={image}", address], check=True, capture_output=True)


if __name__ == "__main__":
    _main()
