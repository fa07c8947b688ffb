"""``base``: the frozen language model."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from milp_ray.config.section import Section


class BaseSection(Section):
    """The frozen language model."""

    model: str = "embedded"  # "embedded", a folder, or a Hugging Face model id
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", …
    # Where its weights lie. cpu: in main memory, for a base that does not fit the device. ZeRO-3 then trains
    # on the device, which gets its share of them; answers and final losses are computed on the CPU.
    keep_on: Literal["device", "cpu"] = "device"
    context_length: PositiveInt | None = None  # None: what the model's own configuration states
    # Names of the linear maps of a feed-forward block, relative to one layer (for example "mlp.up_proj").
    # None: known by architecture (Llama, Mistral, Qwen, GPT-2, RoBERTa, …).
    ffn_modules: tuple[str, ...] | None = None
