"""Memory of a prompted and of a parameterised history, as the history grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from milp_ray.report.style import BLUE, FAINT, INK, MUTED, ORANGE, new_figure, styled, thousands

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB = 2**20


def memory_figure(
    history: Sequence[int],
    prompted: Sequence[int],
    parameterised: Mapping[int, int],
    *,
    context_length: int,
    base: str,
) -> Figure:
    """One line for the prompt, one a rank for the adapter.

    Args:
        history: tokens of history.
        prompted: bytes of one user's answer with so much history in the prompt, one a ``history``.
        parameterised: bytes of it with an adapter on all layers, by rank.
        context_length: tokens after which no prompt goes on.
        base: the model's name.
    """
    with styled():
        figure, axes = new_figure(7.4, 4.2)
        inside = [i for i, tokens in enumerate(history) if tokens <= context_length]
        last = inside[-1]
        axes.plot(history[: last + 1], [b / _MIB for b in prompted[: last + 1]], color=ORANGE, lw=2)
        axes.plot(history[last:], [b / _MIB for b in prompted[last:]], color=ORANGE, lw=2, ls=(0, (2, 2)))
        axes.annotate(
            "history in the prompt",
            (history[last], prompted[last] / _MIB),
            xytext=(-8, 4), textcoords="offset points", ha="right", color=INK, weight="bold",
        )  # fmt: skip
        for place, (rank, size) in enumerate(parameterised.items()):
            axes.plot(
                [history[0], history[-1]], [size / _MIB] * 2, color=BLUE, lw=1.3,
                alpha=0.45 + 0.55 * (place + 1) / len(parameterised),
            )  # fmt: skip
            axes.annotate(
                f"adapter, r = {rank}", (history[-1], size / _MIB), xytext=(6, 0),
                textcoords="offset points", va="center", color=INK, fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        axes.axvspan(context_length, history[-1], color=FAINT, alpha=0.5, lw=0)
        axes.annotate(
            " beyond the context", (context_length, 0.97), xycoords=("data", "axes fraction"), va="top",
            color=MUTED, fontsize=8.5,
        )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlim(history[0], history[-1])
        axes.xaxis.set_major_formatter(thousands)
        axes.yaxis.set_major_formatter(thousands)
        axes.set_xlabel("History (tokens)")
        axes.set_ylabel("MiB for one user, beside the base")
        axes.set_title(f"Memory as histories grow: {base}")
        return figure
