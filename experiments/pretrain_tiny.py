"""Make the embedded base: a small Llama pretrained on PersonaWorld's pretraining population.

    .venv/bin/python experiments/pretrain_tiny.py     # about half an hour on one core
    .venv/bin/python experiments/evaluate_tiny.py     # then: the scores of what was made

Trains a byte-level BPE tokenizer and an eight-layer model, writes both to ``--out`` (safetensors) and prints
the held-out loss as it goes.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from milp_ray.config.prompt import PromptSection
from milp_ray.training.text import history_context, profile_context, query_prompt, response_text
from milp_ray.users.persona_world import pretraining_rng
from milp_ray.users.persona_world.attributes import ATTRIBUTES
from milp_ray.users.persona_world.documents import Document, draw_document
from milp_ray.users.records import Turn

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PROMPT = PromptSection()
# Tokens that are not part of a response weigh 0.1 in the loss. Four in five of them are left out and the rest
# weigh five times as much: the same in the mean, for a fifth of the logits.
PROMPT_TOKEN_WEIGHT, PROMPT_TOKEN_SHARE = 0.1, 0.2
# The word in a response that only the context (or a rule) can tell weighs more than the sentence around it.
FACT_TOKEN_WEIGHT = 4.0
# The mixture moves on when the model reads such words out of the present one; guessing costs log 8 = 2.08.
NEXT_LEVEL_FACT_LOSS = 0.45


def spans(document: Document) -> list[tuple[str, bool]]:
    """The document's text in pieces, each with whether it is a response (followed by the end token)."""
    context = profile_context(document.profile, PROMPT)
    context += history_context([Turn(text) for text in document.turns], PROMPT)
    pieces = [(context, False)] if context else []
    for asked in document.asked:
        pieces += [(query_prompt(asked.query, PROMPT), False), (response_text(asked.response), True)]
    return pieces


def train_tokenizer(n_documents: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over pretraining documents; every sequence starts with the begin token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        "".join(text for text, _ in spans(draw_document(pretraining_rng(index), 2)))
        for index in range(n_documents)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


@dataclass
class Batch:
    """Right-padded token ids (rows × length) and the loss weight of each as a target."""

    ids: torch.Tensor
    weights: torch.Tensor


@cache
def _fact_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The first token of every value and of everything that a rule makes of one."""
    words = [word for a in ATTRIBUTES for word in (*a.values, *a.rules[0].choices, *a.rules[1].choices)]
    return frozenset(tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words)


def _response_weights(piece: list[int], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    facts = _fact_tokens(tokenizer)
    return [FACT_TOKEN_WEIGHT if token in facts else 1.0 for token in piece]


def _prompt_weights(n: int, rng: Random) -> list[float]:
    kept = PROMPT_TOKEN_WEIGHT / PROMPT_TOKEN_SHARE
    return [kept if rng.random() < PROMPT_TOKEN_SHARE else 0.0 for _ in range(n)]


def encode(
    document: Document, tokenizer: PreTrainedTokenizerFast, rng: Random
) -> tuple[list[int], list[float]]:
    """Token ids, an end token after every response included, and the weight of each as a target."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    pieces = spans(document)
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    for (_, is_response), piece in zip(pieces, encoded, strict=True):
        piece = [*piece, tokenizer.eos_token_id] if is_response else piece
        ids += piece
        weights += _response_weights(piece, tokenizer) if is_response else _prompt_weights(len(piece), rng)
    return ids, weights


class Stream:
    """Batches of about ``tokens`` tokens from documents of near-equal length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: int, max_length: int, first: int) -> None:
        self._tokenizer, self._tokens, self._max_length, self._next = tokenizer, tokens, max_length, first
        self._ready: list[Batch] = []

    def batch(self, level: int) -> Batch:
        """The next batch; documents are drawn when none is left, from the mixture at ``level``."""
        if not self._ready:
            self._fill(level)
        return self._ready.pop()

    def _fill(self, level: int, n_documents: int = 600) -> None:
        rows = []
        for _ in range(n_documents):
            rng = pretraining_rng(self._next)
            ids, weights = encode(draw_document(rng, level), self._tokenizer, rng)
            self._next += 1
            if len(ids) <= self._max_length:
                rows.append((ids, weights))
        rows.sort(key=lambda row: len(row[0]))
        batch: list[tuple[list[int], list[float]]] = []
        for row in rows:
            if batch and (len(batch) + 1) * len(row[0]) > self._tokens:
                self._ready.append(self._pad(batch))
                batch = []
            batch.append(row)
        Random(self._next).shuffle(self._ready)

    def _pad(self, rows: list[tuple[list[int], list[float]]]) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        pad = self._tokenizer.pad_token_id
        return Batch(
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows]),
        )


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted mean token cross-entropy, and the plain mean over the words that a context or a rule tells.

    Right padding needs no mask under causal attention.
    """
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    kept = weights > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept], reduction="none")
    facts = losses.detach()[weights[kept] == FACT_TOKEN_WEIGHT]
    return (losses * weights[kept]).sum() / weights.sum(), facts.mean().item() if len(facts) else math.nan


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    """Linear warm-up, a plateau, and a linear decay over the last ``decay_share`` of the steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * min(1.0, (steps - step) / (steps * decay_share))


def pretrain(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(6000, args.vocab_size)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=8,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
        # Four times the usual width: a model this small learns to copy from its context far sooner with it.
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}", flush=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    stream = Stream(tokenizer, args.batch_tokens, args.context, first=100_000)
    held_out = Stream(tokenizer, args.batch_tokens, args.context, first=50_000)
    held_out_batches = [held_out.batch(2) for _ in range(4)]
    start, tokens, level, fact_loss = time.time(), 0, 0, math.log(8.0)
    for step in range(args.steps):
        batch = stream.batch(level)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, 80, 0.4)
        loss, batch_fact_loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += int((batch.ids != tokenizer.pad_token_id).sum())
        if not math.isnan(batch_fact_loss):
            fact_loss += 0.03 * (batch_fact_loss - fact_loss)
        if level < 2 and fact_loss < NEXT_LEVEL_FACT_LOSS:
            level, fact_loss = level + 1, math.log(8.0)
        if (step + 1) % args.log_every == 0:
            seconds = time.time() - start
            print(
                f"step {step + 1}/{args.steps} level {level} loss {loss.item():.3f} facts {fact_loss:.3f} "
                f"held-out {held_out_loss(model, held_out_batches)} {tokens / 1e6:.2f} M tokens "
                f"{tokens / seconds:.0f}/s {seconds:.0f} s",
                flush=True,
            )
            save(model, tokenizer, args.out)
    save(model, tokenizer, args.out)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batches: list[Batch]) -> str:
    """Weighted loss / loss of the fact words, over documents that are not trained on."""
    losses = [weighted_loss(model, batch) for batch in batches]
    return " / ".join(f"{sum(map(float, column)) / len(losses):.3f}" for column in zip(*losses, strict=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("milp_ray/data/tiny_base"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=2560)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args)


if __name__ == "__main__":
    main()
