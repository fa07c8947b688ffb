"""The tiny models that other tests build on are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_a_tiny_model_runs_and_its_tokenizer_round_trips(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = request.getfixturevalue(f"tiny_{name}_dir")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    text = "Käse & 3 dogs."
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], len(tokenizer))


def test_a_made_split_is_the_same_for_the_same_seed(make_split) -> None:
    assert make_split("u-1", 6, 4, 2, 2, 0) == make_split("u-1", 6, 4, 2, 2, 0)
    assert make_split("u-1", 6, 4, 2, 2, 0) != make_split("u-1", 6, 4, 2, 2, 1)
    split = make_split("a", 5, 3, 1, 2, 0)
    assert (len(split.history), len(split.train), len(split.validation), len(split.test)) == (5, 3, 1, 2)
