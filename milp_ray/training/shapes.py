"""Sizes of a base's feed-forward maps without its weights, and mostly without torch.

A search is led by a process that never runs the model: importing torch there would cost seconds and hundreds
of MiB at every start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.memory.architecture import (
    FfnShapes,
    FfnSpec,
    ffn_shapes_of_config,
    ffn_spec,
    known_ffn_spec,
)
from milp_ray.training.base import model_config, model_source

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection


def base_shapes(section: BaseSection) -> FfnShapes:
    """Sizes of the feed-forward maps of the base that ``section`` names.

    Raises:
        MilpError: as :func:`milp_ray.training.base.load_base`, where configuration and weights' names tell.
    """
    folder = Path(model_source(section))
    if folder.is_dir():
        found = _in_headers(folder, section.ffn_modules)
        if found is not None:
            return found
    config = model_config(section)
    return ffn_shapes_of_config(config, ffn_spec(config, section.ffn_modules))


def _in_headers(folder: Path, ffn_modules: tuple[str, ...] | None) -> FfnShapes | None:
    """Sizes as the headers of the weights' files state them; ``None`` where they do not settle it."""
    stated: dict[str, list[int]] = {}
    try:
        model_type = _json_object((folder / "config.json").read_bytes()).get("model_type")
        for path in sorted(folder.glob("*.safetensors")):
            stated.update({name: entry["shape"] for name, entry in _header(path).items() if "shape" in entry})
    except ValueError:  # a damaged file, which reading the configuration or loading the base reports
        return None
    spec = known_ffn_spec(str(model_type), ffn_modules)
    if spec is None:
        return None
    layers: list[tuple[tuple[str, int, int], ...]] = []
    while (layer := _layer(spec, len(layers), stated)) is not None:
        layers.append(layer)
    if not layers or any(layer != layers[0] for layer in layers):
        return None
    return FfnShapes(n_layers=len(layers), modules=layers[0])


def _layer(
    spec: FfnSpec, index: int, stated: dict[str, list[int]]
) -> tuple[tuple[str, int, int], ...] | None:
    """(name, in, out) of each map of one layer."""
    sizes = [stated.get(f"{name}.weight", []) for name in spec.module_names(index)]
    if any(len(size) != 2 for size in sizes):
        return None
    return tuple(
        (name, *((size[0], size[1]) if spec.fan_in_fan_out else (size[1], size[0])))
        for name, size in zip(spec.modules, sizes, strict=True)
    )


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes of length, little-endian, then JSON.

    Raises:
        ValueError: it is no such file; the pointer that Git LFS leaves in its place is none.
    """
    rest = path.stat().st_size - 8
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > rest:
            raise ValueError(f"{path.name}: its header would be longer than the file")
        return _json_object(file.read(length))


def _json_object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("JSON, but no object")
    return found
