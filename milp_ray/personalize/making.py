"""What a worker of the batch does: load the base, train the users it is given, publish each as it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.personalize.beside import Beside
from milp_ray.personalize.intake import Item
from milp_ray.personalize.layouts.race import Entrant, train_decided
from milp_ray.personalize.layouts.tally import layout_counts
from milp_ray.personalize.provenance import Provenance
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore, KeyProblemError, StoreUnavailableError, hash_id
from milp_ray.personalize.worker import CannotGoOnError
from milp_ray.training.peaks import peak_gpu_mib

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection
    from milp_ray.training.base import Base
    from milp_ray.training.job import JobResult

# A store on the network may fail for a moment; one that is full or read-only is no better a moment later,
# and is told a moment later.
_SECONDS_BETWEEN_TRIES = (0.5, 2.0)


def load_worker_base(section: BaseSection, share: float) -> Base:
    """Load the base in a worker, which has ``share`` of a GPU.

    What training needs is imported while the worker starts, not by a user.
    """
    from milp_ray.training.base import load_base

    import_module("milp_ray.training.train")
    return load_base(section, share=share)


def make_adapters(
    store: AdapterStore,
    recipe: Recipe,
    base: Base,
    items: Sequence[Item],
    report: Callable[[int, Any], None],
) -> None:
    """Train some users' adapters in a worker and publish each as it ends; only small numbers go back.

    Raises:
        CannotGoOnError: the store cannot be read or written.
    """
    places: dict[str, int] = {}
    entrants: list[Entrant] = []
    for place, item in enumerate(items):
        user_id = item.split.user_id
        with ends_all():
            if store.has(user_id, item.fingerprint):
                # An earlier worker was lost after it had published and before its reply arrived.
                report(place, _made(store, item))
                continue
        key, seed = hash_id(user_id), recipe.seed_of(user_id)
        places[key] = place
        entrants.append(Entrant(key, item.split, item.parts, seed, item.made.decision))

    def ended(key: str, result: JobResult, facts: Mapping[str, Any]) -> None:
        place = places[key]
        item = items[place]
        made_from = Provenance.of(item.made.digest, item.split)
        try:
            with ends_all():
                publish(store, recipe, base, item, result, made_from, facts)
                made = _made(store, item)
        except MilpError as error:
            report(place, error)
        else:
            report(place, made)

    # A GPU would wait meanwhile. On a CPU the thread would take the interpreter from training, and small
    # models spend much of their time in Python.
    with Beside(ended) if base.engine_device.type == "cuda" else nullcontext(ended) as on_result:
        train_decided(
            base,
            entrants,
            recipe.training,
            recipe.prompt,
            on_result=on_result,
            on_failure=lambda key, error: report(places[key], error),
        )


def publish(
    store: AdapterStore,
    recipe: Recipe,
    base: Base,
    item: Item,
    result: JobResult,
    made_from: Provenance,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Publish what training returned for a user, unless the store has it already.

    ``made_from`` is what the weights were trained on, ``more`` further facts for the manifest.

    Raises:
        MilpError: the weights are not finite.
        StoreUnavailableError: the store cannot be written.
        KeyProblemError: the key is missing or malformed.
    """
    if result.adapter is None:
        raise RuntimeError("training returned no adapter for a layout that is not empty")
    if not all(bool(tensor.isfinite().all()) for tensor in result.adapter.tensors.values()):
        raise MilpError(
            "training diverged: weights are not finite; lower training.learning_rate or training.lora_alpha"
        )
    user_id = item.split.user_id
    meta = {
        "seed": recipe.seed_of(user_id),
        "base": base.model_id,
        "revision": base.revision,
        "parts": sorted(item.parts),
        "n_turns": len(item.split.history),
        "n_train": len(item.split.train),
        "validation_loss": _finite(result.validation_loss),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "peak_rss_mib": round(result.peak_rss_mib, 1),
        "curve": [{k: _finite(v) for k, v in point.items()} for point in result.curve],
        "made_from": made_from.to_dict(),
        **(more or {}),
    }
    for pause in (*_SECONDS_BETWEEN_TRIES, None):
        try:
            # A worker that outlived its batch for a moment may have been first: one version is enough.
            if not store.has(user_id, item.fingerprint):
                store.publish(user_id, result.adapter, meta, fingerprint=item.fingerprint)
            return
        except StoreUnavailableError:
            if pause is None:
                raise
            time.sleep(pause)


@contextmanager
def ends_all() -> Iterator[None]:
    """A store that cannot be read or written, or not with this key, is no user's failure."""
    try:
        yield
    except (StoreUnavailableError, KeyProblemError) as error:
        raise CannotGoOnError(str(error)) from error


def _made(store: AdapterStore, item: Item) -> dict[str, Any]:
    manifest = store.manifest(item.split.user_id)
    numbers = {name: manifest.meta[name] for name in ("steps", "tokens", "seconds", "peak_rss_mib")}
    counts = layout_counts(item.made.decision, manifest)
    numbers |= {"version": manifest.version, "bytes": manifest.n_bytes, "peak_gpu_mib": peak_gpu_mib()}
    return {"layout": counts, **numbers}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: ``None`` stands for both."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
