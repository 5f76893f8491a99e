"""A report as one HTML page that needs no network, and as Markdown.

All HTML pages are made from `page.html.jinja`; Jinja escapes every text that it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Entry:
    """Text in a table; lines are separated by newlines."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class ReportTable:
    """A table that people read. Each row begins with its label."""

    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]


@dataclass(frozen=True)
class Chart:
    """A drawing with the line below it. Markdown leaves it out."""

    svg: Markup
    """The element that `pipeline.reporting.plots.svg` returns."""
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report; what it has is shown in the order of the fields."""

    title: str = ""
    note: str = ""
    """A paragraph in small print."""
    items: Sequence[str] = ()
    table: ReportTable | None = None
    charts: Sequence[Chart] = ()
    text: str = ""
    """Lines whose columns are aligned with spaces."""


@dataclass(frozen=True)
class Page:
    """What a report says."""

    title: str
    lead: Sequence[str]
    """Paragraphs below the title."""
    sections: Sequence[Section]
    command: str = ""
    """The command that made it."""


def html(page: Page) -> str:
    """The report as one HTML page."""
    environment = Environment(
        loader=PackageLoader("pipeline.reporting", "."),
        autoescape=True,
        # A name that the page does not have is an error, not an empty place.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(page=page)


def markdown(page: Page) -> str:
    """The report as Markdown, without its charts."""
    paragraphs = [f"# {page.title}", *page.lead]
    if page.command:
        paragraphs.append(f"`{page.command}`")
    for section in page.sections:
        paragraphs += [f"## {section.title}"] * bool(section.title)
        paragraphs += [section.note] * bool(section.note)
        paragraphs += ["\n".join(f"- {item}" for item in section.items)] * bool(section.items)
        paragraphs += [_markdown_table(section.table)] if section.table else []
        paragraphs += [f"```\n{section.text}\n```"] * bool(section.text)
    return "\n\n".join(paragraphs) + "\n"


def _markdown_table(table: ReportTable) -> str:
    def escaped(text: str) -> str:
        # A bar would end the cell, a newline the row.
        return text.replace("|", "\\|").replace("\n", "<br>")

    def cell(entry: Entry) -> str:
        return f"**{escaped(entry.text)}**" if entry.bold else escaped(entry.text)

    header = [escaped(name) for name in table.header]
    lines = [header, ["---"] * len(header), *([cell(entry) for entry in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
