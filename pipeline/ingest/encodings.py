"""Raw values of a feature to what a model sees: numbered, hashed, cut into quantiles or scaled.

V = distinct raw values, E = values of all sets, B = bags, N = numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.hashing import hash_texts, mix
from pipeline.ingest.sets import decoded_sets
from schemas.errors import UserError
from schemas.events import UNKNOWN
from schemas.features import FeatureSettings
from schemas.shards import BAGS, Encoding, FeatureRecord, dictionary_schema, raw_type

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """How a feature's raw values become ids."""

    record: FeatureRecord
    ids: pa.Table | None = None
    """(value, id): raw values, or sets as one text, to ids or bags; None: numbers, hashes."""
    dictionary: pa.Table | None = None
    """Schema `schemas.shards.dictionary_schema`; None: there is none."""
    bags: pa.Table | None = None
    """Schema `schemas.shards.BAGS`; None: places have one value."""

    def write(self, folder: Path) -> list[str]:
        """Write the files that the feature has in a data set; returns their names."""
        names = []
        if self.dictionary is not None and self.record.dictionary is not None:
            pq.write_table(self.dictionary, folder / self.record.dictionary, compression="zstd", use_dictionary=False)
            names.append(self.record.dictionary)
        if self.bags is not None and self.record.bag_file is not None:
            write_arrow(self.bags, folder / self.record.bag_file)
            names.append(self.record.bag_file)
        return names


@dataclass(frozen=True)
class Former:
    """What a feature's ids go on from; without a record it begins a chain of days."""

    record: FeatureRecord | None = None
    """What the data set before says of the feature."""
    dictionary: pa.Table | None = None
    """That data set's: raw_id, id, 0 for a value that is not admitted yet, and frequency."""
    bags: pa.Table | None = None
    closed: bool = False
    """Nothing is added to the dictionary: a value that it does not know is unknown."""
    counted_anew: bool = False
    """Frequencies that are given are those of all days; otherwise they are added to those of the days before."""


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write a table as one record batch, uncompressed: a reader maps it into memory."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)


def new_record(feature: FeatureSettings, **more: Any) -> FeatureRecord:
    """The record of a feature, with what its settings say."""
    encoding: Encoding = "dictionary"
    if feature.hash_buckets is not None:
        encoding = "hash"
    elif feature.buckets is not None:
        encoding = "buckets"
    elif feature.scale is not None:
        encoding = "scale"
    return FeatureRecord(
        name=feature.name,
        of=feature.of,
        kind=feature.kind,
        encoding=encoding,
        type=None if feature.kind == "number" else feature.type,
        scale=feature.scale,
        **more,
    )


def numbered(
    feature: FeatureSettings, counts: pa.Table, seed: int, former: Former | None = None, **more: Any
) -> Encoded:
    """Ids of a feature that has one value, from a dictionary.

    Args:
        feature: its settings.
        counts: (value, frequency, places) in any order.
        seed: decides the shuffle.
        former: what ids go on from, in a chain of days; None: nothing came before and nothing follows.
        more: fields of the record; ``values`` is the number of places.
    """
    counts = _sorted(counts)
    id_V, dictionary, rows = _numbers(counts["value"], counts["frequency"].to_numpy(), feature, seed, former)
    known, places = id_V > 0, counts["places"].to_numpy()
    record = new_record(
        feature,
        rows=rows,
        missing=more["values"] - int(places.sum()),
        below_min_count=int(places[~known].sum()),
        rare=int((~known).sum()),
        **more,
    )
    ids = pa.table({"value": counts["value"].filter(pa.array(known)), "id": id_V[known]})
    return Encoded(record, ids, dictionary)


def numbered_sets(
    feature: FeatureSettings, counts: pa.Table, seed: int, former: Former | None = None, **more: Any
) -> Encoded:
    """Ids of the values in sets, and bags of them; arguments as those of `numbered`, where a value is a whole set.

    Rare values are left out of their sets, which may become equal or empty.

    Raises:
        UserError: more values in all than a file of bags can hold.
    """
    counts = _sorted(counts)
    sets = decoded_sets(counts["value"])
    if len(sets.values) >= 2**31:
        raise UserError(f"features: {feature.name} has {len(sets.values):,} values in distinct sets; at most 2^31 fit")
    length_B = np.diff(sets.offsets.to_numpy())
    parent_E = np.repeat(np.arange(len(sets)), length_B)
    typed = pa.int64() if feature.hash_buckets is not None else raw_type(feature.type)
    coded = sets.values.cast(typed).dictionary_encode()
    code_E = coded.indices.to_numpy()
    places = counts["places"].to_numpy()
    collisions, dictionary = None, None
    if feature.hash_buckets is not None:
        id_V = (coded.dictionary.to_numpy() % feature.hash_buckets + 1).astype(np.int32)
        collisions = len(id_V) - len(np.unique(id_V))
        rows = feature.hash_buckets
    else:
        # bincount adds weights up in float64: exact below 2^53 events.
        frequency_V = np.bincount(code_E, counts["frequency"].to_numpy()[parent_E], len(coded.dictionary))
        order = pc.sort_indices(coded.dictionary)
        frequency = frequency_V.astype(np.int64)[order.to_numpy()]
        sorted_ids, dictionary, rows = _numbers(coded.dictionary.take(order), frequency, feature, seed, former)
        id_V = np.zeros(len(coded.dictionary), np.int32)
        id_V[order.to_numpy()] = sorted_ids
    rare_B = np.bincount(parent_E, id_V[code_E] == 0, len(sets)) > 0
    bag_B, bags = _bags(id_V[code_E], parent_E, len(sets), None if former is None else former.bags)
    record = new_record(
        feature,
        rows=rows,
        bags=len(bags) - 1,
        missing=more["values"] - int(places.sum()),
        below_min_count=int(places[rare_B].sum()),
        rare=int((id_V == 0).sum()),
        collisions=collisions,
        **more,
    )
    ids = pa.table({"value": counts["value"], "id": pa.array(bag_B)})
    return Encoded(record, ids, dictionary, bags)


def hashed(feature: FeatureSettings, counts: dict[str, int], **more: Any) -> Encoded:
    """A feature without a dictionary.

    Args:
        feature: its settings.
        counts: ``places`` with a value, distinct ``hashes``, and ``buckets`` that have any.
        more: fields of the record; ``values`` is the number of places.
    """
    assert feature.hash_buckets is not None
    return Encoded(
        new_record(
            feature,
            rows=feature.hash_buckets,
            missing=more["values"] - counts["places"],
            collisions=counts["hashes"] - counts["buckets"],
            **more,
        )
    )


def measured(
    feature: FeatureSettings, counts: pa.Table, of_each: str, former: Former | None = None, **more: Any
) -> Encoded:
    """A feature that is a number: quantiles, or mean and deviation, exact over all its values.

    Args:
        feature: its settings.
        counts: (value, frequency, places) in any order.
        of_each: ``places``: values count once an item or user; ``frequency``: once an event or impression.
        former: has edges, or mean and deviation, which stay what they are; None: they are those of ``counts``.
        more: fields of the record; ``values`` is the number of places.
    """
    # By value, so that sums are taken in one order: engines give rows in orders of their own.
    counts = _sorted(counts)
    missing = more["values"] - int(counts["places"].to_numpy().sum())
    if former is not None and former.record is not None:
        kept = former.record.model_dump(include={"rows", "edges", "mean", "deviation"})
        return Encoded(new_record(feature, missing=missing, **kept, **more))
    number = counts[of_each].to_numpy()
    value, number = counts["value"].to_numpy()[number > 0], number[number > 0]
    if feature.buckets is not None:
        edges = _quantiles(value, number, feature.buckets)
        return Encoded(new_record(feature, rows=len(edges) + 1, missing=missing, edges=edges, **more))
    scaled = np.log1p(value) if feature.scale == "log" else value
    mean, deviation = _mean_and_deviation(scaled, number)
    return Encoded(new_record(feature, rows=0, missing=missing, mean=mean, deviation=deviation, **more))


def encode_numbers(record: FeatureRecord, value_N: NDArray[np.float64]) -> NDArray[Any]:
    """Ids of quantiles (int32, 0 for what is missing) or scaled numbers (float32, 0.0 for what is missing).

    Args:
        record: of the feature.
        value_N: not finite where a value is missing.
    """
    known = np.isfinite(value_N)
    if record.edges is not None:
        index = np.searchsorted(np.array(record.edges), value_N, side="right") + 1
        return np.where(known, index, UNKNOWN).astype(np.int32)
    assert record.mean is not None
    assert record.deviation is not None
    value_N = np.where(known, value_N, 0.0)
    scaled = np.log1p(value_N) if record.scale == "log" else value_N
    return np.where(known, (scaled - record.mean) / record.deviation, 0.0).astype(np.float32)


def shuffled_ids(count: int, seed: int, salt: int) -> NDArray[np.int32]:
    """The ids 1 .. count, shuffled: without this, ids given by age or popularity would load one shard most."""
    order = np.argsort(mix(mix(np.arange(count, dtype=np.uint64), seed), salt), kind="stable")
    ids = np.empty(count, np.int32)
    ids[order] = np.arange(1, count + 1, dtype=np.int32)
    return ids


def admitted(frequency: I64, min_count: int) -> NDArray[np.bool_]:
    """Whether values are frequent enough. What was only shown has the frequency 0, and counts where all values do."""
    return frequency >= min_count if min_count > 1 else np.ones(len(frequency), bool)


def _numbers(
    values: pa.Array, frequency: I64, feature: FeatureSettings, seed: int, former: Former | None
) -> tuple[NDArray[np.int32], pa.Table | None, int]:
    """Ids of sorted raw values, 0 for the unknown; the dictionary, None where the former one stays; its largest id."""
    if former is not None and former.record is not None:
        assert former.dictionary is not None
        if former.closed:
            # Null, where a value is not there, is the unknown.
            index_V = pc.index_in(values, former.dictionary["raw_id"].combine_chunks())
            id_V = pc.fill_null(former.dictionary["id"].combine_chunks().take(index_V), 0).to_numpy()
            return id_V.astype(np.int32), None, former.record.rows
        return _further_numbers(values, frequency, feature, seed, former)
    frequent = admitted(frequency, feature.min_count)
    count = int(frequent.sum())
    id_V = np.zeros(len(values), np.int32)
    id_V[frequent] = shuffled_ids(count, seed, _salt(feature))
    schema = dictionary_schema(text=feature.type == "text")
    # In a chain of days, those that are too rare are counted on.
    listed = frequent if former is None else np.ones(len(values), bool)
    dictionary = pa.table([values.filter(pa.array(listed)), id_V[listed], frequency[listed]], schema=schema)
    return id_V, dictionary, count


def _further_numbers(
    values: pa.Array, frequency: I64, feature: FeatureSettings, seed: int, former: Former
) -> tuple[NDArray[np.int32], pa.Table, int]:
    """`_numbers`, where ids stay what they are and further ones are given: to values that are frequent enough now."""
    assert former.record is not None
    assert former.dictionary is not None
    former_raw, former_id = former.dictionary["raw_id"].combine_chunks(), former.dictionary["id"].to_numpy()
    raw_V = pc.unique(pa.concat_arrays([former_raw, values]))
    raw_V = raw_V.take(pc.sort_indices(raw_V))
    place, place_of_former = pc.index_in(values, raw_V).to_numpy(), pc.index_in(former_raw, raw_V).to_numpy()
    id_V, frequency_V = np.zeros(len(raw_V), np.int32), np.zeros(len(raw_V), np.int64)
    id_V[place_of_former] = former_id
    frequency_V[place] = frequency
    if not former.counted_anew:
        frequency_V[place_of_former] += former.dictionary["frequency"].to_numpy()
    new_V = (id_V == 0) & admitted(frequency_V, feature.min_count)
    count, rows = int(new_V.sum()), former.record.rows
    id_V[new_V] = rows + shuffled_ids(count, seed, _salt(feature))
    schema = dictionary_schema(text=feature.type == "text")
    return id_V[place], pa.table([raw_V, id_V, frequency_V], schema=schema), rows + count


def _salt(feature: FeatureSettings) -> int:
    # Of the name: the order in which features are declared must not matter.
    return int(hash_texts(pa.array([feature.name], pa.string()))[0])


def _bags(
    id_E: NDArray[np.int32], parent_E: I64, count: int, former: pa.Table | None
) -> tuple[NDArray[np.int32], pa.Table]:
    """Number of each set's bag, and the bags, ``former`` ones first, new ones by content; bag 0 is the empty one."""
    known = id_E > 0
    id_E, parent_E = id_E[known], parent_E[known]
    order = np.lexsort((id_E, parent_E))
    id_E, parent_E = id_E[order], parent_E[order]
    new = np.ones(len(id_E), bool)
    new[1:] = (id_E[1:] != id_E[:-1]) | (parent_E[1:] != parent_E[:-1])
    id_E, parent_E = id_E[new], parent_E[new]
    # As bytes, large ones first: they sort as lists of ids do.
    sets = _as_bytes(id_E, np.searchsorted(parent_E, np.arange(count + 1)))
    distinct = pa.array([b""], pa.large_binary())
    if former is not None:
        lists = former["ids"].combine_chunks()
        distinct = _as_bytes(lists.flatten().to_numpy(), lists.offsets.to_numpy() - lists.offsets[0].as_py())
    new = pc.unique(sets)
    new = new.filter(pc.invert(pc.is_in(new, distinct)))
    distinct = pa.concat_arrays([distinct, new.take(pc.sort_indices(new))])
    bag_B = pc.index_in(sets, distinct).to_numpy().astype(np.int32)
    lengths = pc.binary_length(distinct).to_numpy() // 4
    joined = b"".join(distinct.to_pylist())
    ids = np.frombuffer(joined, ">i4").astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids), type=BAGS.field("ids").type)
    return bag_B, pa.table([lists], schema=BAGS)


def _as_bytes(id_E: NDArray[np.int32], end_B: NDArray[Any]) -> pa.Array:
    """Sets of ids as bytes that sort as lists of ids do; each but the first begins where the one before ends."""
    ends, content = pa.py_buffer((4 * end_B).astype(np.int64)), pa.py_buffer(id_E.astype(">i4").tobytes())
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(end_B) - 1, [None, ends, content])


def _quantiles(value: NDArray[np.float64], number: I64, buckets: int) -> tuple[float, ...]:
    """The least value of each bucket but the first; buckets that would have no values are not there."""
    if not len(value):
        return ()
    ends = np.cumsum(number)
    total = int(ends[-1])
    ranks = np.array([total * bucket // buckets for bucket in range(1, buckets)])
    # The value at each rank from 0; where one value fills several buckets they are one.
    edges = np.unique(value[np.searchsorted(ends, ranks, side="right")])
    return tuple(edges[edges > value[0]].tolist())


def _mean_and_deviation(value: NDArray[np.float64], number: I64) -> tuple[float, float]:
    """Mean and deviation of values that come so many times; the deviation is 1 where all are equal."""
    if not len(value) or value.min() == value.max():
        return float(value[0]) if len(value) else 0.0, 1.0
    # Not as a product of matrices, whose sums depend on the threads that take them.
    total = int(number.sum())
    mean = float(np.sum(value * number)) / total
    variance = float(np.sum((value - mean) ** 2 * number)) / total
    return mean, float(np.sqrt(variance)) or 1.0


def _sorted(counts: pa.Table) -> pa.RecordBatch:
    """Counts by value: engines give rows in orders of their own."""
    together = counts.combine_chunks()
    order = pc.sort_indices(together["value"])
    columns = {
        name: pa.concat_arrays(together[name].take(order).chunks or [pa.nulls(0, together[name].type)])
        for name in together.column_names
    }
    return pa.record_batch(columns)
