"""The charts of an experiment's report: AUC of the models, validation over training, AUC against speed.

Each has a panel for each data set and dim; a model has the same colour in all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.experiment.results import Column, Result, grouped
from pipeline.reporting.plots import COUNTS, color, panels, svg
from pipeline.runs.run_folder import RunFolder, read_step_log


def accuracy(results: Sequence[Result], columns: Sequence[Column]) -> Markup:
    """Mean test AUC of each model as a bar, and that of each seed as a dot.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
    """
    labels, cells = _labels(results), grouped(results)
    figure, axes = _panels(columns, 0.8 + 0.28 * len(labels), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for row, label in enumerate(labels):
            values = [cell.auc for cell in cells.get((label, column), []) if cell.auc is not None]
            if values:
                axis.plot(values, [row] * len(values), "o", color=color(row), markersize=4, alpha=0.5)
                axis.plot(fmean(values), row, "|", color=color(row), markersize=14, markeredgewidth=2.5)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xlabel("test AUC")
    axes[0].invert_yaxis()  # The panels share it: one call turns all of them.
    return svg(figure, "accuracy")


def convergence(results: Sequence[Result], columns: Sequence[Column], out: Path) -> Markup:
    """Validation AUC over steps, the mean over seeds at the steps that all of them have reached.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
        out: folder of the experiment.
    """
    labels, cells = _labels(results), grouped(results)
    figure, axes = _panels(columns, max(3.6, 0.2 * len(labels)))
    for axis, column in zip(axes, columns, strict=True):
        for index, label in enumerate(labels):
            logs = [read_step_log(RunFolder(out / cell.run).validations) for cell in cells.get((label, column), [])]
            by_step: dict[int, list[float]] = {}
            for log in logs:
                for line in log:
                    if line["auc"] is not None:
                        by_step.setdefault(line["step"], []).append(line["auc"])
            # A mean over other seeds at each step would jump.
            steps = [step for step in sorted(by_step) if len(by_step[step]) == len(logs)]
            if steps:
                means = [fmean(by_step[step]) for step in steps]
                style = "--" if index >= 10 else "-"  # from there on colours are pale
                axis.plot(steps, means, style, color=color(index), label=label, linewidth=1.4)
        axis.set_xlabel("step")
        axis.set_ylabel("validation AUC")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(
        handles=[lines[label] for label in labels if label in lines], loc="outside right center", frameon=False
    )
    return svg(figure, "convergence")


def speed(results: Sequence[Result], columns: Sequence[Column]) -> Markup:
    """Mean test AUC against mean samples a second.

    Args:
        results: of finished cells.
        columns: data sets and dims, a panel each.
    """
    labels, cells = _labels(results), grouped(results)
    figure, axes = _panels(columns, 3.8)
    for axis, column in zip(axes, columns, strict=True):
        for index, label in enumerate(labels):
            points = [
                (cell.samples_per_s, cell.auc)
                for cell in cells.get((label, column), [])
                if cell.samples_per_s is not None and cell.auc is not None
            ]
            if points:
                x, y = (fmean(values) for values in zip(*points, strict=True))
                axis.plot(x, y, "o", color=color(index))
                axis.annotate(f"  {label}", (x, y), fontsize=8, color="#444444", va="center")
        axis.set_xlabel("samples/s in training")
        axis.set_ylabel("test AUC")
        axis.xaxis.set_major_formatter(COUNTS)
        axis.margins(x=0.25)  # room for the labels
        axis.set_xlim(0)
    return svg(figure, "speed")


def _labels(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.label for result in results))


def _panels(columns: Sequence[Column], height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    titles = [f"{data}, d {dim}" for data, dim in columns]
    return panels(len(columns), height=height, titles=titles, sharey=sharey)
