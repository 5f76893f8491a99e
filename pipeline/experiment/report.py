"""An experiment for its readers: `report.md`, and `report.html` with charts, one file that needs no network."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import psutil

from pipeline.experiment import charts
from pipeline.experiment.pairs import Pair
from pipeline.experiment.results import Result
from pipeline.experiment.tables import Entry, Table, all_tables
from pipeline.files import write_whole
from schemas.experiment import ExperimentSettings

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e4e4e0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } p { color: #555; font-size: 13px; }
svg { width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: #555; font-size: 13px; }
"""


def write_report(
    out: Path, experiment: ExperimentSettings, results: Sequence[Result], pairs: Sequence[Pair], command: str
) -> None:
    """Write both files, each whole.

    Args:
        out: folder of the experiment.
        experiment: its settings.
        results: of all cells.
        pairs: of models.
        command: that was given.
    """
    tables = [table for table in all_tables(experiment, results, pairs) if table.rows]
    failed = [result for result in results if result.state == "failed"]
    head = _head(results, command)
    failures = [f"{r.data}, {r.label}, d {r.dim}, seed {r.seed}: {r.error}" for r in failed]
    parts = [f"# {experiment.name}\n", *(f"{line}\n" for line in head)]
    if failures:
        parts.append("## Failed\n\n" + "\n".join(f"- {line}" for line in failures) + "\n")
    parts += map(_markdown, tables)
    write_whole(out / "report.md", "\n".join(parts))
    write_whole(out / "report.html", _page(out, experiment, results, tables, head, failures))


def _head(results: Sequence[Result], command: str) -> list[str]:
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("finished", "failed", "unfinished"))
    machine = f"{psutil.cpu_count()} cores ({platform.machine()}), {psutil.virtual_memory().total / 2**30:.0f} GiB"
    revisions = sorted({result.revision for result in results if result.revision})
    trained = f" Trained by revision {', '.join(revisions)}." if revisions else ""
    if len(revisions) > 1:
        trained += " More than one: what changed in between may be in the differences."
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {machine}: `{command}`",
        f"{len(states)} cells: {counts}.{trained}",
    ]


def _markdown(table: Table) -> str:
    def entry(of: Entry) -> str:
        text = of.text.replace("|", "\\|").replace("\n", "<br>")
        return f"**{text}**" if of.bold else text

    lines = [table.header, ["---"] * len(table.header), *([entry(of) for of in row] for row in table.rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"{table.note}\n\n" if table.note else ""
    return f"## {table.title}\n\n{note}{body}\n"


def _page(
    out: Path,
    experiment: ExperimentSettings,
    results: Sequence[Result],
    tables: Sequence[Table],
    head: Sequence[str],
    failures: Sequence[str],
) -> str:
    finished = [result for result in results if result.auc is not None]
    columns = list(dict.fromkeys((result.data, result.dim) for result in finished))
    figures = ""
    if columns:
        figures = "\n".join(
            f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
            for svg, caption in (
                (charts.accuracy(finished, columns), "Test AUC: a dot is a seed, the bar their mean."),
                (charts.convergence(finished, columns, out), "Validation AUC over training, mean over seeds."),
                (charts.speed(finished, columns), "Test AUC against training speed, mean over seeds."),
            )
        )
    errors = "<h2>Failed</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in failures) + "</ul>"
    title = escape(experiment.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        + "".join(f"<p>{escape(line)}</p>\n" for line in head)
        + (errors if failures else "")
        + _html(tables[0])
        + figures
        + "".join(map(_html, tables[1:]))
        + "</body></html>\n"
    )


def _html(table: Table) -> str:
    def entry(of: Entry) -> str:
        text = escape(of.text).replace("\n", "<br>")
        return f"<td>{f'<b>{text}</b>' if of.bold else text}</td>"

    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join(f"<tr>{''.join(map(entry, row))}</tr>\n" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.note)}</p>\n"
        f"<div><table><tr>{header}</tr>\n{rows}</table></div>\n"
    )
