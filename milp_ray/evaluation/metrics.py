"""What a response is measured by: pure functions of strings, no I/O and no torch.

ROUGE and Persona-F1 are on the ×100 scale of the MiLP paper; fact accuracy is 0 or 1 an answer, so that its
mean is a share. Everything is case-insensitive, and no stemming is done anywhere. BLEU and distinct-n are in
:mod:`milp_ray.evaluation.ngrams`, questions with a closed set of answers in
:mod:`milp_ray.evaluation.tasks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_WORD = re.compile(r"\w+(?:['’]\w+)*")

# Function words of English that say nothing about a person. Negations and quantities stay in: "no" and
# "two" can be the whole difference between two people.
_FUNCTION_WORDS = """
    a an the this that these those
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself
    we us our ours ourselves they them their theirs themselves one's who whom whose which what
    i'm i've i'd i'll you're you've you'd you'll he's she's it's we're we've we'd we'll they're they've they'd
    they'll that's there's what's who's here's let's
    am is are was were be been being do does did doing done have has had having
    can could will would shall should may might must
    and or but if because as until while of at by for with about against between into through during before
    after above below to from up down in out on off over under again further then once so than too very just
    also only here there when where why how all any both each few more most other some such own same
    yes oh well please thanks thank
"""
STOP_WORDS: frozenset[str] = frozenset(_FUNCTION_WORDS.split())


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    # Imported at the first use: the package pulls in nltk and scipy, which take two seconds.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@lru_cache(maxsize=65_536)
def _rouge(prediction: str, reference: str) -> tuple[float, float]:
    scores = _scorer().score(reference, prediction)
    return 100.0 * scores["rouge1"].fmeasure, 100.0 * scores["rougeL"].fmeasure


def rouge_1(prediction: str, reference: str) -> float:
    """Unigram ROUGE, F-measure × 100, in [0, 100] (Lin 2004, as the ``rouge-score`` package computes it).

    Letters other than a–z and digits separate words there, so a text without any of them scores 0.
    """
    return _rouge(prediction, reference)[0]


def rouge_l(prediction: str, reference: str) -> float:
    """Longest-common-subsequence ROUGE, F-measure × 100, in [0, 100]; never above :func:`rouge_1`."""
    return _rouge(prediction, reference)[1]


def words(text: str) -> list[str]:
    """The words of a text in order, lower case; an apostrophe inside a word belongs to it."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def content_words(texts: str | Iterable[str]) -> frozenset[str]:
    """The set of words of one text or of several, stop words removed."""
    if isinstance(texts, str):
        texts = (texts,)
    found: set[str] = set()
    for text in texts:
        found.update(words(text))
    return frozenset(found - STOP_WORDS)


def set_f1(first: frozenset[str], second: frozenset[str]) -> float:
    """F1 × 100 of two word sets, in [0, 100] and symmetric; 0 where either is empty."""
    if not first or not second:
        return 0.0
    return 200.0 * len(first & second) / (len(first) + len(second))


def persona_f1(response: str, persona_texts: str | Iterable[str]) -> float:
    """Unigram F1 × 100 between a response's word set and that of a user's texts (MSP, Zhong et al. 2022).

    ``persona_texts`` are the turns of the user's history, and the profile where there is one. Stop words
    are removed on both sides; 0 where either side is empty. A long history has many words, so values are
    low by construction (the MiLP paper reports 0.3 to 2.3) and comparable only on the same users.
    """
    return set_f1(content_words(response), content_words(persona_texts))


def persona_f1_share(response: str, persona_texts: str | Iterable[str]) -> float:
    """:func:`persona_f1` on the other scale in use, [0, 1], as MSP's code prints it."""
    return persona_f1(response, persona_texts) / 100.0


def perplexity(nll: float, n_tokens: int) -> float | None:
    """exp(nats a token), at least 1; infinite where that is beyond what a float holds.

    Args:
        nll: summed negative log-likelihood in nats, not negative.
        n_tokens: tokens that it is the sum over; ``None`` comes out where there are none.
    """
    if not n_tokens:
        return None
    try:
        return math.exp(nll / n_tokens)
    except OverflowError:
        return math.inf


@lru_cache(maxsize=4096)
def _phrase(answer: str) -> re.Pattern[str]:
    parts = r"\s+".join(re.escape(part) for part in answer.split())
    return re.compile(rf"(?<!\w){parts}(?!\w)", re.IGNORECASE)


def fact_accuracy(response: str, answer: str | None) -> float | None:
    """1.0 where the answer stands in the response as a whole word or phrase, else 0.0.

    Case and the amount of white space do not matter; "cat" is not found in "catalogue". ``None`` where the
    answer is ``None`` or blank: nothing is known about the example, so it counts neither way.
    """
    if answer is None or not answer.strip():
        return None
    return 1.0 if _phrase(answer).search(response) else 0.0
