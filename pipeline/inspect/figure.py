"""A data set in one picture: history lengths, targets, popularity, the load of row-wise shards, and each feature.

V = values of a histogram, F = different frequencies, W = ranges of ids, one a row-wise shard.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pipeline.inspect.features import FeatureSummary
from pipeline.inspect.popularity import Popularity, read_popularity
from pipeline.inspect.summary import Histogram, Summary
from pipeline.reporting.plots import BLUE, GREY, ORANGE, label, panels, png, whole_numbers
from schemas.manifest import Manifest

RANGES = 16
"""Row-wise shards whose load is shown."""
LONGEST = 20
"""Letters of a raw value that are drawn."""


def draw_figure(folder: Path, summary: Summary, figure: Path) -> None:
    """Draw a data set as a PNG file, which appears whole or not at all.

    Args:
        folder: the data set; its dictionaries are read.
        summary: of the same data set.
        figure: file to write; its folder is made.

    Raises:
        UserError: a dictionary that cannot be read.
    """
    manifest = Manifest.read(folder)
    items = read_popularity(manifest.verified(folder, "items.parquet"), summary.counts.items, RANGES)
    name = "feature-category.parquet" if manifest.schema_version >= 3 else "categories.parquet"
    categories = read_popularity(manifest.verified(folder, name), summary.counts.categories, RANGES)
    features = summary.features.of
    drawing, axes = panels(4 + len(features), height=4, columns=2, grid="y")
    lengths, targets, popularity, load = axes[:4]
    _lengths(lengths, summary.lengths)
    _targets(targets, summary)
    _popularity(popularity, items, categories)
    _load(load, items)
    for axis, (name, feature) in zip(axes[4:], features.items(), strict=True):
        _feature(axis, name, feature)
    counts = summary.counts
    drawing.suptitle(
        f"{label(folder.resolve().name)}: {counts.users:,} users, {counts.behaviors:,} behaviours, "
        f"{counts.items:,} items in {counts.categories:,} categories"
    )
    png(drawing, figure)


def _feature(axis: Axes, name: str, feature: FeatureSummary) -> None:
    """The most frequent raw values of a feature, or how its numbers are spread."""
    record, missing = feature.record, feature.missing_share
    axis.set_title(f"{name}, of {record.of}" + (f": {missing:.1%} missing" if missing else ""))
    axis.set_ylabel({"item": "items", "behavior": "behaviours", "user": "users", "impression": "targets"}[record.of])
    edges, count_B = record.edges, feature.count_V[1:]
    if feature.numbers is not None:
        edges, count_B = feature.numbers.edges, feature.numbers.count_B
    if edges is not None:
        names = [f"< {edges[0]:.3g}", *(f"{edge:.3g}" for edge in edges)]
        axis.bar(np.arange(len(count_B)), count_B, 1, color=BLUE, edgecolor="white", align="edge")
        shown = np.arange(0, len(names), max(1, len(names) // 6))
        axis.set_xticks(shown, [names[place] for place in shown])
        axis.set_xlabel("from")
    else:
        # Of sets, a place counts for each of its values.
        others = int(count_B.sum()) - sum(count for _, count in feature.frequent)
        bars = [*feature.frequent, *([("others", others)] if others else [])]
        # By place: two raw values may look alike.
        axis.bar(np.arange(len(bars)), [count for _, count in bars], color=BLUE)
        axis.set_xticks(np.arange(len(bars)), [label(value[:LONGEST]) for value, _ in bars])
        axis.set_xlabel(f"most frequent of {record.rows:,}" + (" buckets" if record.encoding == "hash" else ""))
    whole_numbers(axis.yaxis)


def _lengths(axis: Axes, lengths: Histogram) -> None:
    length_V = np.flatnonzero(lengths.count_V)
    users_V = lengths.count_V[length_V]
    axis.set_title("History lengths")
    axis.set_xlabel("behaviours of a user")
    axis.set_ylabel("users")
    if len(length_V):
        if not length_V[0]:
            axis.set_xlabel("behaviours of a user; none is drawn as 1")  # a log axis has no 0
        low, high = max(length_V[0], 1), max(length_V[-1], 1) + 1
        # Edges at whole numbers: between 1 and 10 there are fewer of them than bins.
        edges = np.unique(np.geomspace(low, high, 41).round()).tolist()
        axis.hist(np.maximum(length_V, 1), edges, weights=users_V, color=BLUE)
        median, tail = lengths.quantiles([0.5, 0.99])
        axis.set_xscale("log")
        axis.set_xlim(low / 1.3, high * 1.3)
        # One below the other: they may be close, or the same.
        for value, name, height in ((median, "median {}", 0.97), (tail, "99 % have at most {}", 0.9)):
            axis.axvline(max(value, 1), color=ORANGE, linestyle="--")
            # On the side where there is more room: a text that runs over the edge would squeeze the panel.
            left = value**2 > low * high
            axis.annotate(
                name.format(f"{value:,}"),
                (max(value, 1), height),
                xytext=(-4 if left else 4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=ORANGE,
                ha="right" if left else "left",
                va="top",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
            )
    whole_numbers(axis.yaxis)


def _targets(axis: Axes, summary: Summary) -> None:
    names = list(summary.splits)
    targets = np.array([split.targets for split in summary.splits.values()])
    positives = np.array([split.positives for split in summary.splits.values()])
    of_one = axis.bar(names, positives, color=ORANGE, label="label 1")
    of_none = axis.bar(names, targets - positives, bottom=positives, color=BLUE, label="label 0")
    for position, (total, positive) in enumerate(zip(targets, positives, strict=True)):
        rate = f"\n{positive / total:.1%} positive" if total else ""
        axis.annotate(f"{total:,}{rate}", (position, total), ha="center", va="bottom")
    axis.set_title("Targets")
    axis.set_ylabel("targets")
    # Below all bars no number would have room, and without targets there would be no axis.
    axis.set_ylim(0, 1.3 * max(targets.max(), 1))
    # In the order of the stack, beside each other above the bars.
    axis.legend(handles=[of_none, of_one], frameon=False, loc="upper right", ncols=2)
    whole_numbers(axis.yaxis)


def _popularity(axis: Axes, items: Popularity, categories: Popularity) -> None:
    for popularity, color, name in ((items, BLUE, "items"), (categories, ORANGE, "categories")):
        seen = popularity.frequency_F > 0
        last_rank_F = np.cumsum(popularity.ids_F[seen])
        first_rank_F = last_rank_F - popularity.ids_F[seen] + 1
        # Ids of equal frequency are one horizontal line, from the first rank to the last.
        rank = np.stack([first_rank_F, last_rank_F], axis=1).ravel()
        axis.plot(rank, popularity.frequency_F[seen].repeat(2), color=color, label=name, linewidth=2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.margins(y=0.2)  # room for the legend, should all be equally frequent
    axis.grid(axis="x", alpha=0.25)
    axis.set_title("Popularity")
    axis.set_xlabel("rank, the most frequent first")
    axis.set_ylabel("events")
    axis.legend(frameon=False, loc="upper right")


def _load(axis: Axes, items: Popularity) -> None:
    share_W = items.load_W / max(items.load_W.sum(), 1)
    axis.bar(np.arange(RANGES), share_W * 100, color=BLUE)
    axis.axhline(100 / RANGES, color=GREY, linestyle="--", label="equal load")
    if len(items.frequency_F) and items.load_W.any():
        # No order of ids can balance what one item asks for.
        hottest = items.frequency_F[0] / items.load_W.sum() * 100
        axis.axhline(hottest, color=ORANGE, linestyle=":", label=f"most frequent item alone, {hottest:.3g} %")
    axis.set_title(f"Item look-ups of {RANGES} row-wise shards: largest {items.imbalance:.2f} x the mean")
    axis.set_xlabel("shard")
    axis.set_ylabel("% of events")
    axis.set_xticks(np.arange(RANGES))
    axis.margins(y=0.3)
    axis.legend(frameon=False, loc="upper right")
