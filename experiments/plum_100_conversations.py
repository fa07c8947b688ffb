"""PLUM at 100 conversations of a user, against retrieval: what is remembered, and what is made up.

    .venv/bin/python experiments/pretrain_yes_no.py                  # the base: forty minutes of one core
    .venv/bin/python experiments/plum_100_conversations.py           # then: about an hour on two cores
    .venv/bin/python experiments/plum_100_conversations.py --quick   # under a minute; says nothing

Users of PersonaWorld with 200 turns, cut into 100 conversations of two. All that was said is asked for in
frames that no training has seen, own facts also in wordings that no training has seen, each beside something
related that the user never said. A yes/no question is answered by the likelier of the two answers. Open ones
are PersonaWorld's held-out questions for the users' facts, answered by greedy generation.

The embedded base has never read a question that is answered with yes or no. So the base here is one that
was taught such questions on other people. PLUM is trained in the paper's way, the data of a conversation
discarded after it, and with pairs of earlier conversations beside each one's own. The recipe was chosen on
the users of ``--development``. General ability is the perplexity on documents of PersonaWorld about none of
these users.

Each way of answering with each seed is kept in runs/plum_100_conversations when it is finished and not done
again. Writes experiments/results/plum/{table.md,values.csv,figure.png}; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean

import torch
from plum_questions import CONVERSATION, Row, probes, users
from plum_results import table, write
from plum_units import FULL, KEPT, QUICK, TRAINED, WAYS, Unit, do
from result_files import RESULTS

from milp_ray.errors import MilpError

BASE = Path("runs/yes_no_base")  # what pretrain_yes_no.py makes
DEVELOPMENT_SEED, TEST_SEED = 82, 83  # of users
MOST_PROCESSES = 4  # each takes some three gigabytes


def do_all(units: Sequence[Unit], n_processes: int) -> None:
    """Do what is not kept yet, so many units at a time; where there are several, each in its own process."""
    todo = sorted((one for one in units if not one.path.exists()), key=lambda one: _by_length(one.way))
    n_done = len(units) - len(todo)
    if n_done:
        print(f"{n_done} of {len(units)} units are kept from before", flush=True)
    if n_processes == 1:
        for unit in todo:
            started = time.perf_counter()
            do(unit)
            n_done += 1
            _tell(unit, started, f"{n_done}/{len(units)}")
        return
    n_processes = max(1, min(n_processes, len(todo)))
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    context = multiprocessing.get_context("spawn")
    running = {}
    try:
        while todo or running:
            while todo and len(running) < n_processes:
                process = context.Process(target=_work, args=(todo[0], n_threads))
                process.start()
                running[process.sentinel] = (todo.pop(0), process, time.perf_counter())
            for sentinel in wait(list(running)):
                unit, process, started = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise SystemExit(
                        f"{unit.way}, seed {unit.seed} ended with {process.exitcode}; the others are kept: "
                        "run the same again"
                    )
                n_done += 1
                _tell(unit, started, f"{n_done}/{len(units)}")
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def _tell(unit: Unit, started: float, done: str) -> None:
    seconds = time.perf_counter() - started
    print(f"{done} units: {unit.way}, seed {unit.seed}: {seconds:.0f} s", flush=True)


def _work(unit: Unit, n_threads: int) -> None:
    """What a process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the first process ends this one
    torch.set_num_threads(n_threads)
    try:
        do(unit)
    except MilpError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _by_length(way: str) -> int:
    """The longest first, so that no process is left alone with one."""
    return list(TRAINED).index(way) if way in TRAINED else len(TRAINED)


def main() -> None:
    """Do what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--development", action="store_true", help="the users that the recipe was chosen on")
    parser.add_argument("--base", help=f"default: {BASE}; of --quick the embedded one")
    parser.add_argument("--users", type=int, help="how many")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument(
        "--processes", type=int, default=min(MOST_PROCESSES, os.cpu_count() or 1), help="units at a time"
    )
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.name}/plum, of the whole experiment")
    args = parser.parse_args()

    started = time.perf_counter()
    size, n_seeds = (QUICK, 1) if args.quick else (FULL, 3)
    size, n_seeds = replace(size, n_users=args.users or size.n_users), args.seeds or n_seeds
    if not (args.base or args.quick or (BASE / "model.safetensors").is_file()):
        parser.error(
            f"there is no {BASE}; make it with experiments/pretrain_yes_no.py, or say --base embedded"
        )
    base = args.base or ("embedded" if args.quick else str(BASE))
    user_seed = DEVELOPMENT_SEED if args.development else TEST_SEED
    units = [Unit(way, seed, size, user_seed, base) for way in WAYS for seed in range(n_seeds)]
    # Ended from outside, too, it ends its processes.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        do_all(units, 1 if args.quick else args.processes)
    except MilpError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what is finished is kept in {KEPT}: run the same again") from None
    found = {
        way: [json.loads(unit.path.read_text(encoding="utf-8")) for unit in units if unit.way == way]
        for way in WAYS
    }
    n_questions = sum(len(probes(split, 0)) for split in users(user_seed, size.n_users, size.n_turns))
    options = "".join(f" {word}" for word in sys.argv[1:])
    text = (
        f"`experiments/plum_100_conversations.py{options}`: {size.n_users} users of "
        f"{size.n_turns // CONVERSATION.turns} conversations, {n_questions} yes/no questions (of seed 0), "
        f"{n_seeds} seeds.\n\n{table(found)}"
    )
    is_whole = not (args.quick or args.development or args.base or args.users or args.seeds)
    results = args.results or (RESULTS / "plum" if is_whole else None)
    if results:
        write(results, text, found)
    print(text)
    seconds = round(time.perf_counter() - started)
    means = {way: _means([row for rows in runs for row in rows]) for way, runs in found.items()}
    print(json.dumps({"users": size.n_users, "seeds": n_seeds, "seconds": seconds, **means}))


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    """``None``, which JSON can say, where nothing of that kind was asked."""
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    return {name: round(fmean(values), 2) if values else None for name, values in known.items()}


if __name__ == "__main__":
    main()
