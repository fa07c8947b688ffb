"""What a batch of 10,000 users costs beside training, with one, two and four workers.

    .venv/bin/python experiments/benchmarks/scale.py --quick   # 300 users; under a minute
    .venv/bin/python experiments/benchmarks/scale.py           # 10,000 users; some 30 minutes

`milp-ray personalize RUN --users FILE` makes adapters of PersonaWorld users:

* over a base of two layers of width 32 that is trained for one epoch, so that little is measured but the
  orchestration: with one, with two, and with four workers on however many cores there are;
* over the embedded base in the demo's packs with the demo's recipe (`real packs`), with two workers.

Printed of each: users a second (from the first adapter to the last), the share of the workers' time that
is not training, resident memory of driver and workers, and how the driver's grew after the first tenth. Then
what the store's operations cost among ten users and among all, and a projection of the paper's 7B
configuration to 50,000 users on 4 and on 64 A100s, with its assumptions.

The last line is one JSON object: `overhead_share` is that of real packs over the whole batch, start and end
included; `driver_rss_growth` the largest of all batches; `scaling_efficiency_2` users a second of two workers
over twice those of one, of the tiny base; `users_per_second` that of two workers with the tiny base.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from batches.projection import BASE_BYTES_PER_SECOND, Overheads, Projection, project
from batches.stored import operations, write_rate
from batches.tiny import tiny_base
from batches.watch import Watched, new_run, watched_batch
from rich.console import Console
from rich.table import Table

from milp_ray.personalize.store import AdapterStore
from milp_ray.users.persona_world import generate_users

HERE = Path(__file__).resolve().parent
WORKERS = (1, 2, 4)
N_USERS, N_REAL = 10_000, 1_500
N_USERS_QUICK, N_REAL_QUICK = 200, 24
PROJECTED_USERS, PROJECTED_GPUS = 50_000, (4, 64)
TINY_LAYOUT = {"n_layers": 2, "layers": [0, 1], "rank": 4}
# The layout of training.py.
REAL_LAYOUT = {"n_layers": 8, "layers": [4, 5, 6, 7], "rank": 16}


def write_users(path: Path, n_users: int, n_examples: int) -> None:
    """PersonaWorld's short users, one a line."""
    with path.open("w", encoding="utf-8") as file:
        for user in generate_users(n_users, 0, n_examples, seed=3):
            record = {
                "user_id": user.user_id,
                "history": [turn.text for turn in user.history],
                "examples": [{"query": one.query, "response": one.response} for one in user.examples],
            }
            file.write(json.dumps(record) + "\n")


def tiny_batches(folder: Path, n_users: int) -> list[Watched]:
    """A batch of the tiny base for each number of workers; the stores stay."""
    tiny_base(folder / "base")
    write_users(folder / "users.jsonl", n_users, n_examples=6)
    found = []
    for n_workers in WORKERS:
        settings = {
            "base": {"model": str(folder / "base"), "device": "cpu"},
            "training": {"memory_epochs": 1, "instruction_epochs": 1, "batch_size": 16},
            "personalize": {"n_workers": n_workers},
            "ray": {"num_cpus": n_workers, "num_gpus": 0, "threads_per_worker": 1},
        }
        run = new_run(folder / f"tiny{n_workers}", settings, TINY_LAYOUT)
        found.append(watched_batch(run, folder / "users.jsonl", n_users, n_workers))
    return found


def real_batch(folder: Path, n_users: int) -> Watched:
    """A batch of the embedded base with the demo's recipe."""
    write_users(folder / "real.jsonl", n_users, n_examples=50)
    demo = yaml.safe_load((HERE.parent / "demo.yaml").read_text(encoding="utf-8"))
    settings = {
        "base": {"model": "embedded", "device": "cpu"},
        "training": demo["training"],
        "personalize": {"n_workers": 2},
        "ray": {"num_cpus": 2, "num_gpus": 0, "threads_per_worker": 1},
    }
    return watched_batch(new_run(folder / "real", settings, REAL_LAYOUT), folder / "real.jsonl", n_users, 2)


def batch_table(tiny: list[Watched], real: Watched) -> Table:
    """A row a batch."""
    table = Table(title="Batches", title_justify="left")
    for name in ("Base", "Workers", "Users", "Users/s", "Beside training (%)", "without start (%)"):
        table.add_column(name, justify="left" if name == "Base" else "right")
    for name in ("Driver (MiB)", "its growth (%)", "Worker (MiB)", "Driver's CPU (ms/user)", "Start (s)"):
        table.add_column(name, justify="right")
    for base, one in [*(("tiny", one) for one in tiny), ("embedded", real)]:
        table.add_row(
            base,
            str(one.n_workers),
            f"{one.n_users:,}",
            f"{one.users_per_second:.2f}",
            f"{100 * one.overhead_share:.1f}",
            f"{100 * one.steady_overhead_share:.1f}",
            f"{one.driver_mib:.0f}",
            "–" if one.driver_growth is None else f"{100 * one.driver_growth:+.1f}",
            f"{one.worker_mib:.0f}",
            f"{1e3 * one.driver_cpu_seconds / one.n_users:.2f}",
            f"{one.start_seconds:.1f}",
        )
    return table


def projection_table(projections: list[Projection]) -> Table:
    """A row a number of GPUs."""
    table = Table(title=f"{PROJECTED_USERS:,} users of paper_llama2_7b.yaml, projected", title_justify="left")
    for name in ("A100s", "Training (s/user)", "Publishing (s/user)", "Start (s)", "Driver (users/s)"):
        table.add_column(name, justify="right")
    for name in ("Users/s", "Beside training (%)", "Hours"):
        table.add_column(name, justify="right")
    for one in projections:
        table.add_row(
            str(one.n_gpus),
            f"{one.training:.1f}",
            f"{one.publishing:.3f}",
            f"{one.start:.0f}",
            f"{one.driver_users_per_second:.0f}",
            f"{one.users_per_second:.2f}",
            f"{100 * one.overhead_share:.1f}",
            f"{one.wall / 3600:.1f}",
        )
    return table


def measure(folder: Path, n_users: int, n_real: int) -> dict[str, Any]:
    """Run everything, print the tables, and return the figures."""
    console = Console(width=150)
    tiny = tiny_batches(folder, n_users)
    real = real_batch(folder, n_real)
    console.print(batch_table(tiny, real))
    store = AdapterStore(folder / "tiny2" / "run" / "adapters")
    costs = operations(store, n_users, folder / "stores")
    console.print(
        f"Store of {n_users:,} users: reading one {costs['load_ms']} ms (of ten: {costs['load_of_10_ms']}), "
        f"looking one up {costs['has_ms']}, publishing {costs['publish_ms']}"
    )
    overheads = Overheads(
        start=real.start_seconds,
        publish=1e-3 * costs["publish_ms"],
        write_rate=write_rate(store.load(next(iter(store.users()))), folder / "stores"),
        driver=max(one.driver_cpu_seconds / one.n_users for one in tiny),
    )
    projections = project(
        HERE.parent / "paper_llama2_7b.yaml",
        overheads,
        n_users=PROJECTED_USERS,
        n_gpus=PROJECTED_GPUS,
        device="a100",
    )
    console.print(projection_table(projections))
    console.print(
        "Assumed: what `milp-ray estimate experiments/paper_llama2_7b.yaml --users 50000 --device a100` "
        "assumes (35 % of the peak, 2,000 tokens of history and 50 examples a user); a base read at "
        f"{BASE_BYTES_PER_SECOND / 1e9:g} GB/s; adapters written as fast as on this machine "
        f"({overheads.write_rate / 1e6:.0f} MB/s), by each node to a disk of its own; a driver of this "
        "machine's speed, at the CPU time a user of the tiny base."
    )
    one, two = tiny[0], tiny[1]
    growths = [batch.driver_growth for batch in [*tiny, real] if batch.driver_growth is not None]
    return {
        "overhead_share": real.overhead_share,
        "overhead_share_steady": real.steady_overhead_share,
        "overhead_share_tiny_base": two.overhead_share,
        "driver_rss_growth": max(growths) if growths else None,
        "scaling_efficiency_2": two.users_per_second / (2 * one.users_per_second),
        "users_per_second": two.users_per_second,
        "users_per_second_real": real.users_per_second,
        "n_users": n_users,
        "n_users_real": n_real,
        "n_failed": sum(batch.n_failed for batch in [*tiny, real]),
        "store": costs,
        "projection": [asdict(one) | {"overhead_share": one.overhead_share} for one in projections],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few users")
    parser.add_argument("--users", type=int, help="users of the tiny base")
    parser.add_argument("--real-users", type=int, help="users of the embedded base")
    arguments = parser.parse_args()
    n_users, n_real = (N_USERS_QUICK, N_REAL_QUICK) if arguments.quick else (N_USERS, N_REAL)
    n_users, n_real = arguments.users or n_users, arguments.real_users or n_real
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), n_users, n_real)))


if __name__ == "__main__":
    main()
