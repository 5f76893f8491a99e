"""The charts of an experiment's report: AUC of the models, validation over training, AUC against speed.

Each has a panel for each data set and dim; a model has the same colour in all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipeline.experiment.results import Column, Result, grouped
from pipeline.reporting.plots import color, from_zero, label, panels, style, svg, whole_numbers
from pipeline.runs.run_folder import RunFolder, read_step_log

LEGEND_COLUMNS = 4


def accuracy(results: Sequence[Result], columns: Sequence[Column]) -> Markup:
    """Mean test AUC of each model as a stroke, and that of each seed as a dot.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
    """
    names, cells = _labels(results), grouped(results)
    shown = [label(name) for name in names]
    lines = sum(text.count("\n") + 1 for text in shown)
    figure, axes = _panels(columns, max(1.6, 0.8 + 0.28 * lines), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for row, name in enumerate(names):
            values = [cell.auc for cell in cells.get((name, column), []) if cell.auc is not None]
            if values:
                axis.plot(values, [row] * len(values), "o", color=color(row), markersize=4, alpha=0.5)
                axis.plot(fmean(values), row, "|", color=color(row), markersize=14, markeredgewidth=2.5)
        axis.set_yticks(range(len(names)), shown)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel("test AUC")
    axes[0].set_ylim(len(names) - 0.5, -0.5)  # The panels share it: the first model is at the top of all of them.
    return svg(figure, "accuracy")


def convergence(results: Sequence[Result], columns: Sequence[Column], out: Path) -> Markup:
    """Validation AUC over steps, the mean over seeds at the steps at which it is known of all of them.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
        out: folder of the experiment.
    """
    names, cells = _labels(results), grouped(results)
    figure, axes = _panels(columns, 3.6, labels=len(names))
    for axis, column in zip(axes, columns, strict=True):
        for index, name in enumerate(names):
            logs = [read_step_log(RunFolder(out / cell.run).validations) for cell in cells.get((name, column), [])]
            by_step: dict[int, list[float]] = {}
            for log in logs:
                for line in log:
                    if line["auc"] is not None:
                        by_step.setdefault(line["step"], []).append(line["auc"])
            # A mean over other seeds at each step would jump.
            steps = [step for step in sorted(by_step) if len(by_step[step]) == len(logs)]
            if steps:
                means = [fmean(by_step[step]) for step in steps]
                axis.plot(steps, means, linewidth=1.4, **style(index))
        axis.set_xlabel("step")
        axis.set_ylabel("validation AUC")
        whole_numbers(axis.xaxis)
    _legend(figure, names, lines=True)
    return svg(figure, "convergence")


def speed(results: Sequence[Result], columns: Sequence[Column]) -> Markup:
    """Mean test AUC against mean samples a second.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
    """
    names, cells = _labels(results), grouped(results)
    figure, axes = _panels(columns, 3.6, labels=len(names))
    for axis, column in zip(axes, columns, strict=True):
        for index, name in enumerate(names):
            points = [
                (cell.samples_per_s, cell.auc)
                for cell in cells.get((name, column), [])
                if cell.samples_per_s is not None and cell.auc is not None
            ]
            if points:
                x, y = (fmean(values) for values in zip(*points, strict=True))
                axis.plot(x, y, **(style(index) | {"linestyle": "", "markersize": 7}))
        axis.set_xlabel("samples/s in training")
        axis.set_ylabel("test AUC")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        from_zero(axis.xaxis)
    _legend(figure, names, lines=False)
    return svg(figure, "speed")


def _labels(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.label for result in results))


def _panels(
    columns: Sequence[Column], height: float, *, sharey: bool = False, labels: int = 0
) -> tuple[Figure, list[Axes]]:
    """A panel for each data set and dim, with room for a legend of so many labels below."""
    titles = [f"{data}, d {dim}" for data, dim in columns]
    figure, axes = panels(len(columns), height=height, titles=titles, sharey=sharey)
    figure.set_figheight(figure.get_figheight() + 0.24 * -(-labels // LEGEND_COLUMNS))
    return figure, axes


def _legend(figure: Figure, names: Sequence[str], *, lines: bool) -> None:
    """All models below the panels: beside their points, names would lie on each other."""
    handles = [
        Line2D([], [], label=label(name), **(style(index) | ({} if lines else {"linestyle": "", "markersize": 7})))
        for index, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=8)
