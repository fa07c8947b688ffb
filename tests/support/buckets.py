"""A local server that speaks S3's protocol, for what lies in buckets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# moto's dependencies exclude versions of ours: it has a folder of its own, beside which nothing is installed.
MOTO = Path(sys.prefix) / "moto-server"
START_SECONDS = 120.0


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """HOST:PORT of a local server that speaks S3's protocol and knows a bucket called ``bucket``."""
    if not MOTO.is_dir():
        pytest.fail(f"{MOTO.name} is not installed in this environment; `make test` does that")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its own folder alone: not this environment's packages, and not the checkout.
    environment = {**os.environ, "PYTHONPATH": str(MOTO), "PYTHONDONTWRITEBYTECODE": ""}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                make_bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.urlopen(make_bucket, timeout=START_SECONDS).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The options of a URI on the local server, after its ``?``; credentials are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"endpoint_override={s3_server}&scheme=http&region=us-east-1"
