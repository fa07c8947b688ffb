"""Configurations of the paper's bases as their authors published them, for a machine that cannot fetch them.

Only what decides about sizes is here: the ``config.json`` files of the repositories named below on Hugging
Face. The sizes are also in the papers: Llama 2 (Touvron et al. 2023, arXiv 2307.09288; the 13B's from LLaMA,
arXiv 2302.13971), DialoGPT (Zhang et al. 2020, arXiv 1911.00536), RoBERTa (Liu et al. 2019, arXiv
1907.11692).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _llama2(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


def _roberta(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "roberta",
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "vocab_size": 50265,
        "is_decoder": True,  # how this package uses it
    }


_PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama2(4096, 11008, 32, 32),
    "meta-llama/Llama-2-7b-chat-hf": _llama2(4096, 11008, 32, 32),
    "meta-llama/Llama-2-13b-hf": _llama2(5120, 13824, 40, 40),
    "meta-llama/Llama-2-13b-chat-hf": _llama2(5120, 13824, 40, 40),
    "microsoft/DialoGPT-small": _gpt2(768, 12, 12),
    "microsoft/DialoGPT-medium": _gpt2(1024, 24, 16),
    "microsoft/DialoGPT-large": _gpt2(1280, 36, 20),
    "FacebookAI/roberta-base": _roberta(768, 12, 12),
    "FacebookAI/roberta-large": _roberta(1024, 24, 16),
}
PUBLISHED_MODELS = tuple(_PUBLISHED)


def published_id(model: str) -> str | None:
    """The id above whose last part is that of ``model`` (an id of another owner, a folder), if any."""
    wanted = model.rstrip("/").rpartition("/")[2].lower()
    return next((name for name in _PUBLISHED if name.rpartition("/")[2].lower() == wanted), None)


def published_config(model_id: str) -> PretrainedConfig:
    """The configuration of one of :data:`PUBLISHED_MODELS`.

    Raises:
        KeyError: it is none of them.
    """
    from transformers import AutoConfig

    settings = dict(_PUBLISHED[model_id])
    config: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config
