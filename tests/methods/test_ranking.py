"""Rankings of a user's turns for a query."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import RetrievalSection
from milp_ray.errors import MilpError
from milp_ray.methods.ranking import (
    _sentence_transformer,
    by_bm25,
    by_recency,
    by_vectors,
    fused,
    ranking,
)
from milp_ray.training.base import load_base
from milp_ray.training.encode import mean_states

TEXTS = ["I keep a turtle.", "My sister plays piano.", "It rained today.", "The turtle eats lettuce."]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Any:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def test_recency_ranks_the_latest_first_whatever_is_asked() -> None:
    assert by_recency(TEXTS)("turtle") == [3, 2, 1, 0]


def test_bm25_finds_the_texts_with_the_rare_words_and_leaves_out_those_without() -> None:
    rank = by_bm25(TEXTS)
    assert set(rank("Which turtle do I keep?")) == {0, 3}
    assert rank("Does my sister play the piano?")[0] == 1


def test_bm25_of_equal_texts_ranks_the_later_first() -> None:
    assert by_bm25(["I live in Rome.", "It rains.", "I live in Rome."])("Rome") == [2, 0]


@pytest.mark.parametrize("texts", [[], ["", "  "], ["the", "a"]])
def test_bm25_of_nothing_to_find_finds_nothing(texts: list[str]) -> None:
    assert by_bm25(texts)("Where do I live?") == []


@pytest.mark.parametrize("query", ["", "the", "zebra"])
def test_bm25_of_a_query_without_known_words_finds_nothing(query: str) -> None:
    assert by_bm25(TEXTS)(query) == []


def test_vectors_are_compared_without_what_all_have_in_common() -> None:
    vectors = {"a": [100.0, 1.0, 0.0], "b": [100.0, 0.0, 1.0], "q": [90.0, 0.9, 0.1]}
    rank = by_vectors(["b", "a"], lambda texts: torch.tensor([vectors[text] for text in texts]))
    assert rank("q") == [1, 0]


def test_fusion_puts_first_what_several_rank_high() -> None:
    rank = fused([lambda q: [0, 1, 2], lambda q: [1, 2], lambda q: [2, 1, 0]], 60.0)
    assert rank("") == [1, 2, 0]


def test_all_rankings_of_a_user_without_turns_find_nothing(base: Any) -> None:
    for name in ("recency", "bm25", "dense", "fusion"):
        assert ranking(name, [], base, RetrievalSection())("turtle") == []
    with pytest.raises(MilpError, match="use recency"):
        ranking("luck", [], base, RetrievalSection())


def test_a_missing_encoder_is_told(base: Any) -> None:
    with pytest.raises(MilpError, match=r"encoder.*sentence-transformers"):
        ranking("dense", TEXTS, base, RetrievalSection(encoder="some/model"))


def test_an_encoder_is_loaded_once_for_all_users(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class SentenceTransformer:
        def __init__(self, name: str, **_: Any) -> None:
            loaded.append(name)

        def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    _sentence_transformer.cache_clear()
    for _ in range(3):
        assert len(ranking("dense", TEXTS, base, RetrievalSection(encoder="some/model"))("turtle")) == len(
            TEXTS
        )
    _sentence_transformer.cache_clear()
    assert loaded == ["some/model"]


def test_mean_states_do_not_depend_on_the_other_texts(base: Any) -> None:
    together = mean_states(base, [*TEXTS, "", "x" * 400])
    alone = torch.cat([mean_states(base, [text]) for text in [*TEXTS, "", "x" * 400]])
    assert together.shape == (6, base.model.config.hidden_size)
    assert torch.allclose(together, alone, atol=1e-5)


def test_mean_states_are_the_mean_over_the_texts_own_tokens(base: Any) -> None:
    ids = torch.tensor([[*base.start_ids, *base.tokenize([TEXTS[0]])[0]]])
    with torch.no_grad():
        states = base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    assert torch.allclose(mean_states(base, TEXTS)[0], states.mean(0), atol=1e-5)
