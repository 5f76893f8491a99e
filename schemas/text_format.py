"""How text files are written that a log, or what belongs to it, comes in."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from schemas.settings import Settings


def _tabulator(value: Any) -> Any:
    return "\t" if value == "\\t" else value


def _no_line_end(value: str) -> str:
    if value in "\r\n\0" or ord(value) > 127:
        raise ValueError("one character of ASCII that is no end of a line")
    return value


def _no_line_ends(value: str) -> str:
    for character in value:
        _no_line_end(character)
    return value


Character = Annotated[str, Field(min_length=1, max_length=1), BeforeValidator(_tabulator), AfterValidator(_no_line_end)]


Delimiter = Annotated[
    str, Field(min_length=1, max_length=8), BeforeValidator(_tabulator), AfterValidator(_no_line_ends)
]

Encoding = Literal["utf-8", "latin-1"]


class TextFormat(Settings):
    """How text files are written. Parquet files need none of it."""

    header: bool = True
    """Text files start with a line of column names."""
    file_columns: tuple[str, ...] | None = None
    """Names of a text file's columns in order; required without a header."""
    delimiter: Delimiter | None = None
    """What stands between two values. None: a tab in files whose names end in .tsv, a comma in others."""
    quote: Character | None = '"'
    """What quotes values that hold a delimiter; doubled, it stands for itself. None (``null``): quotes are text."""
    encoding: Encoding = "utf-8"
    """How characters are written."""

    @model_validator(mode="after")
    def _columns_are_named(self) -> Self:
        if not self.header and self.file_columns is None:
            raise ValueError("file_columns must name the columns of files that have no header")
        return self

    @model_validator(mode="after")
    def _long_delimiters_need_no_quotes(self) -> Self:
        if self.delimiter is not None and len(self.delimiter) > 1 and self.quote is not None:
            raise ValueError("a delimiter of several characters needs quote=null: quotes are text then")
        return self
