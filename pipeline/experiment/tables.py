"""The tables of a report: the paper's layout, models as rows, data sets x dims as columns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pipeline.experiment.pairs import Column, Pair, grouped
from pipeline.experiment.results import Result
from schemas.experiment import ExperimentSettings


@dataclass(frozen=True)
class Entry:
    """Text of a table's cell; lines are separated by newlines."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Rows begin with a label."""

    title: str
    note: str
    header: list[str]
    rows: list[list[Entry]]


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


def all_tables(experiment: ExperimentSettings, results: Sequence[Result], pairs: Sequence[Pair]) -> list[Table]:
    """AUC first, then the pairs, then everything else."""
    columns = [(data, dim) for data in experiment.data for dim in experiment.dims]
    seeds = len(experiment.seeds)
    note = f"Mean ± standard deviation over {seeds} seeds; the best of a column in bold." if seeds > 1 else ""
    auc = _table(experiment, results, columns, _AUC, note)
    return [
        auc,
        *(_matrix(column, [pair for pair in pairs if (pair.data, pair.dim) == column]) for column in columns),
        *(_table(experiment, results, columns, metric, metric.note) for metric in _FURTHER),
        _parameters(experiment, results, columns),
    ]


def _table(
    experiment: ExperimentSettings, results: Sequence[Result], columns: Sequence[Column], metric: _Metric, note: str
) -> Table:
    cells = grouped(results)
    values = {
        key: [value for cell in group if (value := metric.value(cell)) is not None] for key, group in cells.items()
    }
    published = metric is _AUC and any(row.paper for row in experiment.models.values())
    header, rows = [""], [[Entry(label)] for label in experiment.models]
    for column in columns:
        data, dim = column
        header.append(f"{data}, d {dim}")
        means = {label: fmean(found) for label in experiment.models if (found := values.get((label, column)))}
        best = metric.best(means.values()) if metric.best and means else None
        paper = {label: row.paper.get(data, {}).get(dim) for label, row in experiment.models.items()}
        with_paper = published and any(value is not None for value in paper.values())
        if with_paper:
            header.append("paper")
        for label, entries in zip(experiment.models, rows, strict=True):
            found = values.get((label, column), [])
            entries.append(_mean_entry(found, metric, len(experiment.seeds), best))
            if with_paper:
                figure = paper[label]
                entries.append(Entry("" if figure is None else number(figure, 5)))
    return Table(metric.title, note, header, rows)


def _mean_entry(values: Sequence[float], metric: _Metric, seeds: int, best: float | None) -> Entry:
    if not values:
        return Entry("")
    text = metric.shown(fmean(values))
    if metric.spread and len(values) > 1:
        text += f" ± {metric.shown(stdev(values))}"
    if len(values) < seeds:
        text += f" ({len(values)} of {seeds})"
    return Entry(text, fmean(values) == best)


def _matrix(column: Column, pairs: Sequence[Pair]) -> Table:
    data, dim = column
    labels = list(dict.fromkeys([*(pair.first for pair in pairs), *(pair.second for pair in pairs)]))
    by_labels = {(pair.first, pair.second): pair for pair in pairs}
    rows = [
        [Entry(first), *(_pair_entry(by_labels.get((first, second))) for second in labels[1:])] for first in labels[:-1]
    ]
    return Table(
        f"Differences of AUC, {data}, d {dim}",
        "Row less column, of the means over seeds; its 95 % interval and two-sided p from a paired bootstrap over the "
        "test's users. In bold: the interval does not hold 0. It covers the draw of users, not that of seeds.",
        ["", *labels[1:]],
        rows,
    )


def _pair_entry(pair: Pair | None) -> Entry:
    if pair is None:
        return Entry("")
    of = pair.of
    interval = f"{_signed(of.low)} … {_signed(of.high)}"
    return Entry(f"{_signed(of.difference)}\n{interval}\np {number(of.p)}", of.low > 0 or of.high < 0)


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + number(abs(value))


def _parameters(experiment: ExperimentSettings, results: Sequence[Result], columns: Sequence[Column]) -> Table:
    of: Mapping[tuple[str, Column], Result] = {(result.label, (result.data, result.dim)): result for result in results}
    rows = [
        [Entry(label)]
        + [
            Entry(f"{of[label, column].table_parameters:,} + {of[label, column].dense_parameters:,}")
            for column in columns
        ]
        for label in experiment.models
    ]
    header = ["", *(f"{data}, d {dim}" for data, dim in columns)]
    return Table("Parameters", "Of tables + of all else.", header, rows)
