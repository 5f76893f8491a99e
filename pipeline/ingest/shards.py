"""Sorted lines to shards: users with targets, their histories stored once; and what later days of a chain go on from.

L = lines, U = users, P = positives or impressions, T = targets, J = negatives of a positive.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.ingest.columns import feature_column, label_column, user_column
from pipeline.ingest.dictionaries import Dictionary
from pipeline.ingest.encodings import encode_numbers
from pipeline.ingest.histories import HistoryWriter, own_histories
from pipeline.ingest.lines import I64, Lines, whole_users
from pipeline.ingest.reading import Tally, ahead
from pipeline.ingest.targets import ChosenLines, choose_targets, count_left_out, draw_negatives
from schemas import shards
from schemas.prepare import ImpressionSplit, ShardLayout, SplitSettings
from schemas.shards import SPLITS, FeatureRecord, RawType


@dataclass
class WrittenShard:
    """A shard file that was written, and what it holds."""

    name: str
    users: list[int] = field(default_factory=list)
    """Users of each row group; the lists below run alongside. Empty where no user has a target: there is no file."""
    behaviors: list[int] = field(default_factory=list)
    targets: list[tuple[int, ...]] = field(default_factory=list)
    """Targets by split."""
    positives: list[tuple[int, ...]] = field(default_factory=list)
    """Positive targets by split."""
    carried: int = 0
    """Those of all its behaviours that are of earlier days."""
    history: str | None = None
    """Name of the file of histories of all users of the shard; None: there is none."""
    history_users: int = 0
    history_behaviors: int = 0


@dataclass(frozen=True)
class ShardBuilder:
    """Writes shards. Holds everything that decides what is in one, so that a shard depends on its own lines alone."""

    dictionary: Dictionary
    features: tuple[FeatureRecord, ...]
    labels: tuple[str, ...]
    """Names of labels, the main one first."""
    split: SplitSettings
    layout: ShardLayout
    seed: int
    schema: pa.Schema
    folder: Path
    keep: int | None = None
    """Behaviours of a user that are written for later days; None: none are."""
    day: int = 0
    """Number of the day in its chain."""

    def write(
        self, batches: Iterable[pa.RecordBatch], progress: Callable[[int], object] | None = None
    ) -> tuple[list[WrittenShard], Tally]:
        """Write all shards that sorted lines make.

        Args:
            batches: lines in ``definition.line_order``, all those of a shard.
            progress: called with the number of lines done since the last call.

        Returns:
            The files, in order of their number, and what `count_left_out` counts over all lines.
        """
        files: list[WrittenShard] = []
        tally = Tally()
        kind: RawType = "text" if self.schema.field("user_id").type == pa.string() else "integer"
        kept = shards.layer_schema(self.features, user_type=kind)
        for number, lines_of_shard in _by_shard(ahead(whole_users(batches))):
            written = WrittenShard(f"shard-{number:05d}.parquet")
            with HistoryWriter(self.folder / f"history-{self.day:05d}-{number:05d}.arrow", kept) as history:
                self._write_file(written, self._tables(lines_of_shard, written, history, tally, progress))
            if history.users:
                written.history = history.path.name
                written.history_users, written.history_behaviors = history.users, history.behaviors
            if written.users or history.users:
                files.append(written)
        return files, tally

    def _tables(
        self,
        lines_of_shard: Iterable[Lines],
        written: WrittenShard,
        history: HistoryWriter,
        tally: Tally,
        progress: Callable[[int], object] | None,
    ) -> Iterator[pa.Table]:
        for lines in lines_of_shard:
            # Users without a target are dropped here: their behaviours are counted in frequencies, but nobody would
            # read them. Days that follow have to know of them.
            chosen = choose_targets(lines, self.split, self.seed, day=self.day)
            tally.update(count_left_out(lines, chosen, self.split.min_behaviors, self.split.min_history))
            yield self.build(lines, chosen)
            if lines.carried_L is not None:
                has_target_U = np.bincount(lines.user_L[chosen.line_P], minlength=len(lines.behaviors_U)) > 0
                written.carried += int((lines.behaviors_U - lines.own_behaviors_U)[has_target_U].sum())
            if self.keep is not None:
                history.add(own_histories(lines, history.schema, self.keep))
            if progress is not None:
                progress(int(lines.is_own_L.sum()))

    def build(self, lines: Lines, chosen: ChosenLines) -> pa.Table:
        """Rows of the users that have a target, in the order of the lines; schema ``shard_schema``."""
        line_P, split_P = chosen
        kept_U = np.zeros(len(lines.user_start_U), bool)
        kept_U[lines.user_L[line_P]] = True

        # Histories: all behaviours of the users that have a target, each once.
        history_L = lines.is_event_L & kept_U[lines.user_L]
        history_offset = _offsets(lines.behaviors_U[kept_U])
        columns: dict[str, NDArray[Any]] = {
            "history_item": lines.item_L[history_L],
            "history_timestamp": lines.timestamp_L[history_L],
        }
        for each in self.features:
            if each.of == "behavior":
                columns[f"history_{each.name}"] = _values(each, lines, history_L)

        # Targets: each positive is followed by its negatives, which have its moment, its split and its history.
        item_TP = lines.item_L[line_P][:, None]
        if lines.label_L is not None:
            per_line, label_T = 1, lines.label_L[line_P]
        else:
            assert not isinstance(self.split, ImpressionSplit), "impressions have labels"
            per_line = 1 + self.split.negatives
            label_T = np.tile(np.arange(per_line) == 0, len(line_P)).astype(np.int8)
            if self.split.negatives:
                drawn_PJ = draw_negatives(lines, line_P, self.dictionary, self.split.negatives, self.seed)
                item_TP = np.concatenate([item_TP, drawn_PJ], axis=1)
        # Row by row: a positive, then its negatives, then the next positive.
        item_T = item_TP.reshape(-1).astype(np.int32)
        line_T = np.repeat(line_P, per_line)
        target_offset = _offsets(np.bincount(lines.user_L[line_T], minlength=len(kept_U))[kept_U])
        columns |= {
            "target_item": item_T,
            "target_timestamp": lines.timestamp_L[line_T],
            "target_label": label_T,
            "target_split": np.repeat(split_P, per_line),
            "target_history_end": lines.history_end_L[line_T].astype(np.int32),
        }
        for each in self.features:
            if each.target:
                columns[f"target_{each.name}"] = _values(each, lines, line_T)
        for number, label in enumerate(self.labels[1:], 1):
            name = shards.label_column(self.labels, label)
            columns[name] = lines.others_L[label_column(number, label)][line_T].astype(np.int8)
        if "weight" in lines.others_L:
            columns["target_weight"] = lines.others_L["weight"][line_T].astype(np.float32)
        if lines.line_L is not None:
            columns["target_line"] = lines.line_L[line_T]
        start_U = lines.user_start_U[kept_U]
        of_users = {f"user_{each.name}": _values(each, lines, start_U) for each in self.features if each.of == "user"}

        # Lists share their offsets: one for all columns of a history, one for all of the targets.
        def ragged(name: str) -> pa.Array:
            offsets = history_offset if name.startswith("history_") else target_offset
            return pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(columns[name]), type=self.schema.field(name).type
            )

        def column(name: str) -> pa.Array:
            if name == "user_id":
                return lines.user_id_L.take(pa.array(start_U))
            return pa.array(of_users[name]) if name in of_users else ragged(name)

        return pa.Table.from_arrays([column(name) for name in self.schema.names], schema=self.schema)

    def _write_file(self, written: WrittenShard, tables: Iterable[pa.Table]) -> None:
        writer = None
        try:
            # The next one is made while this one is compressed.
            for group in ahead(_groups(tables, self.layout.users_per_row_group)):
                # Only when there is something to write: users without targets may fill a whole shard.
                if writer is None:
                    writer = pq.ParquetWriter(self.folder / written.name, self.schema, **shard_encoding(self.schema))
                writer.write_table(group, row_group_size=len(group))
                _count(written, group)
        finally:
            if writer is not None:
                writer.close()


def _values(record: FeatureRecord, lines: Lines, wanted: NDArray[Any]) -> NDArray[Any]:
    """A feature on some lines, as shards have it."""
    column = user_column(record.name) if record.of == "user" else feature_column(record.name)
    values = lines.others_L[column][wanted]
    return encode_numbers(record, values) if record.kind == "number" else values.astype(np.int32, copy=False)


def shard_encoding(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of ``ParquetWriter``: plain ids, delta-packed timestamps, zstd; decodes faster than dictionaries."""
    names = {
        name: f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in schema.names
    }
    return {
        "compression": "zstd",
        "use_dictionary": False,
        # Smallest and largest of shuffled ids rule nothing out.
        "write_statistics": False,
        # The stream's reader checks them: a flipped bit is an error, not another item.
        "write_page_checksum": True,
        "column_encoding": {
            path: "DELTA_BINARY_PACKED" if name.endswith(("timestamp", "line")) else "PLAIN"
            for name, path in names.items()
        },
    }


def _by_shard(parts: Iterator[Lines]) -> Iterator[tuple[int, Iterator[Lines]]]:
    """Group consecutive lines by shard; a part that spans shards is cut. Each group must be used up before the next."""
    # At most one piece, read ahead: only the next piece tells that a shard has ended.
    pending: list[Lines] = []

    def cut() -> Iterator[Lines]:
        for part in parts:
            # Parts hold whole users, and a user's lines are all of one shard.
            starts = np.flatnonzero(np.diff(part.shard_L, prepend=part.shard_L[0] - 1))
            for start, end in zip(starts, [*starts[1:], len(part)], strict=True):
                yield part.slice(int(start), int(end))

    pieces = cut()

    def of_shard(number: int) -> Iterator[Lines]:
        while pending and pending[0].shard_L[0] == number:
            yield pending.pop()
            following = next(pieces, None)
            if following is not None:
                pending.append(following)

    first = next(pieces, None)
    if first is not None:
        pending.append(first)
    while pending:
        number = int(pending[0].shard_L[0])
        yield number, of_shard(number)


def _groups(tables: Iterable[pa.Table], users: int) -> Iterator[pa.Table]:
    """Cut a stream of tables into groups of ``users`` rows, the last one smaller, however the stream was cut before."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        while len(table):
            head = table.slice(0, users - rows)
            table = table.slice(len(head))
            held.append(head)
            rows += len(head)
            if rows == users:
                yield pa.concat_tables(held).combine_chunks()
                held, rows = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _count(written: WrittenShard, group: pa.Table) -> None:
    split_T = group["target_split"].combine_chunks().flatten().to_numpy()
    label_T = group["target_label"].combine_chunks().flatten().to_numpy()
    written.users.append(len(group))
    written.behaviors.append(int(pc.sum(pc.list_value_length(group["history_item"])).as_py()))
    written.targets.append(tuple(np.bincount(split_T, minlength=len(SPLITS)).tolist()))
    written.positives.append(tuple(np.bincount(split_T[label_T > 0], minlength=len(SPLITS)).tolist()))


def _offsets(lengths: I64) -> NDArray[np.int32]:
    """Offsets of lists from their lengths: one more than there are lists, the first one 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int32)
