"""Raw points of the search space without a surrogate: the initial ones and random new ones."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from milp_ray.memory.space import SearchSpace

RawPoint = Mapping[str, Any]

# Random draws before giving up on luck and walking through the space in order.
_MAX_DRAWS = 2000


def initial_points(space: SearchSpace, n_points: int, seed: int) -> list[dict[str, Any]]:
    """The first raw points of a study: different canonical layouts, none of them empty.

    A scrambled Sobol sequence over the raw factors with one dimension more, the density: a layer is active
    where its coordinate is below it. Independent fair bits would put nearly all layouts at half the layers,
    where one cannot learn what few or many layers do. As in the paper no hand-picked points are put in.
    Fewer points come back where the space has no more.
    """
    found: dict[str, dict[str, Any]] = {}
    first = space.layout(next(_all_points(space))).canonical()  # the empty one, where the space has it
    n_most = min(n_points, space.n_canonical - first.is_empty)
    for point in itertools.islice(_sobol(space, seed, n_points), 64 * n_points + _MAX_DRAWS):
        _keep_if_new(space, point, found)
        if len(found) == n_most:
            return list(found.values())
    for point in _all_points(space):
        _keep_if_new(space, point, found)
        if len(found) == n_most:
            break
    return list(found.values())


def random_new_point(
    space: SearchSpace, seen: Collection[str], rng: np.random.Generator
) -> dict[str, Any] | None:
    """A raw point whose canonical key is not in ``seen``; ``None`` once every layout has been seen."""
    if len(seen) >= space.n_canonical:
        return None
    for _ in range(_MAX_DRAWS):
        point = _raw_point(space, rng.random(len(space.parameters()) + 1))
        if space.layout(point).canonical().key not in seen:
            return point
    return next(
        (point for point in _all_points(space) if space.layout(point).canonical().key not in seen), None
    )


def _keep_if_new(space: SearchSpace, point: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    layout = space.layout(point).canonical()
    if not layout.is_empty:
        found.setdefault(layout.key, point)


def _sobol(space: SearchSpace, seed: int, n_points: int) -> Iterator[dict[str, Any]]:
    from scipy.stats import qmc

    sequence = qmc.Sobol(len(space.parameters()) + 1, rng=seed)
    block = max(1, n_points - 1).bit_length()  # drawn by powers of two, which keeps the sequence balanced
    while True:
        for row in sequence.random_base2(block):
            yield _raw_point(space, row)
        block = int(sequence.num_generated).bit_length() - 1


def _raw_point(space: SearchSpace, unit: np.ndarray) -> dict[str, Any]:
    """The raw point at ``unit`` in [0, 1)^(1 + number of parameters); the first coordinate is the density."""
    density, coordinates = unit[0], unit[1:]
    point: dict[str, Any] = {}
    for parameter, u in zip(space.parameters(), coordinates, strict=True):
        if parameter.kind == "bool":
            point[parameter.name] = bool(u < density)
        else:
            point[parameter.name] = parameter.values[
                min(int(u * len(parameter.values)), len(parameter.values) - 1)
            ]
    return point


def _all_points(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """The first raw point of every canonical layout, in order; lazily, as there may be very many.

    Where layers are searched the first point of a layout, and the only one that is made, is its own mask with
    as many LoRAs: there are 2^L masks, however few of them are layouts with no more LoRAs than are allowed.
    """
    parameters = space.parameters()
    n_bits = sum(parameter.kind == "bool" for parameter in parameters)
    most = space.n_layers if space.fixed_number is None else space.fixed_number
    for mask in _masks(n_bits, most):
        rest = [
            (sum(mask),) if n_bits and parameter.name == "n_loras" else parameter.values
            for parameter in parameters[n_bits:]
        ]
        for values in itertools.product(*rest):
            yield {p.name: value for p, value in zip(parameters, (*mask, *values), strict=True)}


def _masks(n_layers: int, most: int) -> Iterator[tuple[bool, ...]]:
    """Masks with at most ``most`` bits, in order: the last layer's bit changes first."""
    if n_layers == 0:
        yield ()
        return
    for bit in (False, True) if most else (False,):
        for rest in _masks(n_layers - 1, most - bit):
            yield (bit, *rest)
