"""The charts of a report, as SVG: AUC of the models, validation over training, AUC against speed."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pipeline.experiment.pairs import Column, grouped
from pipeline.experiment.results import Result
from pipeline.runs.run_folder import RunFolder, read_step_log

_COLORS = plt.get_cmap("tab20")


def accuracy(results: Sequence[Result], columns: Sequence[Column]) -> str:
    """Mean test AUC of each model and the seeds' as dots, a panel a data set and dim."""
    labels = list(dict.fromkeys(result.label for result in results))
    drawing, axes = _panels(columns, 0.8 + 0.28 * len(labels), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        cells = grouped(results)
        for place, label in enumerate(labels):
            values = [cell.auc for cell in cells.get((label, column), []) if cell.auc is not None]
            if values:
                axis.plot(values, [place] * len(values), "o", color=_color(place), markersize=4, alpha=0.5)
                axis.plot(fmean(values), place, "|", color=_color(place), markersize=14, markeredgewidth=2.5)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_xlabel("test AUC")
    axes[0].invert_yaxis()  # the panels share it
    return _svg(drawing)


def convergence(results: Sequence[Result], columns: Sequence[Column], out: Path) -> str:
    """Validation AUC over steps, the mean over seeds where all have one."""
    labels = list(dict.fromkeys(result.label for result in results))
    drawing, axes = _panels(columns, max(4.2, 0.2 * len(labels)))
    cells = grouped(results)
    for axis, column in zip(axes, columns, strict=True):
        for place, label in enumerate(labels):
            logs = [read_step_log(RunFolder(out / cell.run).validations) for cell in cells.get((label, column), [])]
            by_step: dict[int, list[float]] = {}
            for log in logs:
                for line in log:
                    if line["auc"] is not None:
                        by_step.setdefault(line["step"], []).append(line["auc"])
            steps = [step for step in sorted(by_step) if len(by_step[step]) == len(logs)]
            if steps:
                means = [fmean(by_step[step]) for step in steps]
                axis.plot(steps, means, "--" if place >= 10 else "-", color=_color(place), label=label, linewidth=1.4)
        axis.set_xlabel("step")
    axes[0].set_ylabel("validation AUC")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _svg(drawing)


def speed(results: Sequence[Result], columns: Sequence[Column]) -> str:
    """Mean test AUC against samples a second."""
    labels = list(dict.fromkeys(result.label for result in results))
    drawing, axes = _panels(columns, 4.0)
    cells = grouped(results)
    for axis, column in zip(axes, columns, strict=True):
        for place, label in enumerate(labels):
            points = [
                (cell.samples_per_s, cell.auc)
                for cell in cells.get((label, column), [])
                if cell.samples_per_s is not None and cell.auc is not None
            ]
            if points:
                x, y = (fmean(values) for values in zip(*points, strict=True))
                axis.plot(x, y, "o", color=_color(place))
                axis.annotate(f"  {label}", (x, y), fontsize=7, color="#444444")
        axis.set_xlabel("samples/s in training")
        axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axis.margins(x=0.25)
        axis.set_xlim(0)
    axes[0].set_ylabel("test AUC")
    return _svg(drawing)


def _panels(columns: Sequence[Column], height: float, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    drawing, grid = plt.subplots(
        1, len(columns), figsize=(max(8.0, 4.2 * len(columns)), height), layout="constrained", squeeze=False,
        sharey=sharey,
    )  # fmt: skip
    for axis, (data, dim) in zip(grid[0], columns, strict=True):
        axis.set_title(f"{data}, d {dim}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return drawing, list(grid[0])


def _color(place: int) -> tuple[float, ...]:
    # First the ten strong colours of the map, then their pale companions.
    return _COLORS((2 * place) % 20 + (place // 10) % 2)


def _svg(drawing: Figure) -> str:
    image = io.StringIO()
    drawing.savefig(image, format="svg", metadata={"Date": None})
    plt.close(drawing)
    text = image.getvalue()
    return text[text.index("<svg") :]
