"""What the page says of a search in tables and sentences: its front, its cost, what matters in a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.report.html_table import Cell, HtmlTable, Row
from milp_ray.report.style import duration, plus_minus

if TYPE_CHECKING:
    from milp_ray.report.content import StudyContent
    from milp_ray.search.insight import StudyStatus

FACTOR_LABELS = {"n": "Number of LoRAs", "rank": "Rank"}


def front_table(study: StudyContent) -> HtmlTable | None:
    """The layouts on the front, the first objective's best on top."""
    if not study.front:
        return None
    names = list(study.front[0].estimates)
    rows = []
    for row in study.front:
        is_chosen = row.trial == study.chosen_trial
        cells = [Cell(str(row.trial), strong=is_chosen)]
        for estimate in row.estimates.values():
            mean, sd = estimate.model_mean, estimate.model_sd
            model = "" if mean is None else f"model {plus_minus(mean, sd)}"
            cells.append(Cell(plus_minus(estimate.value, estimate.standard_error), model, is_chosen))
        rows.append(Row(row.layout.key + (" (chosen)" if is_chosen else ""), cells))
    note = (
        "A layout is written as one digit a layer, 1 for a LoRA, and the rank. After ± the standard error of "
        "the measured mean, the same probe users having measured every layout"
    )
    note += "; below it the model's mean and standard deviation." if study.analysis else "."
    labels = [KNOWN_OBJECTIVES[name].label for name in names]
    return HtmlTable("Layouts on the front", ["Layout", "Trial", *labels], rows, note)


def importance_table(study: StudyContent) -> HtmlTable | None:
    """How much each factor of the layout matters for each objective; ``None`` without an analysis."""
    analysis = study.analysis
    if analysis is None:
        return None
    tops = {
        name: max(values[0] for values in analysis.importance[name].values()) for name in analysis.objectives
    }
    rows = []
    for factor in analysis.factors:
        cells = []
        for name in analysis.objectives:
            share, low, high = analysis.importance[name][factor]
            cells.append(Cell(f"{share:.2f}", f"{low:.2f} to {high:.2f}", strong=0 < share == tops[name]))
        rows.append(Row(FACTOR_LABELS.get(factor, factor.capitalize()), cells))
    told = (analysis.unexplained[name] for name in analysis.objectives)
    rest = [Cell(f"{share:.2f}", f"{low:.2f} to {high:.2f}") for share, low, high in told]
    rows.append(Row("None of them", rest))
    labels = [KNOWN_OBJECTIVES[name].label.partition(" (")[0] for name in analysis.objectives]
    note = (
        "Below each value its interval over the model's hyperparameters. Bold: the most important factor. "
        "None of them: the share of what was measured that no factor tells, a layout's own and noise."
    )
    return HtmlTable("Importance of the layout's factors", ["Factor", *labels], rows, note)


def cost_sentences(status: StudyStatus) -> list[str]:
    """What the search took, and how much of its slots' time stood idle."""
    held = f"{status.cpu_seconds:,.0f} CPU-seconds"
    if status.gpu_seconds:
        held += f" and {status.gpu_seconds:,.0f} GPU-seconds"
    parts = f" in {status.n_sessions} sessions" if status.n_sessions > 1 else ""
    found = [
        f"The search took {duration(status.seconds)}{parts}; its trials worked for "
        f"{duration(status.trial_seconds)} ({held})."
    ]
    if status.n_slots is not None and status.utilisation is not None:
        sentence = f"{status.utilisation:.0%} of the time of its {status.n_slots} slots was spent in trials"
        if status.idle_share is not None:
            sentence += f"; while trials were still to be proposed, {status.idle_share:.1%} of it stood idle"
        found.append(sentence + ".")
    if status.proposal_seconds is not None and status.longest_proposal_seconds is not None:
        batches = f"{status.n_batches} batch{'es' if status.n_batches != 1 else ''}"
        found.append(
            f"Proposing {batches} took {duration(status.proposal_seconds)}, the longest "
            f"{duration(status.longest_proposal_seconds)}."
        )
    if status.max_block_seconds is not None:
        found.append(f"Tune's controller was never held up for longer than {status.max_block_seconds:.2f} s.")
    if status.trials["stopped"]:
        n = status.trials["stopped"]
        found.append(
            f"{n} trial{'s were' if n > 1 else ' was'} stopped early, and no value of theirs counts."
        )
    return found
