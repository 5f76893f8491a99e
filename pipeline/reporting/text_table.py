"""Tables of aligned columns for a terminal or a file, in which nothing is cut off.

A table that is wider than the terminal is shown in parts below each other, of which each repeats the columns that name
a row; what is too wide for a line by itself goes on in the next line of its cell.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence

from rich.cells import cell_len

from pipeline.errors import printable

GAP = 2
"""Spaces between two columns."""
_BREAK_AFTER = " /-_=.,:;|"
"""Where a text that is too wide is broken, if it can be."""


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None: it is a file or a pipe, whose lines may be long."""
    return max(shutil.get_terminal_size().columns, 20) if sys.stdout.isatty() else None


def table_lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    labels: int = 1,
    width: int | None = None,
) -> Iterator[str]:
    """Lines of a table.

    Args:
        header: names of the columns; long ones may have several lines.
        rows: cells, as many in each row as the header has names.
        left: columns that are aligned to the left; the others are aligned to the right, as numbers are.
        labels: how many columns at the beginning say what a row is about, and come again in each part.
        width: columns that a line may have; None: any number.

    Yields:
        The lines, without spaces at their ends; an empty one between two parts.
    """
    header, *rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    cells = [max((cell_len(row[column]) for row in rows), default=0) for column in range(len(header))]
    names = [cell_len(name) for name in header]
    widest = list(map(max, cells, names))
    if width is None or _total(widest) <= width:
        yield from _lines(header, rows, widest, left, labels, None)
        return
    # Names of columns may have several lines, of whole words.
    words = [max(map(cell_len, _words(name)), default=0) for name in header]
    narrow = list(map(max, cells, words))
    # Labels come again in each part: the less of a line they take, the fewer parts, but the more lines a row.
    drawn = []
    # What the others leave of a line, if all of them are to be in it; else a part of a line.
    left_over = width - sum(narrow[labels:]) - GAP * (len(narrow) - 1)
    for most in (left_over // labels, *(width // (share * labels) for share in (1, 2, 3, 4))):
        first = [min(each, max(most, word)) for each, word in zip(narrow[:labels], words[:labels], strict=True)]
        room = max(width - _total(first) - GAP, 1)
        widths = [*first, *(min(each, room) for each in narrow[labels:])]
        drawn.append(list(_lines(header, rows, widths, left, labels, width)))
    fitting = [lines for lines in drawn if all(cell_len(line) <= width for line in lines)]
    yield from min(fitting or drawn, key=len)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _lines(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    left: Collection[int],
    labels: int,
    width: int | None,
) -> Iterator[str]:
    for number, columns in enumerate(_parts(widths, labels, width)):
        if number:
            yield ""
        for row in (header, *rows):
            is_header = row is header
            cells = [(_name_lines if is_header else _folded)(row[column], widths[column]) for column in columns]
            height = max(map(len, cells))
            for line in range(height):
                texts = []
                for column, cell in zip(columns, cells, strict=True):
                    # Names of columns stand on their numbers, at the bottom; what a row has begins at its top.
                    place = line - (height - len(cell)) if is_header else line
                    text = cell[place] if 0 <= place < len(cell) else ""
                    spaces = " " * (widths[column] - cell_len(text))
                    aligned_left = column in left or (len(cell) > 1 and not is_header)
                    texts.append(text + spaces if aligned_left else spaces + text)
                yield (" " * GAP).join(texts).rstrip()


def prose_lines(text: str, width: int | None) -> list[str]:
    """A sentence as lines of at most so many columns, broken between words; None: it is one line."""
    if width is None or cell_len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]


def _parts(widths: Sequence[int], labels: int, width: int | None) -> Iterator[list[int]]:
    """The columns of each part of a table: the labels, and as many more as a line has room for."""
    first = list(range(labels))
    columns = first
    for column in range(labels, len(widths)):
        more = [*columns, column]
        if width is not None and len(columns) > labels and _total([widths[each] for each in more]) > width:
            yield columns
            more = [*first, column]
        columns = more
    yield columns


def _words(name: str) -> list[str]:
    """The parts of a column's name between which it may be broken."""
    return [word.strip() for word in re.split(r"(?<=[ _.])", name) if word.strip()]


def _name_lines(name: str, width: int) -> list[str]:
    lines = [""]
    for part in re.split(r"(?<=[ _.])", name):
        if lines[-1] and cell_len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    # A part that is too wide by itself is broken anywhere.
    return [piece for line in lines for piece in _folded(line.rstrip(), width)]


def _folded(text: str, width: int) -> list[str]:
    """A text as lines of at most ``width`` columns; those after the first are indented."""
    lines, indent = [], ""
    while cell_len(text) > width - len(indent):
        room, end = width - len(indent), 0
        while end < len(text) and cell_len(text[: end + 1]) <= room:
            end += 1
        end = max(end, 1)
        better = max((match.end() for match in re.finditer(f"[{re.escape(_BREAK_AFTER)}]", text[:end])), default=0)
        # Not so early that most of a line stays empty.
        end = better if better > end // 2 else end
        lines.append(indent + text[:end])
        text, indent = text[end:], "  " if width > 4 else ""
    return [*lines, indent + text]
