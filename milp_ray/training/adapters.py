"""One user's LoRA weights: put on the base, taken off again, written to and read from PEFT's folders."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn

    from milp_ray.training.base import Base

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = "default"  # PEFT's name of the one adapter on a model
_LAYOUT_KEY = "milp_layout"  # in the weights file's own header


@dataclass(frozen=True)
class Adapter:
    """LoRA weights with what they need to be put on a base.

    ``config`` is PEFT's ``adapter_config.json``; ``tensors`` are named as in PEFT's weights file and lie on
    the CPU.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layout: CanonicalLayout


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write PEFT's two files into ``folder`` (made if missing); ``PeftModel.from_pretrained`` reads them.

    Each file is whole or not there; publishing the folder as a whole is the adapter store's work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(adapter).items():
        part = folder / (name + ".part")
        part.write_bytes(content)
        os.replace(part, folder / name)


def load_adapter(folder: Path) -> Adapter:
    """Read what :func:`save_adapter` wrote.

    Raises:
        MilpError: a file is missing or is not an adapter of this package.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise MilpError(f"the folder {folder} has no {' and no '.join(missing)}: it holds no adapter")
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return parse_adapter(files, str(folder))


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The content of PEFT's two files, weights first; equal bytes for equal adapters."""
    config = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS_FILE: _weights_file(adapter), CONFIG_FILE: config.encode()}


def parse_adapter(files: Mapping[str, bytes], where: str) -> Adapter:
    """The adapter that :func:`adapter_files` made the files of; ``where`` names them in messages.

    Raises:
        MilpError: they are not an adapter of this package.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config = json.loads(files[CONFIG_FILE])
        weights = files[WEIGHTS_FILE]
        tensors = load(weights)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise MilpError(
            f"the adapter in {where} is damaged: {type(error).__name__}; make it again"
        ) from error
    layout = header.get("__metadata__", {}).get(_LAYOUT_KEY)
    if layout is None:
        raise MilpError(
            f"the weights in {where} name no layout: they were written by another program; "
            "load them with peft.PeftModel.from_pretrained"
        )
    return Adapter(config=config, tensors=tensors, layout=CanonicalLayout.from_dict(json.loads(layout)))


def _weights_file(adapter: Adapter) -> bytes:
    """The tensors as safetensors, equal bytes for equal adapters.

    The library writes the header's entries in an order that differs from call to call; here they are sorted.
    """
    from safetensors.torch import save

    metadata = {"format": "pt", _LAYOUT_KEY: json.dumps(adapter.layout.to_dict(), sort_keys=True)}
    content = save({name: t.contiguous() for name, t in adapter.tensors.items()}, metadata=metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to eight bytes
    return len(header).to_bytes(8, "little") + header + content[end:]


@contextmanager
def injected(base: Base, config: LoraConfig, seed: int) -> Iterator[PeftModel]:
    """The base with fresh LoRA weights on it, in eval mode; only they ask for gradients.

    The weights are drawn from ``seed``, whatever the state of torch's global generator, which is left as it
    was. On leaving, the LoRA modules are taken off again, also after an error.
    """
    import torch
    from peft import get_peft_model

    with quiet_peft():
        with torch.random.fork_rng(devices=_cuda_devices(base)):
            torch.manual_seed(seed)
            model = get_peft_model(base.model, config, adapter_name=_NAME)
        try:
            yield model.eval()
        finally:
            model.unload()


@contextmanager
def attached(base: Base, adapter: Adapter | None) -> Iterator[nn.Module]:
    """A model with ``adapter`` active (``None``: the base itself); the base is afterwards as it was.

    Raises:
        MilpError: the adapter does not fit this base.
    """
    if adapter is None:
        yield base.model
        return
    from peft import LoraConfig

    fields = {k: v for k, v in adapter.config.items() if k in LoraConfig.__dataclass_fields__}
    config = LoraConfig(**{k: v for k, v in fields.items() if k not in {"peft_type", "auto_mapping"}})
    with injected(base, config, seed=0) as model:
        load_tensors(model, adapter.tensors)
        yield model


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA weights of a PEFT model by the names that PEFT's files use, in the order of its modules."""
    return {
        name.replace(f".{_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def read_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the LoRA weights on the CPU in float32, ZeRO-3's scattered ones gathered."""
    parameters = lora_parameters(model)
    with _gathered(list(parameters.values()), modify=False):
        return {name: p.detach().float().cpu().clone() for name, p in parameters.items()}


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set the LoRA weights.

    Raises:
        MilpError: names or shapes are not the model's: nothing is set then.
    """
    import torch

    parameters = lora_parameters(model)
    with _gathered(list(parameters.values()), modify=True):
        ours = {name: tuple(p.shape) for name, p in parameters.items()}
        check_shapes(tensors, ours)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


def check_shapes(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose weights are not those that the base wants.

    Raises:
        MilpError: a name or shape differs.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise MilpError(
            f"the adapter does not fit this base: {len(differing)} of its weights are missing, unknown or of "
            f"another shape, the first is {differing[0]}; use the base that the adapter names"
        )


@contextmanager
def _gathered(parameters: list[nn.Parameter], *, modify: bool) -> Iterator[None]:
    """Whole parameters inside, where ZeRO-3 has scattered them."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield


def adapter_config(lora: LoraConfig, base: Base, tensor_names: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration as plain JSON types; sets are sorted, so that equal adapters are equal files."""
    config = lora.to_dict()
    config |= {"base_model_name_or_path": base.model_id, "revision": base.revision, "inference_mode": True}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=_plain))
    names = (name.removeprefix("base_model.model.") for name in tensor_names)
    plain["target_modules"] = list(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in names))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", str(value))


def _cuda_devices(base: Base) -> list[int]:
    return [base.device.index or 0] if base.device.type == "cuda" else []


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep PEFT's warnings about transformers' names to itself."""
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers has renamed; the old name still answers.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        yield
