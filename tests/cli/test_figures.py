"""Charts: what is drawn is within the axes, ticks say what they stand at, a single point is seen, names are names."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

from embeddings.sizes import DataSizes
from pipeline.experiment import charts
from pipeline.experiment.results import Result
from pipeline.inspect.figure import draw_figure
from pipeline.inspect.summary import summarize
from pipeline.planning.dry_run import DryRun, dry_run
from pipeline.planning.page import write_page
from pipeline.planning.sweep import axis as swept
from pipeline.planning.sweep import sweep
from pipeline.reporting.plots import Ticks, color, label, panels, png, style, svg, tick_text
from tests.datasets import random_users, write_dataset
from tests.plans import plan_settings

FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def number(text: str) -> float:
    match = re.fullmatch(r"(-?[\d.]+(?:e[+-]?\d+)?)([kMGT]?)", text)
    assert match, text
    return float(match[1]) * FACTORS[match[2]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is written during the test, as it was written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remembered(figure: Figure, *arguments: object, **keywords: object) -> None:
        figures.append(figure)
        save(figure, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", remembered)
    return figures


def check(figures: list[Figure]) -> None:
    """Make sure of everything that holds for every figure."""
    assert figures
    for figure in figures:
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            check_points(axes)
            for axis in (axes.xaxis, axes.yaxis):
                check_ticks(axis)
            # Lengths of bars are compared: their axis begins at 0.
            for bars in axes.containers:
                low, _ = axes.get_ylim() if bars.orientation == "vertical" else axes.get_xlim()
                assert low == 0


def check_points(axes: Axes) -> None:
    inside = axes.get_window_extent()
    for line in axes.get_lines():
        if line.get_transform() != axes.transData:
            continue  # a line from edge to edge
        shown = line.get_marker() not in ("None", "", None)
        pixels = axes.transData.transform(line.get_xydata())
        assert shown or len(np.unique(pixels, axis=0)) > 1, "a single point without a marker is not seen"
        radius = line.get_markersize() / 2 * axes.figure.dpi / 72 if shown and line.get_marker() != "|" else 0
        for x, y in pixels:
            assert inside.x0 + radius <= x <= inside.x1 - radius, (x, inside, line)
            assert inside.y0 + radius <= y <= inside.y1 - radius, (y, inside, line)


def check_ticks(axis: Axis) -> None:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts = [tick.label1.get_text() for tick in ticks]
    assert len(set(texts)) == len(texts), texts
    if isinstance(axis.get_major_formatter(), Ticks):
        integers = getattr(axis.get_major_locator(), "_integer", False)
        assert len(ticks) >= (1 if integers else 2), (low, high)
        step = min(np.diff(sorted(tick.get_loc() for tick in ticks)), default=1)
        for tick, text in zip(ticks, texts, strict=True):
            assert number(text) == pytest.approx(tick.get_loc(), abs=1e-5 * step)


@given(low=st.floats(-1e9, 1e12), span=st.floats(1e-5, 1e12), count=st.integers(2, 12))
def test_labels_are_the_values(low: float, span: float, count: int) -> None:
    # Floats themselves have no more digits.
    span = max(span, abs(low) * 1e-9)
    values = MaxNLocator(count).tick_values(low, low + span)
    ticks = Ticks()
    texts = ticks.format_ticks(values)
    assert len(set(texts)) == len(texts)
    for text, value in zip(texts, values, strict=True):
        assert number(text) == pytest.approx(value, abs=1e-5 * (values[1] - values[0]))


def test_labels_read_well() -> None:
    assert [tick_text(value) for value in (0, 2500, 7500, 20000, 999, 1e6, 0.25)] == [
        *("0", "2.5k", "7.5k", "20k", "999", "1M", "0.25")
    ]
    assert Ticks().format_ticks([0.7, 0.75, 0.8]) == ["0.70", "0.75", "0.80"]
    assert Ticks().format_ticks([0.1 * 3 - 0.3, 0.1, 0.2]) == ["0.0", "0.1", "0.2"]


def test_many_series_differ() -> None:
    looks = [tuple(sorted((key, str(value)) for key, value in style(index).items())) for index in range(200)]
    assert len(set(looks)) == 200
    assert len({color(index) for index in range(20)}) == 20


@pytest.mark.parametrize(("low", "high"), [(50, 59), (1, 1), (3, 400), (1, 10**7)])
def test_a_log_axis_has_ticks_however_little_it_spans(low: int, high: int, drawn: list[Figure]) -> None:
    figure, (axis,) = panels(height=3)
    axis.plot([low, high], [1, 2], marker="o")
    axis.set_xscale("log")
    assert isinstance(axis.xaxis.get_major_locator(), LogLocator)
    svg(figure, "log")
    check(drawn)


def test_names_are_no_formulas_and_none_is_hidden(tmp_path: Path, drawn: list[Figure]) -> None:
    figure, (axis,) = panels(height=3, titles=["$x^2$ of 模型"])
    axis.plot([1, 2], [1, 2], label=label("_hidden"))
    axis.legend()
    page = svg(figure, "names")
    assert "$x^2$ of 模型" in page
    assert "_hidden" in page
    # A PNG has the characters of a font of this machine, or their codes.
    png(figure, tmp_path / "deep/names.png")
    assert Image.open(tmp_path / "deep/names.png").width > 1000
    assert axis.get_title() in ("$x^2$ of 模型", r"$x^2$ of \u6a21\u578b")


def test_long_labels_lose_nothing() -> None:
    name = "a-model-with-a-long-name, which goes on and on " * 3
    text = label(name)
    assert max(map(len, text.splitlines())) <= 32
    assert text.replace("\n", "").replace(" ", "") == name.replace(" ", "")


def test_empty_panels_say_so() -> None:
    figure, _ = panels(2, height=3)
    assert svg(figure, "empty").count("no values") == 2


def results(out: Path, labels: int, seeds: int, validations: int) -> list[Result]:
    """Results of made-up cells, with their logs of validations below ``out``."""
    rng = np.random.default_rng(1)
    made = []
    for name in [f"model {index}, which has quite a long name 模型" for index in range(labels)]:
        for seed in range(seeds):
            run = f"run-{len(made)}"
            (out / run).mkdir()
            lines = [{"step": 250 * (1 + step), "auc": 0.6 + 0.1 * rng.random()} for step in range(validations)]
            (out / run / "validations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            known = {"data": "shop", "label": name, "dim": 16, "seed": seed, "state": "finished", "run": run}
            known |= {"auc": 0.6 + 0.2 * rng.random(), "samples_per_s": 1e4 * rng.random() + 1}
            made.append(Result(**(dict.fromkeys(Result.__dataclass_fields__) | known)))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(("labels", "seeds", "validations"), [(1, 1, 1), (3, 2, 4), (30, 2, 10), (2, 1, 0)])
def test_charts_of_an_experiment(
    labels: int, seeds: int, validations: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    made = results(tmp_path, labels, seeds, validations)
    columns = [("shop", 16)]
    pages = [charts.accuracy(made, columns), charts.convergence(made, columns, tmp_path), charts.speed(made, columns)]
    check(drawn)
    for page in pages:
        # Every name is there, on one line or on two.
        text = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", page))
        for index in range(labels):
            assert f"model {index}, which has" in text
    assert ("no values" in pages[1]) == (validations == 0)


SIZES = DataSizes.counted(items=20_000, categories=100, lengths={"history": 50})


@pytest.mark.parametrize("ranks", [1, 2, 200])
def test_charts_of_a_plan(ranks: int, tmp_path: Path, drawn: list[Figure]) -> None:
    nodes = ("cluster.devices_per_node=1", f"cluster.nodes={ranks}")
    settings = plan_settings(*nodes)
    axes = [swept("batch_size=64,128"), swept("attention_dim=4,8,16,32,64,128"), swept("representation_dim=8,16")]
    points = list(sweep(settings, SIZES, axes)) if ranks == 2 else []
    write_page(tmp_path / "page.html", dry_run(settings, SIZES), points)
    check(drawn)
    of_all, of_tables = drawn[0].axes
    # Ranks are whole numbers, and the small tables have a scale of their own.
    for axes_of in (of_all, of_tables):
        assert all(float(tick).is_integer() for tick in axes_of.get_xticks())
    assert heights(of_tables) / of_tables.get_ylim()[1] > 0.8
    page = (tmp_path / "page.html").read_text()
    assert "buffers and others: " in page
    assert "The two panels have different scales." in page
    if points:
        lines = drawn[-1].axes[0].get_lines()
        assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 12
        assert len(drawn[-1].legends[0].get_texts()) == 12


def heights(axes: Axes) -> float:
    """The top of the highest bar or outline."""
    return max(float(patch.get_extents().transformed(axes.transData.inverted()).y1) for patch in axes.patches)


def test_a_sweep_of_which_nothing_fits(tmp_path: Path) -> None:
    settings = plan_settings()
    run = dry_run(settings, SIZES)
    points = list(
        sweep(settings, DataSizes.counted(items=2**30, categories=9, lengths={"history": 50}), [swept("ranks=1,2")])
    )
    assert not any(of_point.feasible for _, of_point in points)
    write_page(tmp_path / "page.html", run, points)
    assert "None of the combinations fits." in (tmp_path / "page.html").read_text()
    both: list[tuple[dict[str, int], DryRun]] = [({"ranks": 4}, run), *points]
    write_page(tmp_path / "page.html", run, both)
    assert "2 of 3 combinations do not fit and have no point." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "make", [lambda: random_users(60, seed=4), lambda: random_users(1), lambda: random_users(3, most_targets=0)]
)
def test_figure_of_a_data_set(make: Callable[[], Iterator], tmp_path: Path, drawn: list[Figure]) -> None:
    write_dataset(tmp_path / "数据$a$", list(make()))
    draw_figure(tmp_path / "数据$a$", summarize(tmp_path / "数据$a$"), tmp_path / "figure.png")
    check(drawn)
    (figure,) = drawn
    assert "$a$" in figure.get_suptitle()
