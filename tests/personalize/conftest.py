"""What the store's tests share: a base, adapters on it, and a local S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.training import LoraAlphaSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.lora import lora_config
from milp_ray.training.adapters import Adapter, adapter_config, injected, read_tensors
from milp_ray.training.base import Base, load_base

sys.path.insert(0, str(Path(__file__).parent))  # governed_run, which several files use

# moto's dependencies exclude versions of ours: it has a folder of its own, beside which nothing is installed.
MOTO = Path(sys.prefix) / "moto-server"
START_SECONDS = 120.0


@pytest.fixture(scope="session")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """``make_adapter(base, layout, alpha)``: an adapter that changes the logits (a fresh one has B = 0)."""

    def make(base: Base, layout: CanonicalLayout, alpha: LoraAlphaSection | None = None) -> Adapter:
        config = lora_config(layout, base.spec, alpha or LoraAlphaSection(), 0.0, base.model_id)
        with injected(base, config, seed=3) as model:
            tensors = read_tensors(model)
        made = Adapter(adapter_config(config, base, list(tensors)), tensors, layout)
        generator = torch.Generator().manual_seed(3)
        random = {name: torch.randn(t.shape, generator=generator) for name, t in made.tensors.items()}
        return replace(made, tensors=random)

    return make


@pytest.fixture(scope="session")
def adapter(base: Base, make_adapter: Callable[..., Adapter]) -> Adapter:
    return make_adapter(base, CanonicalLayout((False, True, False, True), rank=4))


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
