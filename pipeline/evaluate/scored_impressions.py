"""The caller's own impressions with a prediction on each line: every line, every column, in the order of the files.

N = lines of a batch.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingest.reading import raw_batches
from pipeline.ingest.sources import log_files
from pipeline.ingest.values import WrongValueError, integers, texts
from schemas.errors import UserError
from schemas.manifest import Manifest, fingerprint
from schemas.prepare import Impressions
from schemas.storage import arrow_file

_LOGGER = logging.getLogger("dare.evaluate")


class ScoredImpressions:
    """Files of impressions, made sure to be those that a data set was prepared from.

    Args:
        names: files, folders or patterns, as they were given to ``dare prepare``.
        data: folder of the data set.
        manifest: the data set's.
        added: columns that are added; null on lines of other splits, and those that the data set left out.

    Raises:
        UserError: they are others, or a column of theirs has a name of ``added``.
    """

    def __init__(self, names: tuple[str, ...], data: Path, manifest: Manifest, added: pa.Schema) -> None:
        self._added = added
        settings = manifest.settings.get("impressions")
        if not manifest.impression_files or not isinstance(settings, dict):
            raise UserError(f"{data} was not prepared from impressions; leave --impressions out")
        skip = bool(manifest.skipped)
        self._log = Impressions(**{**settings, "files": names})
        self._files = log_files("impressions", self._log, skip_corrupt=skip)
        found = self._files.names
        known = {(source.name, source.fingerprint) for source in manifest.sources}
        if found != manifest.impression_files:
            raise UserError(
                f"impressions: {data} was prepared from {', '.join(manifest.impression_files)}, not from "
                f"{', '.join(found)}; give the same files"
            )
        for path in self._files.paths:
            if (path.name, fingerprint(path)) not in known:
                raise UserError(f"impressions: {path} has changed since {data} was prepared; prepare it again")
        for path in self._files.paths:
            columns = self._files.text_columns or pq.read_schema(arrow_file(path)).names
            clash = [name for name in columns if name in added.names or list(columns).count(name) > 1]
            if clash:
                raise UserError(
                    f"impressions: {path}: a column called {clash[0]} cannot stand beside the predictions, or twice; "
                    "rename it, or leave --impressions out and join by file and line"
                )

    def write(self, folder: Path) -> None:
        """Write ``impressions-00000.parquet`` and so on, one for each file.

        Args:
            folder: has the predictions of all ranks, see `pipeline.evaluate.score.score_run`.

        Raises:
            UserError: a line is of another user or item than its prediction.
        """
        parts = pq.read_table(
            folder, columns=["file", "line", "user_id", "item_id", *self._added.names]
        ).combine_chunks()
        lines = without = 0
        for index, name in enumerate(self._files.names):
            of_file = parts.filter(pc.equal(parts["file"], name)).sort_by("line")
            line_N = of_file["line"].to_numpy()
            record, writer = 1, None
            target = folder / f"impressions-{index:05}.parquet"
            for batch in raw_batches(self._files, index):
                # Lines without a prediction take none: their row is masked.
                wanted_N = np.arange(record, record + len(batch))
                row_N = np.minimum(np.searchsorted(line_N, wanted_N), max(len(line_N) - 1, 0))
                missing_N = line_N[row_N] != wanted_N if len(line_N) else np.ones(len(batch), bool)
                rows = pa.array(row_N, mask=missing_N)
                lines += len(batch)
                without += int(missing_N.sum())
                record += len(batch)
                # The fingerprint of a large file is of its ends alone.
                for source, name_of_id in ((self._log.user_id, "user_id"), (self._log.item_id, "item_id")):
                    self._check_alike(index, batch.column(source), of_file[name_of_id].take(rows).combine_chunks())
                table = pa.Table.from_batches([batch])
                for field in self._added:
                    table = table.append_column(field, of_file[field.name].take(rows))
                writer = writer or pq.ParquetWriter(target, table.schema, compression="zstd")
                writer.write_table(table)
            if writer is not None:
                writer.close()
        if without:
            _LOGGER.info(
                f"impressions: {without:,} of {lines:,} lines have no prediction: they are of another split, or the "
                "data set left them out (`dare inspect` says why)"
            )

    def _check_alike(self, index: int, said_N: pa.Array, predicted_N: pa.Array) -> None:
        """Make sure that lines with a prediction (not null) have the ids that it was made of."""
        has_N = pc.is_valid(predicted_N)
        read = texts if pa.types.is_string(predicted_N.type) else integers
        try:
            alike = read(said_N.filter(has_N)).equals(predicted_N.filter(has_N))
        except WrongValueError:
            alike = False
        if not alike:
            raise UserError(
                f"impressions: {self._files.paths[index]} has changed since the data set was prepared; prepare it again"
            )
