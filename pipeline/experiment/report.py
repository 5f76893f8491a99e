"""The report of an experiment: `report.md`, and `report.html` with charts, one file that needs no network.

Tables are those of the paper: models as rows, data sets x dims as columns.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev

import psutil

from pipeline.experiment import charts
from pipeline.experiment.bootstrap import Pair
from pipeline.experiment.results import Column, Result, grouped
from pipeline.files import write_whole
from pipeline.reporting.page import Chart, Entry, Page, ReportTable, Section, html, markdown
from schemas.experiment import ExperimentSettings


@dataclass(frozen=True)
class _Metric:
    title: str
    note: str
    value: Callable[[Result], float | None]
    shown: Callable[[float], str]
    best: Callable[..., float] | None = None
    """max, min, or None: nothing is marked."""
    spread: bool = True
    """Show the standard deviation over seeds."""


def number(value: float, digits: int = 4) -> str:
    """Without the zero before the point, as the paper writes them."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


_AUC = _Metric("Test AUC", "", lambda cell: cell.auc, number, max)
_FURTHER = (
    _Metric(
        "Test GAUC",
        "AUC of each user, averaged with the user's samples as weight.",
        lambda cell: cell.gauc,
        number,
        max,
    ),
    _Metric("Test log loss", "", lambda cell: cell.log_loss, number, min),
    _Metric("Best validation AUC", "", lambda cell: cell.validation_auc, number, max),
    _Metric(
        "Samples a second",
        "Of training, a process with one OpenMP thread, and a GPU if there is one, beside the other cells of the time.",
        lambda cell: cell.samples_per_s,
        lambda value: f"{value:,.0f}",
    ),
    _Metric(
        "Minutes a cell",
        "Start, training, validations, test and predictions.",
        lambda cell: cell.wall_s / 60 if cell.wall_s is not None else None,
        lambda value: f"{value:.1f}",
    ),
    _Metric(
        "Peak memory, GiB",
        "Resident, of the process; never less than the runner's own.",
        lambda cell: cell.peak_bytes / 2**30 if cell.peak_bytes else None,
        lambda value: f"{value:.2f}",
        spread=False,
    ),
    _Metric("Epoch of the tested checkpoint", "", lambda cell: cell.best_epoch, lambda value: f"{value:.1f}"),
)


def write_report(
    out: Path, experiment: ExperimentSettings, results: Sequence[Result], pairs: Sequence[Pair], command: str
) -> None:
    """Write `report.md` and `report.html`; each is there with all its content, or as it was before.

    Args:
        out: folder of the experiment.
        experiment: its settings.
        results: of all cells.
        pairs: of models.
        command: the command line that was given.

    Raises:
        OSError: a file cannot be written.
    """
    failed = [result for result in results if result.state == "failed"]
    sections = []
    if failed:
        items = [f"{cell.data}, {cell.label}, d {cell.dim}, seed {cell.seed}: {cell.error}" for cell in failed]
        sections.append(Section("Failed", items=items))
    auc, *others = all_tables(experiment, results, pairs)
    sections += [auc, Section(charts=_charts(out, results)), *others]
    page = Page(experiment.name, _lead(results), sections, command)
    write_whole(out / "report.md", markdown(page))
    write_whole(out / "report.html", html(page))


def _lead(results: Sequence[Result]) -> list[str]:
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "failed", "unfinished"))
    machine = f"{psutil.cpu_count()} cores ({platform.machine()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"
    revisions = sorted({result.revision for result in results if result.revision})
    trained = f" Trained by revision {', '.join(revisions)}." if revisions else ""
    if len(revisions) > 1:
        trained += " More than one: what changed in between may be in the differences."
    return [f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}", f"{len(states)} cells: {counts}.{trained}"]


def _charts(out: Path, results: Sequence[Result]) -> list[Chart]:
    finished = [result for result in results if result.auc is not None]
    columns = list(dict.fromkeys((result.data, result.dim) for result in finished))
    if not columns:
        return []
    return [
        Chart(charts.accuracy(finished, columns), "Test AUC: a dot is a seed, the stroke their mean."),
        Chart(
            charts.convergence(finished, columns, out),
            "Validation AUC over training: the mean over seeds, at the steps at which it is known of all of them.",
        ),
        Chart(charts.speed(finished, columns), "Test AUC against training speed, mean over seeds."),
    ]


def all_tables(experiment: ExperimentSettings, results: Sequence[Result], pairs: Sequence[Pair]) -> list[Section]:
    """The tables of the report: AUC first, then the pairs of each data set and dim, then everything else."""
    columns = [(data, dim) for data in experiment.data for dim in experiment.dims]
    seeds = len(experiment.seeds)
    note = f"Mean ± standard deviation over {seeds} seeds; the best of a column in bold." if seeds > 1 else ""
    by_column = {column: [pair for pair in pairs if (pair.data, pair.dim) == column] for column in columns}
    return [
        _metric_table(experiment, results, columns, _AUC, note),
        *(_pair_matrix(column, compared) for column, compared in by_column.items() if compared),
        *(_metric_table(experiment, results, columns, metric, metric.note) for metric in _FURTHER),
        _parameters(experiment, results, columns),
    ]


def _metric_table(
    experiment: ExperimentSettings, results: Sequence[Result], columns: Sequence[Column], metric: _Metric, note: str
) -> Section:
    values = {
        key: [value for cell in cells if (value := metric.value(cell)) is not None]
        for key, cells in grouped(results).items()
    }
    # Settings hold the paper's AUC alone.
    published = metric is _AUC and any(row.paper for row in experiment.models.values())
    header, rows = [""], [[Entry(label)] for label in experiment.models]
    for column in columns:
        data, dim = column
        header.append(f"{data}, d {dim}")
        # The best of a column is marked by its mean; a cell that is missing takes no part.
        means = {label: fmean(of_seeds) for label in experiment.models if (of_seeds := values.get((label, column)))}
        best = metric.best(means.values()) if metric.best and means else None
        paper = {label: row.paper.get(data, {}).get(dim) for label, row in experiment.models.items()}
        with_paper = published and any(value is not None for value in paper.values())
        if with_paper:
            header.append("paper")
        for label, entries in zip(experiment.models, rows, strict=True):
            entries.append(_mean_entry(values.get((label, column), []), metric, len(experiment.seeds), best))
            if with_paper:
                figure = paper[label]
                entries.append(Entry("" if figure is None else number(figure, 5)))
    return Section(metric.title, note, table=ReportTable(header, rows))


def _mean_entry(values: Sequence[float], metric: _Metric, seeds: int, best: float | None) -> Entry:
    if not values:
        return Entry("")
    text = metric.shown(fmean(values))
    if metric.spread and len(values) > 1:
        text += f" ± {metric.shown(stdev(values))}"
    if len(values) < seeds:
        text += f" ({len(values)} of {seeds})"
    return Entry(text, fmean(values) == best)


def _pair_matrix(column: Column, pairs: Sequence[Pair]) -> Section:
    data, dim = column
    # The better model of a pair is its first: without the last row and the first column the matrix has no empty ones.
    labels = list(dict.fromkeys([*(pair.first for pair in pairs), *(pair.second for pair in pairs)]))
    by_labels = {(pair.first, pair.second): pair for pair in pairs}
    rows = [
        [Entry(first), *(_pair_entry(by_labels.get((first, second))) for second in labels[1:])] for first in labels[:-1]
    ]
    return Section(
        f"Differences of AUC, {data}, d {dim}",
        "Row less column, of the means over seeds; its 95 % interval and two-sided p from a paired bootstrap over the "
        "test's users. In bold: the interval does not hold 0. It covers the draw of users, not that of seeds.",
        table=ReportTable(["", *labels[1:]], rows),
    )


def _pair_entry(pair: Pair | None) -> Entry:
    if pair is None:
        return Entry("")
    of = pair.of
    interval = f"{_signed(of.low)} … {_signed(of.high)}"
    return Entry(f"{_signed(of.difference)}\n{interval}\np {number(of.p)}", of.low > 0 or of.high < 0)


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + number(abs(value))


def _parameters(experiment: ExperimentSettings, results: Sequence[Result], columns: Sequence[Column]) -> Section:
    cells: Mapping[tuple[str, Column], Result] = {
        (result.label, (result.data, result.dim)): result for result in results
    }
    rows = [
        [Entry(label)]
        + [
            Entry(f"{cells[label, column].table_parameters:,} + {cells[label, column].dense_parameters:,}")
            for column in columns
        ]
        for label in experiment.models
    ]
    header = ["", *(f"{data}, d {dim}" for data, dim in columns)]
    return Section("Parameters", "Of tables + of all else.", table=ReportTable(header, rows))
