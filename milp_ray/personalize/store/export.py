"""Adapters for other programs: plain PEFT folders, in the clear, that servers cannot misread.

The scale lora_alpha / r is folded into B, and lora_alpha is set to r: a server that takes the scale from
elsewhere, or reads no ``alpha_pattern``, computes the same. One rank holds everywhere, every map is named in
full, and the weights are float32.

For vLLM the rank is raised to one of its ceilings with zeros (96 to 128): these components add nothing, and
``--max-lora-rank`` is then exactly the adapters' rank. Maps must be ones on which vLLM puts LoRA.

    FOLDER/<sha256 of the user id>/adapter_config.json
                                   adapter_model.safetensors
    FOLDER/index.jsonl             user id → folder, a line each
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from milp_ray.errors import MilpError
from milp_ray.personalize.store.faults import AdapterDamagedError
from milp_ray.personalize.store.names import hash_id

if TYPE_CHECKING:
    from milp_ray.config.base import BaseSection
    from milp_ray.personalize.store.adapter_store import AdapterStore
    from milp_ray.personalize.store.faults import OnDamaged
    from milp_ray.training.adapters import Adapter

INDEX = "index.jsonl"
Format = Literal["peft", "vllm"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank
VLLM_MAPS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2")
_PROBE = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True, slots=True)
class Exported:
    """One user's exported adapter."""

    user_id: str
    folder: Path
    rank: int
    version: int


def export_users(
    store: AdapterStore,
    to: Path,
    user_ids: Iterable[str],
    format: Format,
    *,
    on_damaged: OnDamaged | None = None,
) -> Iterator[Exported]:
    """Write the current adapters of some users under ``to``, one after the other.

    Args:
        store: the store.
        to: a folder that is empty or not there; adapters stand in it in the clear.
        user_ids: whose.
        format: ``"peft"``, or ``"vllm"`` for folders that vLLM serves.
        on_damaged: is told of an adapter that is damaged and left out; ``None``: that raises.

    Raises:
        MilpError: ``to`` holds something already; an adapter cannot be served by vLLM.
        AdapterMissingError: a user has no adapter.
        AdapterDamagedError: an adapter is not what was published.
    """
    from milp_ray.training.adapters import save_adapter

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise MilpError(f"{to} exists and is not empty; export into a new folder")
    to.mkdir(parents=True, exist_ok=True)
    with (to / INDEX).open("w", encoding="utf-8") as index:
        for user_id in user_ids:
            try:
                version = store.manifest(user_id).version
                adapter = exported(store.load(user_id, version=version), format)
            except AdapterDamagedError as error:
                if on_damaged is None:
                    raise
                on_damaged(error)
                continue
            folder = to / hash_id(user_id)
            save_adapter(adapter, folder)
            line = {
                "user_id": user_id,
                "folder": folder.name,
                "version": version,
                "rank": adapter.config["r"],
            }
            index.write(json.dumps(line) + "\n")
            yield Exported(user_id, folder, adapter.config["r"], version)


def exported(adapter: Adapter, format: Format) -> Adapter:
    """The same update of the base's weights under a configuration that leaves nothing to be misread.

    Raises:
        MilpError: vLLM cannot serve it.
    """
    import torch

    config = adapter.config
    rank, scale = int(config["r"]), _scale(config)
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise MilpError(
            "the adapter has ranks or scales of its own for some maps (rank_pattern, alpha_pattern): it was "
            "not made by this package, which gives all maps one; export it with PEFT"
        )
    new_rank = _vllm_rank(adapter, rank) if format == "vllm" else rank
    tensors = {}
    for name, tensor in adapter.tensors.items():
        is_a = ".lora_A." in name
        weights = tensor.float() if is_a else tensor.float() * scale
        shape = (new_rank - rank, weights.shape[1]) if is_a else (weights.shape[0], new_rank - rank)
        tensors[name] = torch.cat([weights, weights.new_zeros(shape)], dim=0 if is_a else 1)
    plain = {
        "r": new_rank,
        "lora_alpha": new_rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": _maps(adapter),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    return replace(adapter, config={**config, **plain}, tensors=tensors)


def largest_difference(store: AdapterStore, exports: Iterable[Exported], section: BaseSection) -> float:
    """The largest difference of any logit between stored adapters here and their exports in PEFT.

    Args:
        store: where the adapters are.
        exports: what was exported of it.
        section: the base; it is loaded in float32, once for both.
    """
    import torch
    from peft import PeftModel

    from milp_ray.training.adapters import attached, quiet_peft
    from milp_ray.training.base import load_base

    base = load_base(section.model_copy(update={"dtype": "float32"}))
    ids = torch.tensor([base.tokenize([_PROBE])[0]], device=base.device)
    largest = 0.0
    with torch.no_grad():
        for one in exports:
            with attached(base, store.load(one.user_id, version=one.version)) as model:
                ours = model(input_ids=ids).logits
            with quiet_peft():
                served = PeftModel.from_pretrained(base.model, one.folder).eval()
            try:
                theirs = served(input_ids=ids).logits
            finally:
                served.unload()
            largest = max(largest, float((ours - theirs).abs().max()))
    return largest


def _scale(config: dict[str, Any]) -> float:
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _vllm_rank(adapter: Adapter, rank: int) -> int:
    """The smallest ceiling that holds ``rank``."""
    unknown = [name for name in _maps(adapter) if name.rpartition(".")[2] not in VLLM_MAPS]
    if unknown or adapter.config.get("fan_in_fan_out"):
        name = (unknown or _maps(adapter))[0]
        raise MilpError(
            f"vLLM puts no LoRA on {name} (it does on maps called {', '.join(VLLM_MAPS)}, as Llama, Mistral, "
            "Qwen, Gemma, Phi and OPT have them); use --format peft and a server that reads PEFT's folders"
        )
    fitting = [ceiling for ceiling in VLLM_RANKS if ceiling >= rank]
    if not fitting:
        raise MilpError(
            f"rank {rank} is above vLLM's largest --max-lora-rank, {VLLM_RANKS[-1]}; use --format peft"
        )
    return fitting[0]


def _maps(adapter: Adapter) -> list[str]:
    """Full names of the maps that carry LoRA, in the order of the configuration: layer by layer."""
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in adapter.tensors}
    declared = [name for name in adapter.config["target_modules"] if name in names]
    return [*declared, *sorted(names.difference(declared))]
