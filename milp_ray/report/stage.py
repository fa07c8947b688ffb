"""The stage that writes a run's summary, figures and page, from what the other stages left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from milp_ray.report.content import ReportContent, read_content, summary_of
from milp_ray.report.html import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from milp_ray.rundir import RunFolder

PAGE = "index.html"
FIGURES = "figures"


def write_report(run: RunFolder) -> Path:
    """Write ``summary.json``, ``report/figures/*.png`` and ``report/index.html``; the page's path."""
    content = read_content(run)
    run.write_summary(summary_of(content))
    return write_page(content, run.report)


def write_page(content: ReportContent, folder: Path) -> Path:
    """Draw the figures that the content has data for, and the page around them."""
    from milp_ray.atomic_files import write_text
    from milp_ray.report.style import save

    figures = {}
    for name, make in _figures(content).items():
        figure = make()
        path = folder / FIGURES / f"{name}.png"
        if figure is not None:
            figures[name] = save(figure, path).relative_to(folder).as_posix()
        else:
            path.unlink(missing_ok=True)
    page = folder / PAGE
    write_text(page, render(content, figures))
    return page


def _figures(content: ReportContent) -> dict[str, Callable[[], Figure | None]]:
    """Name → function that draws it, for what the content has."""
    from milp_ray.report import importance_figure, score_figures, study_figures

    makers: dict[str, Callable[[], Figure | None]] = {}
    study, comparison, seconds = content.study, content.comparison, content.seconds
    if study is not None and study.trials:
        makers["front"] = lambda: study_figures.pareto_figure(study.trials)
        makers["layout"] = lambda: study_figures.layout_figure(study.trials)
        if study.hypervolumes:
            makers["hypervolume"] = lambda: study_figures.hypervolume_figure(
                study.hypervolumes, study.n_initial, study.hypervolumes_by_time
            )
        if study.analysis is not None:
            analysis = study.analysis
            makers["importance"] = lambda: importance_figure.importance_figure(analysis, study.chosen_mask)
    if comparison is not None:
        makers["methods"] = lambda: score_figures.methods_figure(comparison)
        makers["kinds"] = lambda: score_figures.kinds_figure(comparison)
        makers["differences"] = lambda: score_figures.differences_figure(comparison)
    if seconds:
        makers["seconds"] = lambda: score_figures.seconds_figure(seconds)
    return makers
