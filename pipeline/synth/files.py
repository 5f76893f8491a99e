"""Generated data to files, a run of users at a time: memory does not grow with the number of events."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import SPACE
from pipeline.files import check_output_file, whole_file
from pipeline.progress import stage
from pipeline.synth.histories import BEHAVIORS, SCENES, Histories, HistoryGenerator
from pipeline.synth.impressions import BayesAuc, Impressions, draw_impressions
from schemas.errors import UserError
from schemas.synth import SynthSettings

Write = Callable[[pa.Table], None]


@dataclass(frozen=True)
class SynthReport:
    """What was written."""

    users: int
    events: int
    impressions: int
    bayes_auc: float | None
    """AUC of the impressions' true chances of a click, which no model beats but by luck; None without impressions."""
    bytes: int
    seconds: float


def synthesize(
    settings: SynthSettings, events: Path, impressions: Path | None = None, *, overwrite: bool = False
) -> SynthReport:
    """Write generated behaviours, and impressions if asked for. The same settings give byte-identical files.

    Files get their names when all of them are complete.

    Args:
        settings: how much, and with what structure.
        events: file to write: ``.parquet`` (user_id, item_id, category_id, timestamp, and behavior and scene if the
            settings ask for them), or ``.csv`` in the format of Taobao's UserBehavior.csv (user, item, category,
            behaviour type, timestamp; no header).
        impressions: ``.parquet`` file to write (user_id, item_id, category_id, timestamp, label, click_probability, and
            scene if the settings ask for it).
        overwrite: replace files that are there.

    Raises:
        UserError: a file that is there already, has another ending or cannot be written; settings that the format
            cannot hold; the disk is full.
    """
    _check(settings, events, impressions, overwrite)
    try:
        return _write(settings, events, impressions)
    except OSError as error:
        if error.errno in SPACE:
            names = " and ".join(str(path) for path in (events, impressions) if path)
            raise UserError(f"no space left on the disk for {names}; nothing was kept; set fewer events") from None
        raise


def _write(settings: SynthSettings, events: Path, impressions: Path | None) -> SynthReport:
    started = time.perf_counter()
    generator = HistoryGenerator(settings)
    # From the lengths alone, before any history is made: the display tells how much there is to do.
    users, total = generator.count()
    auc = BayesAuc()
    paths = [path for path in (events, impressions) if path]
    with ExitStack() as stack:
        # Entered before the writers and so left after them: no file gets its name before all of them are complete.
        unfinished = [stack.enter_context(whole_file(path)) for path in paths]
        schema = _event_schema(events, settings)
        write_events = stack.enter_context(_writer(unfinished[0], schema, csv=events.suffix == ".csv"))
        write_impressions = impressions and stack.enter_context(_writer(unfinished[1], _impression_schema(settings)))
        running = stack.enter_context(stage("generate", total, "events"))
        for histories in generator.stream(users):
            write_events(_event_table(histories, schema))
            if write_impressions:
                shown = draw_impressions(generator, histories)
                auc.add(shown.click_probability_UJ)
                write_impressions(_impression_table(shown, _impression_schema(settings)))
            running.advance(len(histories.item_id_E))
    return SynthReport(
        users,
        total,
        users * settings.impressions_per_user if impressions else 0,
        auc.value() if impressions else None,
        sum(path.stat().st_size for path in paths),
        time.perf_counter() - started,
    )


def _check(settings: SynthSettings, events: Path, impressions: Path | None, overwrite: bool) -> None:
    if events.suffix not in (".parquet", ".csv"):
        raise UserError(f"{events}: events are written to a file that ends in .parquet or .csv")
    if impressions and impressions.suffix != ".parquet":
        raise UserError(f"{impressions}: impressions are written to a file that ends in .parquet")
    if impressions == events:
        raise UserError(f"{events}: events and impressions need a file each")
    if events.suffix == ".csv" and settings.scene:
        raise UserError(f"{events}: Taobao's CSV has no scene; set scene=false or write .parquet")
    for path in (events, impressions):
        if path and path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if path and path.exists() and not overwrite:
            raise UserError(f"{path} is there already; give --overwrite or another name")
        if path:
            check_output_file(path)


@contextmanager
def _writer(path: Path, schema: pa.Schema, *, csv: bool = False) -> Iterator[Write]:
    """Open a file for tables of ``schema``, Parquet or CSV."""
    if csv:
        # As Taobao's file: names and numbers without quotes.
        options = pcsv.WriteOptions(include_header=False, quoting_style="none")
        with pcsv.CSVWriter(path, schema, write_options=options) as writer:
            yield writer.write_table
    else:
        # A third of the time that dictionaries of all columns take.
        grouped = [name for name in ("category_id", "behavior", "scene") if name in schema.names]
        delta = dict.fromkeys(("user_id", "timestamp"), "DELTA_BINARY_PACKED")
        encoding = {name: delta.get(name, "PLAIN") for name in schema.names if name not in grouped}
        with pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=grouped, column_encoding=encoding
        ) as writer:
            yield writer.write_table


def _event_schema(path: Path, settings: SynthSettings) -> pa.Schema:
    names = ["user_id", "item_id", "category_id"]
    if path.suffix == ".csv":
        names += ["behavior", "timestamp"]
    else:
        names += ["timestamp", *(name for name in ("behavior", "scene") if getattr(settings, name))]
    return pa.schema(
        [pa.field(name, pa.string() if name in ("behavior", "scene") else pa.int64(), nullable=False) for name in names]
    )


def _event_table(histories: Histories, schema: pa.Schema) -> pa.Table:
    columns = {
        "user_id": histories.user_id_E(),
        "item_id": histories.item_id_E,
        "category_id": histories.category_id_E,
        "timestamp": histories.timestamp_E,
        "behavior": _named(BEHAVIORS, histories.behavior_E) if "behavior" in schema.names else None,
        "scene": _named(SCENES, histories.scene_E) if "scene" in schema.names else None,
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _impression_schema(settings: SynthSettings) -> pa.Schema:
    fields = [pa.field(name, pa.int64(), nullable=False) for name in ("user_id", "item_id", "category_id", "timestamp")]
    fields.append(pa.field("label", pa.int8(), nullable=False))
    fields.append(pa.field("click_probability", pa.float64(), nullable=False))
    if settings.scene:
        fields.append(pa.field("scene", pa.string(), nullable=False))
    return pa.schema(fields)


def _impression_table(shown: Impressions, schema: pa.Schema) -> pa.Table:
    columns = [
        shown.user_id_UJ.ravel(),
        shown.item_id_UJ.ravel(),
        shown.category_id_UJ.ravel(),
        shown.timestamp_UJ.ravel(),
        shown.label_UJ.ravel(),
        shown.click_probability_UJ.ravel(),
    ]
    if "scene" in schema.names:
        columns.append(_named(SCENES, shown.scene_UJ.ravel()))
    return pa.table(columns, schema=schema)


def _named(names: tuple[str, ...], index: NDArray[np.int8]) -> pa.Array:
    return pa.array(names).take(pa.array(index))
