"""What runs on the head node for `ray submit`: one argument, the configuration's path or URI.

The launcher copies one file and joins arguments unquoted, so that nothing else can be passed. The process
becomes `milp-ray run`: signals and the exit code are that command's. The run goes on where an earlier one of
its name stopped, and its ``status.json`` says how it ended, whatever Ray's job list says.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from milp_ray import exit_codes
from milp_ray.buckets import Bucket, is_bucket_uri
from milp_ray.errors import MilpError


def main(arguments: Sequence[str]) -> int:
    """Become `milp-ray run` on this node's cluster; the exit code where that is not possible."""
    try:
        command = run_command(arguments)
    except MilpError as error:
        print(str(error), file=sys.stderr)
        return exit_codes.MISTAKE
    # The launcher sets it to 1 for this process; workers get ray.threads_per_worker.
    os.environ.pop("OMP_NUM_THREADS", None)
    print(shlex.join(command[2:]), flush=True)
    os.execv(command[0], command)


def run_command(arguments: Sequence[str]) -> list[str]:
    """The command line for what the launcher passed on.

    Raises:
        MilpError: that is not one configuration that this node can read.
    """
    # A path with spaces arrives in pieces.
    source = " ".join(arguments).strip()
    if not source or source.startswith("-"):
        raise MilpError("give the path or URI of one configuration file, and nothing else")
    config = str(local_copy(source))
    return [sys.executable, "-m", "milp_ray", "run", config, "ray.address=auto", "--preflight"]


def local_copy(source: str) -> Path:
    """The configuration as a file of this machine.

    Raises:
        MilpError: there is none.
    """
    if "://" not in source:
        path = Path(source).expanduser()
        if not path.is_file():
            raise MilpError(
                f"{source}: there is no such file on this node; copy it there (`ray rsync-up`), or give a "
                "URI that the node can read, such as s3://BUCKET/run.yaml"
            )
        return path
    name = hashlib.sha256(source.encode("utf-8")).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"milp_ray-{os.getuid()}-{name}.yaml"
    path.write_bytes(_from_bucket(source) if is_bucket_uri(source) else _fetched(source))
    return path


def _from_bucket(uri: str) -> bytes:
    bucket = Bucket(uri, "configuration")
    try:
        return bucket.read(bucket.root)
    except FileNotFoundError:
        raise MilpError(
            f"there is no {bucket.shown}; copy the configuration there, or check the address"
        ) from None


def _fetched(uri: str) -> bytes:
    """What lies at a URI of another kind, by the filesystem for it that is installed."""
    import fsspec

    try:
        with fsspec.open(uri, "rb") as file:
            return bytes(file.read())
    except ImportError:
        kind = uri.partition("://")[0]
        raise MilpError(
            f"{kind}:// cannot be read on this node: install the fsspec filesystem for {kind}:// there, or "
            "give a path, s3://BUCKET/… or gs://BUCKET/…"
        ) from None
    except (OSError, ValueError) as error:
        raise MilpError(
            f"{uri} cannot be read on this node ({type(error).__name__}); check the address, and what the "
            "node may read"
        ) from None
