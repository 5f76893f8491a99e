"""Text files as they are published, to text as it is read here: UTF-8, with one character between two values."""

import io
from types import TracebackType
from typing import Protocol, Self

from schemas.errors import UserError
from schemas.text_format import Encoding

SEPARATOR = "\x1f"
"""ASCII's unit separator: what is put in the place of a delimiter of several characters."""


class ByteStream(Protocol):
    """What bytes are read from, in order."""

    def read(self, size: int = ..., /) -> bytes:
        """Return the next bytes, at most ``size``; nothing at the end."""
        ...


class PlainText(io.RawIOBase):
    """Passes a text file on as UTF-8, with `SEPARATOR` for its delimiter. It does not close the file.

    Args:
        stream: the bytes of the file, decompressed.
        encoding: of the file.
        delimiter: what stands between two of its values.
        name: of the file, for messages.

    Raises:
        UserError: the file has a `SEPARATOR` already, which would part one value into two.
    """

    def __init__(self, stream: ByteStream, encoding: Encoding, delimiter: str, name: object) -> None:
        super().__init__()
        self._stream, self._encoding, self._name = stream, encoding, name
        self._delimiter, self._separator = delimiter.encode(), SEPARATOR.encode()
        self._rest = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; about ``size``, and nothing only at the end."""
        while True:
            block = self._stream.read(size)
            # Each byte of Latin-1 is a character, so a block can end anywhere.
            text = block if self._encoding == "utf-8" else block.decode(self._encoding).encode()
            if self._separator in text:
                raise UserError(
                    f"{self._name}: a value has the control character 0x1f in it, which stands for the delimiter "
                    f"{self._delimiter.decode()!r} here; take it out"
                )
            text = (self._rest + text).replace(self._delimiter, self._separator)
            # The beginning of a delimiter waits for its end, which may come with the next block.
            tail = text.rpartition(self._separator)[2]
            beginnings = (n for n in range(len(self._delimiter) - 1, 0, -1) if tail.endswith(self._delimiter[:n]))
            end = len(text) - (next(beginnings, 0) if block else 0)
            self._rest = text[end:]
            if end or not block:
                return text[:end]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
