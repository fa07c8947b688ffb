"""Teach the embedded base to say whether something was said: the base of PLUM's experiment.

    .venv/bin/python experiments/pretrain_yes_no.py    # about forty minutes on one core

The embedded base has never read a question that is answered with yes or no. Here it reads a few turns of
people of the pretraining population and questions whether one of them says this or that, easy ones first:
what was not said is about something else altogether. Then it is another value of the same kind, then what
was said is asked for in other words, and last in up to 32 turns. Every second step it reads pretraining's
documents as well, so that it does not forget them. Writes a model directory (safetensors) to ``--out``; after
an interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yes_no_questions
from plum_questions import NO, PROMPT, YES
from pretrain_tiny import Stream, learning_rate, save, weighted_loss
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from yes_no_questions import LEVELS, Asked, Level, draw_asked

from milp_ray.atomic_files import replacing
from milp_ray.config.base import BaseSection
from milp_ray.training.base import load_base
from milp_ray.training.text import history_context, query_prompt, response_text
from milp_ray.users.persona_world import pretraining_rng
from milp_ray.users.records import Turn

FIRST_DOCUMENT = 5 * 10**8  # pretraining read some hundred thousand, counted from 0
NEXT_LEVEL_ACCURACY, LEVEL_STEPS = 0.9, 25  # the mean over so many steps of a level
# Of the answer's tokens one decides; the others have to be likely, too, for the answers to be compared.
OTHER_TOKENS_WEIGHT = 0.3


@dataclass
class Batch:
    """Several contexts (rows) with their questions, none of which sees another.

    ``ids``, ``positions``: rows × length. ``mask``: rows × 1 × length × length, added to attention scores.
    ``rows``, ``places``, ``targets``, ``decides``: of each token of an answer, where it is predicted, which
    it is, and whether it tells the answers apart.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    decides: torch.Tensor


@dataclass
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0: the context, that all see
    answers: list[tuple[int, int, bool]]  # where a token is predicted, which, and whether it decides


class Questions:
    """Batches of about ``tokens`` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens: int, max_length: int) -> None:
        self._tokenizer, self._tokens, self._max_length = tokenizer, tokens, max_length
        self._answers = {is_yes: self._ids(response_text(YES if is_yes else NO)) for is_yes in (True, False)}
        pairs = zip(self._answers[True], self._answers[False], strict=False)
        self._decides = next(i for i, (a, b) in enumerate(pairs) if a != b)
        self._numbers = itertools.count()

    @property
    def choices(self) -> tuple[int, int]:
        """The tokens that tell yes and no apart."""
        return self._answers[True][self._decides], self._answers[False][self._decides]

    def batches(self, level: Level) -> Iterator[Batch]:
        """Batches without end."""
        rows: list[_Row] = []
        while True:
            row = self._row(draw_asked(level, pretraining_rng(FIRST_DOCUMENT + next(self._numbers))))
            if not row.answers or len(row.ids) > self._max_length:
                continue
            longest = max(len(one.ids) for one in [*rows, row])
            if rows and (len(rows) + 1) * longest > self._tokens:
                yield _batch(rows)
                rows = []
            rows.append(row)

    def _row(self, asked: Asked) -> _Row:
        context = history_context([Turn(text) for text in asked.turns], PROMPT)
        ids = [self._tokenizer.bos_token_id, *self._ids(context)]
        row = _Row(ids, list(range(len(ids))), [0] * len(ids), [])
        n_context = len(ids)
        for number, (question, is_yes) in enumerate(asked.questions, 1):
            answer = [*self._answers[is_yes], self._tokenizer.eos_token_id]
            row.ids += self._ids(query_prompt(question, PROMPT))
            row.answers += [
                (len(row.ids) - 1 + i, token, i == self._decides) for i, token in enumerate(answer)
            ]
            row.ids += answer[:-1]
            n_more = len(row.ids) - len(row.positions)
            row.positions += range(n_context, n_context + n_more)
            row.segments += [number] * n_more
        return row

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _batch(rows: Sequence[_Row]) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids, positions, segments = (
        torch.tensor([part + [fill] * (length - len(part)) for part in parts])
        for parts, fill in (
            ([row.ids for row in rows], 0),
            ([row.positions for row in rows], 0),
            ([row.segments for row in rows], -1),
        )
    )
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    answers = [(number, *answer) for number, row in enumerate(rows) for answer in row.answers]
    number, places, targets, decides = map(torch.tensor, zip(*answers, strict=True))
    return Batch(ids, positions, mask[:, None], number, places, targets, decides)


def answer_loss(
    model: LlamaForCausalLM, batch: Batch, choices: tuple[int, int]
) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the answers' tokens, and the share of questions whose right answer is the likelier."""
    hidden = model.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[batch.rows, batch.places])
    losses = cross_entropy(logits, batch.targets, reduction="none")
    loss = losses[batch.decides].mean() + OTHER_TOKENS_WEIGHT * losses[~batch.decides].mean()
    yes, no = logits[batch.decides][:, choices].unbind(1)
    right = (yes > no) == (batch.targets[batch.decides] == choices[0])
    return loss, right.float().mean().item()


@dataclass
class Progress:
    """How far the lesson is; a resumed one draws again what was read before, and trains on from there."""

    step: int = 0
    level_ends: list[int] = field(default_factory=list)  # the step after which each level was left
    right: list[float] = field(default_factory=list)  # of the steps of this level

    @property
    def level(self) -> int:
        """The present one's number."""
        return len(self.level_ends)


def teach(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    base = load_base(BaseSection(device="cpu"))
    model, tokenizer = base.model.float().train().requires_grad_(True), base.tokenizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    questions = Questions(tokenizer, args.batch_tokens, base.context_length)
    documents = Stream(tokenizer, args.batch_tokens // 2, base.context_length, first=FIRST_DOCUMENT * 2)
    progress = resumed(args, model, optimizer)
    for level in range(progress.level + 1):
        batches = questions.batches(LEVELS[level])
        ends = [*progress.level_ends, progress.step]
        for step in range(ends[level - 1] if level else 0, ends[level]):
            next(batches)
            if step % 2 == 0:
                documents.batch(2)
    started = time.perf_counter()
    for step in range(progress.step, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, 50, 0.3)
        loss, accuracy = answer_loss(model, next(batches), questions.choices)
        loss.backward()
        if step % 2 == 0:
            weighted_loss(model, documents.batch(2))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1
        progress.right.append(accuracy)
        mean = sum(progress.right[-LEVEL_STEPS:]) / LEVEL_STEPS
        if progress.step % LEVEL_STEPS == 0:
            done = f"step {progress.step}/{args.steps} level {progress.level}"
            seconds = time.perf_counter() - started
            print(f"{done} right {100 * mean:.1f} % {seconds:.0f} s", flush=True)
        is_learnt = len(progress.right) >= LEVEL_STEPS and mean > NEXT_LEVEL_ACCURACY
        if is_learnt and progress.level < len(LEVELS) - 1:
            progress.level_ends.append(progress.step)
            progress.right = []
            batches = questions.batches(LEVELS[progress.level])
        if progress.step % args.keep_every == 0:
            keep(args, progress, model, optimizer)
    save(model.eval(), tokenizer, args.out)
    kept_in(args).unlink(missing_ok=True)


def kept_in(args: argparse.Namespace) -> Path:
    """Where an unfinished lesson is kept: one file for each setting and code."""
    code = b"".join(path.read_bytes() for path in (Path(__file__), Path(yes_no_questions.__file__)))
    setting = f"{args.steps} {args.batch_tokens} {args.lr}".encode() + code
    return args.out / f"unfinished-{hashlib.sha256(setting).hexdigest()[:12]}.pt"


def keep(
    args: argparse.Namespace, progress: Progress, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(kept_in(args)) as temporary:
        torch.save([asdict(progress), model.state_dict(), optimizer.state_dict()], temporary)


def resumed(args: argparse.Namespace, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """What was kept, put into the model and the optimizer; the beginning where there is nothing."""
    if not kept_in(args).exists():
        return Progress()
    progress, weights, moments = torch.load(kept_in(args), weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    print(f"going on from step {progress['step']}", flush=True)
    return Progress(**progress)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/yes_no_base"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-every", type=int, default=100, help="steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        teach(args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from what was kept last") from None


if __name__ == "__main__":
    main()
