"""Measure the learning curves of layouts of the embedded base: the table that search benchmarks look up.

    .venv/bin/python experiments/benchmarks/lora_table/make.py --workers 2    # hours; goes on after a kill
    .venv/bin/python experiments/benchmarks/lora_table/make.py --limit 5      # the first five; no table
    .venv/bin/python experiments/benchmarks/lora_table/make.py --write        # the table of what is measured

A layout is trained for every probe user as a trial of a search does it (memory stage), and scored after every
epoch. Every finished layout is a line of a work file at once; the order of its lines does not matter. The
card beside this file says what the columns are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.search import SpaceSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.config.users import SplitSection
from milp_ray.evaluation.metrics import rouge_l
from milp_ray.memory.architecture import adapter_parameters
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.candidates import initial_points

if TYPE_CHECKING:
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.base import Base
    from milp_ray.users.records import UserSplit

TABLE = Path(__file__).parent / "table.parquet"
WORK_FILE = Path("runs/lora_table/curves.jsonl")
SEED = 0  # of the order in which layouts are measured, and of training
# Not the demo's users, which are of seed 0. Of so many users those with the shortest histories are taken:
# a layout has to cost seconds where more than a thousand are measured.
USERS_SEED, N_DRAWN_USERS, N_USERS, N_EXAMPLES = 101, 12, 3, 80
N_EPOCHS = 4
MAX_NEW_TOKENS = 20
# The recipe of a trial in experiments/demo.yaml, with smaller batches and one epoch more: the histories are
# short, and curves are to have something to tell.
TRAINING = TrainingSection(
    learning_rate=1e-2,
    lora_alpha=LoraAlphaSection(rule="sqrt", value=8.0),
    memory_epochs=N_EPOCHS,
    memory_block_turns=1,
    batch_size=8,
)


def layouts_in_order(space: SearchSpace) -> list[CanonicalLayout]:
    """Every canonical layout of the space, once, in the order in which they are measured.

    First no adapter, one layer alone and all layers, each at every rank; then stratified by density as the
    initial points of a search, so that wherever the measurement ends few and many layers are covered alike.
    """
    none = (False,) * space.n_layers
    ones = [tuple(i == layer for i in range(space.n_layers)) for layer in range(space.n_layers)]
    masks = [*ones, (True,) * space.n_layers]
    found = [CanonicalLayout(none, 0)]
    found += [CanonicalLayout(mask, rank) for mask in masks for rank in space.ranks]
    known = set(found)
    for point in initial_points(space, space.n_canonical - 1, SEED):
        layout = space.layout(point).canonical()
        if layout not in known:
            known.add(layout)
            found.append(layout)
    return found


def measure_curve(layout: CanonicalLayout) -> dict[str, Any]:
    """Train and score one layout after every epoch, for every probe user; no texts come back.

    Returns:
        key; adapter_parameters (of one user); validation_loss and rouge_l, both (n_epochs, n_users);
        train_seconds, CPU seconds of all users up to each epoch's end, validation losses included; and
        score_seconds, CPU seconds to generate and score after that epoch.
    """
    base, splits = _base(), _splits()
    losses, scores = np.zeros((2, N_EPOCHS, len(splits)))
    train_seconds, score_seconds = np.zeros((2, N_EPOCHS))
    for place, split in enumerate(splits):
        adapters, losses[:, place], seconds = _trained(base, split, layout, place)
        train_seconds += seconds
        scores[:, place], seconds = _scored(base, split, adapters)
        score_seconds += seconds
    return {
        "key": layout.key,
        "layout": layout.to_dict(),
        "adapter_parameters": adapter_parameters(layout, base.shapes),
        "validation_loss": losses.tolist(),
        "rouge_l": scores.tolist(),
        "train_seconds": train_seconds.tolist(),
        "score_seconds": score_seconds.tolist(),
    }


def _trained(
    base: Base, split: UserSplit, layout: CanonicalLayout, place: int
) -> tuple[list[Adapter | None], list[float], list[float]]:
    """The adapter, the validation loss and the CPU seconds since the start after every epoch."""
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    seed = int(np.random.SeedSequence([SEED, place]).generate_state(1)[0])
    job = Job(f"probe-{place}", split, layout, frozenset({"memory"}), seed)
    weights: list[dict[str, Any]] = []
    seconds: list[float] = []
    started = time.process_time()

    def on_epoch(job_id: str, epoch: int, tensors: dict[str, Any]) -> None:
        seconds.append(time.process_time() - started)
        weights.append(tensors)

    [result] = train(base, [job], TRAINING, PromptSection(), on_epoch=on_epoch, validate_every_epoch=True)
    adapter = result.adapter
    if adapter is None:  # the base alone: the same at any time
        spent = time.process_time() - started
        return [None] * N_EPOCHS, [float(result.validation_loss or 0.0)] * N_EPOCHS, [spent] * N_EPOCHS
    losses = [float(entry["validation_loss"]) for entry in result.curve]
    return [replace(adapter, tensors=tensors) for tensors in weights], losses, seconds


def _scored(
    base: Base, split: UserSplit, adapters: Sequence[Adapter | None]
) -> tuple[list[float], list[float]]:
    """ROUGE-L over the validation queries, and the CPU seconds it took, for every adapter in turn."""
    from milp_ray.training.generation import Questions, generate
    from milp_ray.training.text import query_prompt

    prompts = [query_prompt(example.query, PromptSection()) for example in split.validation]
    scores: list[float] = []
    seconds: list[float] = []
    for adapter in adapters:
        started = time.process_time()
        with _merged(base, adapter):
            [answers] = generate(
                base,
                [Questions(prompts, adapter=None)],
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=len(prompts),
            )
        pairs = zip(answers, split.validation, strict=True)
        scores.append(fmean(rouge_l(answer, example.response) for answer, example in pairs))
        seconds.append(time.process_time() - started)
    return scores, seconds


@contextmanager
def _merged(base: Base, adapter: Adapter | None) -> Iterator[None]:
    """The adapter added into the base's own weights, W + s·BA; the weights are afterwards as they were.

    For the small base this generates in half the time of LoRA modules beside the weights, and the curves
    are most of all generation.
    """
    import torch

    tensors = adapter.tensors if adapter is not None else {}
    scale = adapter.config["lora_alpha"] / adapter.config["r"] if adapter is not None else 0.0
    before: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = base.model.get_parameter(f"{module}.weight")
                before[module] = weight.clone()
                weight += scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        yield
    finally:
        with torch.no_grad():
            for module, weight in before.items():
                base.model.get_parameter(f"{module}.weight").copy_(weight)


@lru_cache(maxsize=1)
def _base() -> Base:
    import torch

    from milp_ray.training.base import load_base

    torch.set_num_threads(1)
    return load_base(BaseSection(device="cpu"))


@lru_cache(maxsize=1)
def _splits() -> tuple[UserSplit, ...]:
    from milp_ray.users.persona_world import generate_users
    from milp_ray.users.splits import split_user

    users = generate_users(n_short=N_DRAWN_USERS, n_long=0, n_examples=N_EXAMPLES, seed=USERS_SEED)
    shortest = sorted(users, key=lambda user: (len(user.history), user.user_id))[:N_USERS]
    return tuple(split_user(user, SplitSection()) for user in shortest)


# ----------------------------------------------------------------------------------------------- work file


def read_curves(path: Path) -> dict[str, dict[str, Any]]:
    """What has been measured, by layout; a last line that a kill cut short is left out."""
    curves: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            curve = json.loads(line)
            curves.setdefault(curve["key"], curve)
    return curves


def measure_all(layouts: Sequence[CanonicalLayout], path: Path, n_workers: int) -> None:
    """Measure what the work file lacks, in processes of one thread each; a line as each is ready."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    done = read_curves(path)
    missing = [layout for layout in layouts if layout.key not in done]
    started = time.monotonic()
    with path.open("a", encoding="utf-8") as file:
        for n, curve in enumerate(_measured(missing, n_workers), 1):
            file.write(json.dumps(curve) + "\n")
            file.flush()
            os.fsync(file.fileno())
            pace = (time.monotonic() - started) / n
            loss, score = fmean(curve["validation_loss"][-1]), fmean(curve["rouge_l"][-1])
            print(
                f"{len(done) + n} of {len(layouts)}  {curve['key']:16s} loss {loss:.3f}  "
                f"ROUGE-L {score:5.1f}  {pace:.1f} s a layout",
                flush=True,
            )


def _end_last_line(path: Path) -> None:
    """Cut off a line that a kill left unfinished, so that the next one begins on its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)


def _measured(layouts: Sequence[CanonicalLayout], n_workers: int) -> Iterator[dict[str, Any]]:
    if n_workers == 1:
        yield from map(measure_curve, layouts)
        return
    with multiprocessing.get_context("spawn").Pool(n_workers) as pool:
        yield from pool.imap_unordered(measure_curve, layouts)


# --------------------------------------------------------------------------------------------------- table


def write_table(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """One row a layout and epoch, sorted by key and epoch: the same curves give the same table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for curve in sorted(curves, key=lambda curve: curve["key"]):
        for epoch in range(N_EPOCHS):
            row: dict[str, Any] = {
                "key": curve["key"],
                "n_loras": len(curve["layout"]["layers"]),
                "rank": curve["layout"]["rank"],
                "adapter_parameters": curve["adapter_parameters"],
                "epoch": epoch + 1,
            }
            for name in ("validation_loss", "rouge_l"):
                values = curve[name][epoch]
                row |= {
                    name: fmean(values),
                    f"{name}_sem": stdev(values) / len(values) ** 0.5,
                    f"{name}_by_user": values,
                }
            row |= {name: curve[name][epoch] for name in ("train_seconds", "score_seconds")}
            rows.append(row)
    number, numbers = pa.float32(), pa.list_(pa.float32(), N_USERS)
    scores = [
        (f"{name}{end}", numbers if end == "_by_user" else number)
        for name in ("validation_loss", "rouge_l")
        for end in ("", "_sem", "_by_user")
    ]
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("n_loras", pa.int8()),
            ("rank", pa.int16()),
            ("adapter_parameters", pa.int32()),
            ("epoch", pa.int8()),
            *scores,
            ("train_seconds", number),
            ("score_seconds", number),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--limit", type=int, help="measure only the first so many, write no table")
    parser.add_argument("--work-file", type=Path, default=WORK_FILE)
    parser.add_argument("--write", action="store_true", help="measure nothing more: write the table")
    arguments = parser.parse_args()
    if not arguments.write:
        from milp_ray.memory.architecture import FfnShapes

        shapes: FfnShapes = _base().shapes
        space = SearchSpace.for_base(SpaceSection(), shapes)
        measure_all(layouts_in_order(space)[: arguments.limit], arguments.work_file, arguments.workers)
    curves = read_curves(arguments.work_file)
    if arguments.write or arguments.limit is None:
        write_table(list(curves.values()), TABLE)
    print(json.dumps({"n_layouts": len(curves), "table_bytes": TABLE.stat().st_size}))


if __name__ == "__main__":
    main()
