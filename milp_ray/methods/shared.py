"""What a method trains on all users together, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.training.adapters import CONFIG_FILE, load_adapter, save_adapter

if TYPE_CHECKING:
    import torch

    from milp_ray.training.adapters import Adapter

_TENSORS, _FACTS = "shared.safetensors", "shared.json"


@dataclass(frozen=True)
class Shared:
    """An adapter for everybody, tensors of a model of the method's own, and numbers or words.

    It is made of many users' data: a user who is forgotten is gone from it when it is made anew without them.
    """

    adapter: Adapter | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights as stored, and of the facts."""
        tensors = [*(self.adapter.tensors.values() if self.adapter else ()), *self.tensors.values()]
        return sum(t.numel() * t.element_size() for t in tensors) + len(json.dumps(dict(self.facts)))

    def save(self, folder: Path) -> None:
        """Write it into a folder, which is made if missing."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is not None:
            save_adapter(self.adapter, folder)
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, folder / _TENSORS)
        (folder / _FACTS).write_text(json.dumps(dict(self.facts)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Shared:
        """Read what :meth:`save` wrote."""
        from safetensors.torch import load_file

        adapter = load_adapter(folder) if (folder / CONFIG_FILE).exists() else None
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        return cls(adapter, load_file(folder / _TENSORS), facts)
