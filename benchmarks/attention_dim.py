"""Search time against K_A, the dim of the attention tables (paper, section 3.3: half of K_A, half of the search)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.search import Case, measure_case

DIMS = (128, 64, 32, 16)


@dataclass(frozen=True)
class AttentionDim:
    """Search time of one K_A."""

    dim: int
    dtype: str
    rows_per_s: int
    """Behaviours scored a second."""
    time_vs_128: float
    """Time over the time with K_A = 128."""


def measure(rows: int, rounds: int) -> list[AttentionDim]:
    """Time the search of 2,000 behaviours for the best 100, for each K_A, in float32 and bfloat16.

    Args:
        rows: of the table.
        rounds: repetitions of each timing.
    """
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        speeds = {
            dim: measure_case(Case(dim, 2000, 100, dtype), rows, rounds, torch.device("cpu")).rows_per_s for dim in DIMS
        }
        name = str(dtype).removeprefix("torch.")
        figures += [AttentionDim(dim, name, speed, round(speeds[128] / speed, 3)) for dim, speed in speeds.items()]
    return figures


def draw(figures: list[AttentionDim], rows: int, path: Path) -> None:
    """Draw the figures of a table of so many rows as a PNG, beside the line that the paper states."""
    from pipeline.reporting.plots import panels, png, tick_text

    figure, (axes,) = panels(height=5)
    axes.plot(DIMS, [dim / 128 for dim in DIMS], color="0.6", linestyle="--", label="in proportion to K_A")
    for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
        axes.plot(DIMS, [one.time_vs_128 for one in figures if one.dtype == dtype], marker=marker, label=dtype)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(DIMS, [str(dim) for dim in DIMS])
    axes.set_yticks([1, 0.5, 0.25, 0.125], ["1", "1/2", "1/4", "1/8"])
    axes.minorticks_off()
    axes.set_xlabel("K_A")
    axes.set_ylabel("search time, K_A = 128 is 1")
    axes.set_title(f"Top 100 of 2,000 behaviours, {tick_text(rows)} rows, {torch.get_num_threads()} threads of a CPU")
    axes.legend(frameon=False)
    png(figure, path)
