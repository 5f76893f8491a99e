"""The definition of ingest, as Ibis expressions: the same for every engine.

Events and impressions become *lines*, sorted so that each user's lines stand together and in time order.
"""

from collections.abc import Mapping, Sequence

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from pipeline.ingest.columns import FEATURE_KEY, USER_NUMBER, feature_column
from pipeline.ingest.times import LATEST
from schemas.shards import SPLITS, UNLABELED, FeatureRecord

USER_KEY_RANGE = 2**31 - 1
"""User keys are below this prime."""
UNKNOWN_LABEL = "unknown_label_"
"""Begins, in `faults`, the number of lines without one of the further labels."""
LEAST_WEIGHT = 2.0**-149
"""The least number above 0 that a float32 holds."""
EVENT = -2
"""The label of a line that is a behaviour."""
USER_ORDER = "user_order"
"""Column of numbers of users that sort as users do, where lines have codes of them."""
NO_NUMBER = float("-inf")
"""What stands for a missing number in lines: engines sort nulls as they like, and logs have no infinite numbers."""


def decoded(table: ir.Table, texts: Mapping[str, ir.Table | None]) -> ir.Table:
    """A table with texts in the place of codes.

    Args:
        table: with codes; what is missing stays so.
        texts: column -> (code, text) of its codes; None: the column has no codes.
    """
    joined = table
    values: dict[str, ir.Value] = {}
    for name, of_column in texts.items():
        if of_column is not None:
            named = of_column.select(**{f"code_{name}": "code", f"text_{name}": "text"})
            joined = joined.left_join(named, [(name, f"code_{name}")])
            values[name] = joined[f"text_{name}"]
    return joined.select(**{name: values.get(name, joined[name]) for name in table.columns}) if values else table


def user_order(texts: ir.Table, seed: int) -> ir.Table:
    """(code, text, `USER_ORDER`, user_key) of users: a number of each in the order of lines, see `line_order`."""
    keyed = texts.mutate(user_key=_user_key(texts["code"], seed))
    number = ibis.row_number().over(order_by=[keyed["user_key"], keyed["text"]])
    return keyed.mutate(**{USER_ORDER: number}).select("code", "text", USER_ORDER, "user_key")


def with_order(users: ir.Table | None, order: ir.Table) -> ir.Table:
    """(key, `USER_ORDER`, user_key, columns) of every user, from (key, columns), if any has some, and `user_order`."""
    numbered = order.select("code", USER_ORDER, "user_key")
    return numbered.rename(key="code") if users is None else users.inner_join(numbered, [("key", "code")]).drop("code")


def in_buckets(table: ir.Table, buckets: int | None, column: str = "item_id") -> ir.Table:
    """A table whose items, hashes of raw ids, are buckets from 1; as it is where ``buckets`` is None."""
    return table if buckets is None else table.mutate(**{column: _bucket(table[column], buckets)})


def item_hashes(logs: Sequence[ir.Table]) -> ir.Table:
    """(item_id) of every line of the logs."""
    parts = [log.select("item_id") for log in logs]
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


def _bucket(hashed: ir.Value, buckets: int) -> ir.Value:
    return (hashed % buckets + 1).cast("int64")


def faults(log: ir.Table) -> ir.Table:
    """One row: ``lines``, first and last timestamp, and how many lines have a fault that forbids going on."""
    checks = {f"null_{name}": log[name].isnull().sum() for name in ("user_id", "item_id", "timestamp")}
    checks |= {
        f"negative_{name}": (log[name] < 0).sum() for name in ("user_id", "item_id") if log[name].type().is_integer()
    }
    rest = [name for name in ("label", "weight", "split") if name in log.columns]
    checks |= {f"null_{name}": log[name].isnull().sum() for name in rest}
    # What comes after a click may not be known yet: a further label may be missing, and is counted.
    further = [name for name in log.columns if name.startswith(UNKNOWN_LABEL.removeprefix("unknown_"))]
    checks |= {f"unknown_{name}": log[name].isnull().sum() for name in further}
    if "weight" in log.columns:
        weight = log["weight"]
        checks |= {"tiny_weight": ((weight > 0) & (weight < LEAST_WEIGHT)).sum(), "weighing": (weight > 0).sum()}
    outside = (log["timestamp"] < 0) | (log["timestamp"] > LATEST)
    checks["impossible_timestamp"] = outside.sum()
    return log.agg(lines=log.count(), first=log["timestamp"].min(), last=log["timestamp"].max(), **checks)


def without_key(file: ir.Table) -> ir.Table:
    """One row: ``lines`` of a file of features, and how many ``without_key`` belong to nobody."""
    return file.agg(lines=file.count(), without_key=file[FEATURE_KEY].isnull().sum())


def seen(logs: Sequence[ir.Table], key: str, columns: Sequence[str]) -> ir.Table:
    """(key, timestamp, weight, columns) of every line of the logs; a log without a column has nulls there.

    Args:
        logs: events, and impressions where there are some: lines of the latter weigh 0.
        key: ``item_id`` or ``user_id``.
        columns: each is in the events.
    """
    kinds = {name: logs[0][name].type() for name in columns}
    parts = [
        log.select(
            key=log[key],
            timestamp=log["timestamp"],
            weight=ibis.literal(int(number == 0), "int64"),
            **{name: log[name] if name in log.columns else ibis.null(kind) for name, kind in kinds.items()},
        )
        for number, log in enumerate(logs)
    ]
    return ibis.union(*parts) if len(parts) > 1 else parts[0]


def extremes(lines: ir.Table, columns: Sequence[str]) -> ir.Table:
    """(key, frequency among the events, last_seen, ``low_`` and ``high_`` of each column) of every key of ``seen``."""
    values: dict[str, ir.Value] = {"last_seen": lines["timestamp"].max()}
    for name in columns:
        values |= {f"low_{name}": lines[name].min(), f"high_{name}": lines[name].max()}
    return lines.group_by("key").agg(frequency=lines["weight"].sum(), **values)


def with_file(
    table: ir.Table, file: ir.Table, columns: Sequence[str], texts: Mapping[str, ir.Table | None]
) -> ir.Table:
    """``extremes`` with the columns of a file that has lines of its own for keys; ``texts`` of those with codes."""
    values: dict[str, ir.Value] = {}
    file, by = _with_texts(file, columns, texts)
    for name in columns:
        low, high = file[name].min(), file[name].max()
        if by[name] != name:
            low, high = file[name].argmin(file[by[name]]), file[name].argmax(file[by[name]])
        values |= {f"low_{name}": low, f"high_{name}": high}
    of_key = file.group_by(file_key=file[FEATURE_KEY]).agg(**values)
    return table.left_join(of_key, [("key", "file_key")]).drop("file_key")


def changes(table: ir.Table, columns: Sequence[str]) -> ir.Table:
    """One row: ``number`` of keys, and how many have several values of each column."""
    changed = {name: (table[f"low_{name}"] != table[f"high_{name}"]).sum() for name in columns}
    return table.agg(number=table.count(), **changed)


def last_values(lines: ir.Table, table: ir.Table, column: str, texts: ir.Table | None) -> ir.Table:
    """(key, value) of the keys with several values: the last one; of equal timestamps the larger one.

    Of a column with codes the larger one is that of the larger text.
    """
    # Most keys have one value. Only the others are gone through again, by time.
    changed = table.filter(table[f"low_{column}"] != table[f"high_{column}"]).select("key")
    several = lines.filter(lines[column].notnull()).semi_join(changed, "key")
    several, by = _with_texts(several, [column], {column: texts})
    largest = several[column].max() if by[column] == column else several[column].argmax(several[by[column]])
    moments = several.group_by("key", "timestamp").agg(value=largest)
    return moments.group_by("key").agg(value=moments["value"].argmax(moments["timestamp"]))


def _with_texts(
    table: ir.Table, columns: Sequence[str], texts: Mapping[str, ir.Table | None]
) -> tuple[ir.Table, dict[str, str]]:
    """A table with the texts of its codes beside them, and for each column the one that says which value is larger."""
    by = {name: name if texts[name] is None else f"text_{name}" for name in columns}
    for name, of_column in texts.items():
        if of_column is not None:
            named = of_column.select(**{f"code_{name}": "code", f"text_{name}": "text"})
            table = table.left_join(named, [(name, f"code_{name}")]).drop(f"code_{name}")
    return table, by


def settled(table: ir.Table, columns: Sequence[str], last: Mapping[str, ir.Table]) -> ir.Table:
    """(key, frequency, last_seen, columns): one value of each, the largest unless ``last`` says another."""
    for name in columns:
        table = table.mutate(**{name: table[f"high_{name}"]})
        if name in last:
            newer = last[name].select(last_key="key", last_value="value")
            table = table.left_join(newer, [("key", "last_key")])
            table = table.mutate(**{name: ibis.coalesce(table["last_value"], table[name])})
            table = table.drop("last_key", "last_value")
    return table.select("key", "frequency", "last_seen", *columns)


def with_former_items(items: ir.Table, former: ir.Table, values: ir.Table | None, columns: Sequence[str]) -> ir.Table:
    """Items of a day and of the days before it: what they are now, and what they were.

    Args:
        items: (key, frequency, last_seen, columns) of the day.
        former: (former_key, id, frequency, last_seen, row, row_day) of the days before.
        values: (former_key, columns) of the days before; None: what the day does not say is missing.
        columns: the day's last known value of each wins.

    Returns:
        (key, frequency, last_seen, columns) of all days, ``seen``, 1 where the day has the item, and id, row, row_day
        of the days before, 0 for items that these do not have.
    """
    before = former.rename({f"former_{name}": name for name in ("frequency", "last_seen")})
    if values is not None:
        of_values = values.rename({"values_key": "former_key"} | {f"former_{name}": name for name in columns})
        before = before.left_join(of_values, [("former_key", "values_key")]).drop("values_key")
    both = items.outer_join(before, [("key", "former_key")])
    carried = {} if values is None else {name: ibis.coalesce(both[name], both[f"former_{name}"]) for name in columns}
    return both.select(
        key=ibis.coalesce(both["key"], both["former_key"]),
        frequency=ibis.coalesce(both["frequency"], 0) + ibis.coalesce(both["former_frequency"], 0),
        # Days follow each other: what the day says is later.
        last_seen=ibis.coalesce(both["last_seen"], both["former_last_seen"]),
        seen=both["key"].notnull().cast("int8"),
        **{name: ibis.coalesce(both[name], 0).cast("int32") for name in ("id", "row", "row_day")},
        **({name: both[name] for name in columns} | carried),
    )


def raw_counts(table: ir.Table, column: str, weight: str | None = None) -> ir.Table:
    """(value, frequency, places) of every raw value: the sum of its weights, and how many rows have it."""
    known = table.filter(table[column].notnull())
    frequency = known.count() if weight is None else known[weight].sum()
    return known.group_by(value=known[column]).agg(frequency=frequency, places=known.count())


def hash_counts(table: ir.Table, column: str, buckets: int) -> ir.Table:
    """One row: ``places`` with a value, distinct ``hashes``, and ``buckets`` that have any."""
    hashed = table[column]
    return table.agg(places=hashed.count(), hashes=hashed.nunique(), buckets=_bucket(hashed, buckets).nunique())


def size(table: ir.Table, column: str) -> ir.Table:
    """One row: ``number`` of rows, and ``length``, characters in a column in all, 0 where it is not text."""
    text = table[column].type().is_string()
    return table.agg(number=table.count(), length=table[column].length().sum() if text else ibis.literal(0, "int64"))


def timestamp_counts(impressions: ir.Table) -> ir.Table:
    """(timestamp, number of impressions), by time."""
    return impressions.group_by("timestamp").agg(lines=impressions.count()).order_by("timestamp")


def encoded(
    table: ir.Table, records: Sequence[FeatureRecord], ids: Mapping[str, ir.Table], buckets: Mapping[str, int]
) -> ir.Table:
    """A table whose columns of features have dense ids (int32, 0 is the unknown), or numbers (`NO_NUMBER`: missing).

    Args:
        table: with raw values; what it has no column of is missing on all rows.
        records: the features.
        ids: for each that has a dictionary, (value, id).
        buckets: for each that is hashed, how many.
    """
    # All joins first, and then one selection: a chain of joins is one expression, where layers of them would take time
    # and memory that grow with the square of the features' number.
    joined = table
    values: dict[str, ir.Value] = {}
    for record in records:
        column, name = feature_column(record.name), record.name
        if column in table.columns and name in ids:
            named = ids[name].select(**{f"raw_{column}": "value", f"id_{column}": "id"})
            joined = joined.left_join(named, [(column, f"raw_{column}")])
    for record in records:
        column, name = feature_column(record.name), record.name
        missing = ibis.literal(NO_NUMBER, "float64") if record.kind == "number" else ibis.literal(0, "int32")
        if column not in table.columns:
            values[column] = missing
        elif record.kind == "number":
            values[column] = ibis.coalesce(joined[column], missing)
        elif name in ids:
            # A null of the log matches nothing and becomes 0, the unknown.
            values[column] = ibis.coalesce(joined[f"id_{column}"], 0).cast("int32")
        elif name in buckets:
            values[column] = ibis.coalesce(_bucket(joined[column], buckets[name]), 0).cast("int32")
    return joined.select(**{name: joined[name] for name in table.columns} | values)


def shown(impressions: ir.Table, cuts: tuple[int, int] | None, labels: Sequence[str]) -> ir.Table:
    """Impressions with a split, and labels of one type.

    Args:
        impressions: as they were read.
        cuts: timestamps at which validation and test begin, for impressions without a split of their own.
        labels: columns of labels, ``label`` the first.
    """
    split: ir.Value
    if labels[0] not in impressions.columns:
        # There is nothing to train on: all of them are to be scored.
        split = ibis.literal(SPLITS.index("test"), "int8")
        impressions = impressions.mutate(**{labels[0]: ibis.literal(UNLABELED, "int8")})
    elif "split" in impressions.columns:
        split = impressions["split"].cases(*((name, code) for code, name in enumerate(SPLITS)))
    else:
        assert cuts is not None, "impressions without a split are cut by time"
        split = ibis.cases((impressions["timestamp"] < cuts[0], 0), (impressions["timestamp"] < cuts[1], 1), else_=2)
    known = {name: ibis.coalesce(impressions[name].cast("int8"), UNLABELED).cast("int8") for name in labels}
    return impressions.mutate(split=split.cast("int8"), **known)


def lines(
    logs: Sequence[ir.Table], item_ids: ir.Table | None, users: ir.Table | None, carried: ir.Table | None = None
) -> ir.Table:
    """Events and impressions as lines of one table, with dense ids of items and what belongs to their users.

    Args:
        logs: events and, where there are some, impressions as `shown` makes them, both `encoded`.
        item_ids: (raw_id, id); None: items are buckets already.
        users: (key, columns) of every user, `encoded`, with `USER_ORDER` and user_key where users have codes; None:
            there are neither.
        carried: (user_id, where it is text `USER_NUMBER`, timestamp, item, columns of behaviours' features) of the
            users' behaviours on earlier days, of which the logs know nothing; None: this is no later day of a chain.

    Returns:
        user_id, where it is text `USER_NUMBER`, timestamp, item, columns of features, those of ``users``, where
        there are impressions labels, weight, split, line; an event's label is `EVENT`. With ``carried``, a column of
        that name says which lines are of earlier days: 1, else 0.
    """
    # Both logs become lines of one table, because a target and the behaviours before it are found by one sort.
    parts = [_dense(log, item_ids) for log in logs]
    if len(parts) > 1:
        nothing = {name: kind for name, kind in parts[1].schema().items() if name not in parts[0].columns}
        parts[0] = parts[0].mutate(**{name: _of_no_impression(name, kind) for name, kind in nothing.items()})
    if carried is not None:
        rest = {name: kind for name, kind in parts[0].schema().items() if name not in carried.columns}
        own = [part.mutate(carried=ibis.literal(0, "int8")) for part in parts]
        before = carried.mutate(
            **{name: _of_no_impression(name, kind) for name, kind in rest.items()}, carried=ibis.literal(1, "int8")
        )
        parts = [*own, before.cast(own[0].schema())]
    if len(parts) > 1:
        parts = [part.select(sorted(parts[0].columns)) for part in parts]
        table = ibis.union(*parts)
    else:
        table = parts[0]
    if users is not None:
        table = table.left_join(users.rename(known_user="key"), [("user_id", "known_user")]).drop("known_user")
    return table


def _of_no_impression(name: str, kind: dt.DataType) -> ir.Value:
    """What a behaviour has in a column of impressions."""
    if name == "label":
        return ibis.literal(EVENT, kind)
    if not name.startswith(feature_column("")):
        return ibis.literal(-1, kind)
    return ibis.literal(NO_NUMBER if kind.is_floating() else 0, kind)


def touched(logs: Sequence[ir.Table], seed: int) -> ir.Table:
    """(user_id, where it is text `USER_NUMBER`, user_key) of every user of the logs."""
    number = USER_NUMBER if USER_NUMBER in logs[0].columns else "user_id"
    names = sorted({"user_id", number})
    parts = [log.select(names) for log in logs]
    together = ibis.union(*parts) if len(parts) > 1 else parts[0]
    return together.distinct().mutate(user_key=lambda table: _user_key(table[number], seed))


def with_earlier_users(users: ir.Table, earlier: ir.Table) -> ir.Table:
    """What belongs to users: where this day knows no value, the one of the days before.

    Args:
        users: (key, columns) of every user, `encoded`.
        earlier: the same of users of earlier days, which may be fewer.
    """
    columns = [name for name in users.columns if name != "key"]
    before = earlier.select(earlier_key="key", **{f"earlier_{name}": name for name in columns})
    joined = users.left_join(before, [("key", "earlier_key")])
    values: dict[str, ir.Value] = {}
    for name in columns:
        unknown = NO_NUMBER if joined[name].type().is_floating() else 0
        here = ibis.ifelse(joined[name] == unknown, ibis.null(joined[name].type()), joined[name])
        values[name] = ibis.coalesce(here, joined[f"earlier_{name}"], unknown).cast(joined[name].type())
    return joined.select("key", **values)


def _dense(log: ir.Table, item_ids: ir.Table | None) -> ir.Table:
    if item_ids is None:
        return log.rename(item="item_id").mutate(item=lambda table: table["item"].cast("int32"))
    # No line is lost: the dictionary holds every item of both logs.
    named = item_ids.select(raw_id="raw_id", item="id")
    return log.inner_join(named, [("item_id", "raw_id")]).drop("raw_id", "item_id")


def in_shards(lines: ir.Table, *, seed: int, shards: int) -> ir.Table:
    """Lines with ``user_key`` and ``shard``, without `USER_NUMBER`; with `USER_ORDER` no other id of a user is left."""
    # Shards are ranges of user keys: lines that are sorted by user key are sorted by shard.
    number = USER_NUMBER if USER_NUMBER in lines.columns else "user_id"
    # Where users have codes, the keys are known.
    table = lines if "user_key" in lines.columns else lines.mutate(user_key=_user_key(lines[number], seed))
    table = table.drop(USER_NUMBER) if number == USER_NUMBER else table
    table = table.mutate(shard=((table["user_key"].cast("int64") * shards).floordiv(USER_KEY_RANGE)).cast("int32"))
    return table.drop("user_id") if USER_ORDER in table.columns else table


def line_order(lines: ir.Table) -> list[str]:
    """Columns that sort lines: users together, in a shuffled order, by time, then by what makes the order unique.

    Users whose keys are equal, as those of two texts may be, are kept apart by their ids. Carried lines are
    earlier than a day's own.
    """
    first = ["user_key", "user_id", "timestamp", "item", "label"]
    if USER_ORDER in lines.columns:
        first[:2] = [USER_ORDER]
    no_keys = (*first, "user_key", "shard", "carried")
    rest = sorted(name for name in lines.columns if name not in no_keys and not name.startswith("u_"))
    return [key for key in (*first, *rest) if key in lines.columns]


def _user_key(number: ir.Value, seed: int) -> ir.Value:
    """A permutation of the residues mod the prime, x -> x^5 (5 does not divide p - 1).

    Every product fits 64 bits, so that engines without wrapping arithmetic agree. Ids that share a residue share a key;
    ``user_id`` then decides.
    """
    # The offset moves small ids away from 0, where x^5 is not yet shuffled.
    offset = (1_234_567_891 + seed * 987_654_321) % USER_KEY_RANGE
    # Below 2^31, so a product of two is below 2^62.
    x = (number % USER_KEY_RANGE + offset) % USER_KEY_RANGE
    square = x * x % USER_KEY_RANGE
    return (square * square % USER_KEY_RANGE * x % USER_KEY_RANGE).cast("int32")
