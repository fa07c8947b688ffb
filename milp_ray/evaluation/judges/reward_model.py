"""A judge out of any reward model: a sequence classifier with one output, from a local folder.

Each answer is scored by itself behind its query (Stiennon et al. 2020; Ouyang et al. 2022), through the
tokenizer's chat template where it has one and as a pair of texts where it has none, and the scores are
subtracted. The wanted response and the user's history are not shown to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milp_ray.errors import MilpError
from milp_ray.evaluation.judges.protocol import Question, named


class RewardModelJudge:
    """Scores with a reward model.

    Args:
        folder: the model in Hugging Face's format, weights as safetensors; nothing is downloaded and no code
            of the folder is run.
        margin: scores that differ by no more are a tie.
        batch_size: rows of a forward pass; results do not depend on it (beyond rounding).
        device: of torch, such as "cpu" or "cuda".

    Raises:
        MilpError: the folder holds no such model.
    """

    def __init__(
        self, folder: Path, *, margin: float = 0.0, batch_size: int = 16, device: str = "cpu"
    ) -> None:
        self.name = named(f"reward_model:{folder.resolve().name}", margin, 0.0)
        self.margin = margin
        self._batch_size = batch_size
        self._model, self._tokenizer = _load(folder, device)

    def prefer(self, questions: Sequence[Question]) -> list[float]:
        """See :class:`~milp_ray.evaluation.judges.protocol.Judge`; in the model's own units."""
        asked = [(q.query, answer) for q in questions for answer in (q.first, q.second)]
        distinct = list(dict.fromkeys(asked))
        scores = dict(zip(distinct, self._scores(distinct), strict=True))
        return [scores[q.query, q.first] - scores[q.query, q.second] for q in questions]

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score a (query, answer), rows of like lengths together."""
        import torch

        rows = [self._row(*pair) for pair in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self._batch_size):
            some = order[start : start + self._batch_size]
            batch = self._tokenizer.pad([rows[i] for i in some], return_tensors="pt")
            with torch.inference_mode():
                logits = self._model(**batch.to(self._model.device)).logits[:, 0]
            for i, score in zip(some, logits.float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _row(self, query: str, answer: str) -> Any:
        """Token ids and mask; a text that is too long loses its beginning, where the query is."""
        limits: dict[str, Any] = {"truncation": True, "max_length": self._longest()}
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
            # The template has put the special tokens there already.
            return self._tokenizer(text, add_special_tokens=False, **limits)
        return self._tokenizer(query, answer, **{**limits, "truncation": "longest_first"})

    def _longest(self) -> int:
        positions = getattr(self._model.config, "max_position_embeddings", None) or 4096
        # RoBERTa counts its positions from the padding id + 1.
        if self._model.config.model_type in {"roberta", "xlm-roberta", "camembert"}:
            positions -= self._model.config.pad_token_id + 1
        return min(positions, self._tokenizer.model_max_length)


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise MilpError(
            f"{folder} holds no model: give the folder of a reward model in Hugging Face's format"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise MilpError(f"{folder} cannot be loaded as a reward model from safetensors: {error}") from None
    if model.config.num_labels != 1:
        raise MilpError(
            f"the model in {folder} has {model.config.num_labels} outputs; a reward model has one"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = "left"
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer
