"""The manifest of an exported model: a folder that answers requests without the run and the data set it was made of.

`dare export` writes the folder, its manifest last; the server, the predictor and the store read it.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.documents import inside, json_document, read_json
from schemas.errors import UserError
from schemas.manifest import File
from schemas.model import ModelSettings
from schemas.programs import Programs
from schemas.shards import FeatureRecord, RawType
from schemas.storage import sha256
from schemas.stream import ONLY_SEQUENCE, HistorySequence

MODEL = "model.json"
"""Name of the manifest."""
FORMAT_VERSION = 1
"""Version of the folder's layout; every other one is refused by name."""
REMEDY = "export the model again"
"""What to do about a folder that is damaged."""

BLOCK_BYTES = 1 << 20
"""Bytes of the rows that share a checksum, about."""

RowPrecision = Literal["fp32", "bf16", "int8"]
"""How the floats of a row are written. Of int8 rows each has a float32 beside it that it is multiplied by."""

ROW_BYTES: dict[RowPrecision, int] = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes of a float of a row."""

FOLDERS = ("", "rows", "dictionaries")
"""Where files are, in the folder; the first one is the folder itself."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ServedTable(_Record):
    """A table of rows, ``rows/NAME.rows``: R rows of D numbers each, one after the other, little-endian.

    ``rows/NAME.crc32`` has a uint32 for each block of rows: the CRC-32 of the block's rows, then of their scales.
    """

    name: str
    """That of the table in checkpoints; of a copy for the search with ``-search`` behind it."""
    kind: Literal["inherent", "cross", "context"]
    """What its feature belongs to: the item, the meeting of user and item, or user and impression."""
    set: str
    """The set of tables that it belongs to: ``attention``, ``representation``, ..., ``context``."""
    feature: str
    sequence: str | None
    """The sequence whose cross feature it holds; None for the other features."""
    search: bool = False
    """A coarser copy of another table, which the search alone reads."""
    rows: int
    """R, the unknown id's row 0 included."""
    dim: int
    """D."""
    precision: RowPrecision
    block_rows: int
    """Rows that share a checksum, a power of two; the last block may have fewer."""

    @property
    def row_file(self) -> str:
        """Name of the file of its rows."""
        return f"rows/{self.name}.rows"

    @property
    def checksum_file(self) -> str:
        """Name of the file of its blocks' checksums, uint32."""
        return f"rows/{self.name}.crc32"

    @property
    def scale_file(self) -> str | None:
        """Name of the file of what rows are multiplied by, float32 (R,); None where they are floats themselves."""
        return f"rows/{self.name}.scale" if self.precision == "int8" else None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dim * ROW_BYTES[self.precision]

    @property
    def blocks(self) -> int:
        """Number of blocks of rows."""
        return -(-self.rows // self.block_rows)


class ServedData(_Record):
    """What the data set that the model was trained on says of raw values and ids."""

    fingerprint: str
    """SHA-256 of its manifest."""
    schema_version: int
    features: tuple[FeatureRecord, ...]
    """Every feature that it declares."""
    read: tuple[str, ...]
    """Names of those that the model reads, or that sequences are cut by. Dictionaries and sets of ids of these are in
    the folder, and those of all features of behaviours, by which behaviours of one moment are ordered."""
    labels: tuple[str, ...]
    """Names of the targets' labels, the main one first."""
    user_type: RawType
    item_type: RawType
    items: int
    """The largest dense id of an item."""
    item_rows: int
    """The largest id, or place, that an item has in the item table."""
    items_hashed: bool
    """Items are hashed into ``items`` ids; there is no dictionary of them."""
    placed_items: bool
    """Places of items in the table are others than their ids: column ``item`` of ``item_features.arrow``."""
    settings: dict[str, Any]
    """The settings that it was prepared with, but for paths: names of raw columns, units, zones."""

    @property
    def declared(self) -> tuple[FeatureRecord, ...]:
        """Every feature of the data set."""
        return self.features

    @property
    def largest_item(self) -> int:
        """The largest id that an item has in the item table."""
        return self.item_rows


class ServedStream(_Record):
    """Which behaviours a target sees."""

    history_length: int
    """N, where there are no ``sequences``."""
    sequences: dict[str, HistorySequence] | None
    """By name; None: one named ``history``, of everything."""


class ServedManifest(_Record):
    """What is in an exported model's folder; `MODEL` holds it."""

    format_version: int = FORMAT_VERSION
    version: str
    """Names this model: made of the checkpoint's checksums and the precisions of the rows."""
    run: str
    """Name of the run's folder."""
    step: int
    """Step of the checkpoint."""
    record_sha256: str
    """SHA-256 of the checkpoint's record, which has the checksums of all its files."""
    rows: RowPrecision
    """Precision of the rows of items that prediction reads."""
    attention_rows: RowPrecision
    """Precision of the rows of items that the search reads."""
    model: ModelSettings
    stream: ServedStream
    data: ServedData
    tables: tuple[ServedTable, ...]
    programs: Programs
    """What is computed of the rows."""
    files: tuple[File, ...]
    """All files of the folder but this one, ``path`` relative to the folder."""

    @property
    def lengths(self) -> dict[str, int]:
        """N by sequence."""
        if self.stream.sequences is None:
            return {ONLY_SEQUENCE: self.stream.history_length}
        return {name: sequence.length for name, sequence in self.stream.sequences.items()}

    def dictionary(self, name: str) -> str | None:
        """Return the name of the file that knows the raw values of ``item`` or of a feature; None: there is none."""
        file = dictionary_file(name)
        return file if any(each.path == file for each in self.files) else None

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``, as its last file. Equal manifests give equal bytes."""
        # Keys are not sorted: the order of sequences is that of the branches which the programs were made for.
        content = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        (folder / MODEL).write_text(json_document(content))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of ``folder``, and check that its files are there with their sizes.

        Raises:
            UserError: no exported model, one of another format version, or a file is missing or of another size.
        """
        path = folder / MODEL
        if not path.is_file():
            raise UserError(
                f"{folder}: no {MODEL}: not an exported model, or one that was never finished; see `dare export`"
            )
        content = read_json(path, remedy=REMEDY)
        # Checked before the fields: a manifest of another version may lack any of them, and the message should say why.
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; {REMEDY}, or use the "
                "program that wrote it"
            )
        try:
            model = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {REMEDY}") from None
        model._check_parts(path)
        for file in model.files:
            _check_size(folder, file)
        return model

    def _check_parts(self, path: Path) -> None:
        """Refuse a manifest whose tables and programs do not have their files, or tables of impossible sizes."""
        sizes = {file.path: file.bytes for file in self.files}
        for table in self.tables:
            # Indexing adds no check of its own: what is mapped must have the rows that the manifest says.
            possible = table.rows > 0 and table.dim > 0 and table.block_rows > 0
            if not possible or table.block_rows & (table.block_rows - 1):
                raise UserError(f"{path}: tables: {table.name} has no rows, no dim or odd blocks; {REMEDY}")
            wanted = {table.row_file: table.rows * table.row_bytes, table.checksum_file: 4 * table.blocks}
            if table.scale_file is not None:
                wanted[table.scale_file] = 4 * table.rows
            for name, size in wanted.items():
                if sizes.get(name) != size:
                    raise UserError(f"{path}: files: {name} must be {size} bytes, by its table; {REMEDY}")
        for program in self.programs.programs.values():
            for name in filter(None, (program.path, program.compiled)):
                if name not in sizes:
                    raise UserError(f"{path}: programs: {name} does not stand in files; {REMEDY}")

    def verified(self, folder: Path, name: str) -> Path:
        """Return the path of a file whose content has been compared with its checksum, all of it.

        Files of rows are verified by blocks as they are read instead, see `pipeline.serve.rows.StoredRows`.

        Raises:
            UserError: it differs from its checksum, or does not stand in the manifest.
        """
        file = next((file for file in self.files if file.path == name), None)
        if file is None:
            raise UserError(f"{folder}: {name} does not stand in {MODEL}; {REMEDY}")
        return _verified(folder, file)

    def verify(self, folder: Path) -> None:
        """Compare every file with its checksum, the rows included.

        Raises:
            UserError: a file differs.
        """
        for file in self.files:
            _verified(folder, file)


def dictionary_file(name: str) -> str:
    """Return the name of the file that has the raw values of ``item`` or of a feature."""
    return f"dictionaries/{name}.arrow"


def block_rows(row_bytes: int) -> int:
    """Return how many rows of so many bytes share a checksum: the largest power of two within `BLOCK_BYTES`."""
    return 1 << max(0, (BLOCK_BYTES // row_bytes).bit_length() - 1)


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a file of an exported model by the name that its manifest has for it.

    Raises:
        UserError: the name leads to a place outside of the folder.
    """
    *below, last = name.split("/")
    if "/".join(below) not in FOLDERS:
        raise UserError(f"{folder / MODEL}: files names {name!r}, which is not a file of this folder")
    place = inside(folder, below[0]) if below else folder
    return inside(place, last)


def _check_size(folder: Path, file: File) -> None:
    path = file_of(folder, file.path)
    if not path.is_file():
        raise UserError(f"{folder}: {file.path} is missing, but stands in {MODEL}; {REMEDY}")
    size = path.stat().st_size
    if size != file.bytes:
        raise UserError(f"{folder}: {file.path} is {size} bytes, in {MODEL} {file.bytes}; {REMEDY}")


def _verified(folder: Path, file: File) -> Path:
    path = file_of(folder, file.path)
    try:
        differs = sha256(path) != file.sha256
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if differs:
        raise UserError(f"{folder}: {file.path} differs from the checksum in {MODEL}; {REMEDY}")
    return path
