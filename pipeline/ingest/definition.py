"""The definition of ingest, as Ibis expressions: the same for every engine.

Events and impressions become *lines*, sorted so that each user's lines stand together and in time order.
"""

import ibis
import ibis.expr.types as ir

from schemas.shards import SPLITS, UNLABELED

USER_KEY_RANGE = 2**31 - 1
"""User keys are below this prime."""
EVENT = -2
"""The label of a line that is a behaviour."""
LATEST = 253_402_300_799
"""The last second of the year 9999."""


def with_category(log: ir.Table, kind: str, features: ir.Table | None) -> ir.Table:
    """A log with a category on each line, unknown where the log has none.

    Args:
        log: as it was read.
        kind: type of raw categories, int64 or string.
        features: (item_id, category_id), which takes the place of the log's own; of an item's several the largest
            counts.
    """
    if features is not None:
        categories = (
            features.filter(features["item_id"].notnull())
            .group_by(feature_item=features["item_id"])
            .agg(category_id=features["category_id"].max())
        )
        if "category_id" in log.columns:
            log = log.drop("category_id")
        return log.left_join(categories, [("item_id", "feature_item")]).drop("feature_item")
    return log if "category_id" in log.columns else log.mutate(category_id=ibis.null(kind))


def contradicted(features: ir.Table) -> ir.Table:
    """One row: ``items``, the number of items to which a file of items gives several categories."""
    by_item = features.group_by("item_id").agg(low=features["category_id"].min(), high=features["category_id"].max())
    return by_item.agg(items=(by_item["low"] != by_item["high"]).sum())


def faults(log: ir.Table) -> ir.Table:
    """One row: ``lines``, first and last timestamp, and how many lines have a fault that forbids going on."""
    checks = {f"null_{name}": log[name].isnull().sum() for name in ("user_id", "item_id", "timestamp")}
    checks |= {f"negative_{name}": (log[name] < 0).sum() for name in ("user_id", "item_id")}
    checks |= {f"null_{name}": log[name].isnull().sum() for name in ("label", "split") if name in log.columns}
    outside = (log["timestamp"] < 0) | (log["timestamp"] > LATEST)
    checks["impossible_timestamp"] = outside.sum()
    return log.agg(lines=log.count(), first=log["timestamp"].min(), last=log["timestamp"].max(), **checks)


def items(events: ir.Table, impressions: ir.Table | None) -> ir.Table:
    """(item_id, frequency among the events, smallest and largest category ever seen) of every item."""
    seen = events.select("item_id", "category_id", weight=ibis.literal(1, "int64"))
    if impressions is not None:
        # Items that were only shown get an id too. Their frequency is 0: negatives are drawn among what users did.
        seen = seen.union(impressions.select("item_id", "category_id", weight=ibis.literal(0, "int64")))
    return seen.group_by("item_id").agg(
        frequency=seen["weight"].sum(), low=seen["category_id"].min(), high=seen["category_id"].max()
    )


def changed_categories(events: ir.Table, impressions: ir.Table | None, items: ir.Table) -> ir.Table:
    """(item_id, last category) of the items seen with several; of equal timestamps the larger category counts."""
    seen = events.select("item_id", "category_id", "timestamp")
    if impressions is not None:
        seen = seen.union(impressions.select("item_id", "category_id", "timestamp"))
    # Most items have one category. Only the others are gone through again, by time.
    changed = items.filter(items["low"] != items["high"]).select("item_id")
    seen = seen.filter(seen["category_id"].notnull()).semi_join(changed, "item_id")
    moments = seen.group_by("item_id", "timestamp").agg(category_id=seen["category_id"].max())
    return moments.group_by("item_id").agg(category_id=moments["category_id"].argmax(moments["timestamp"]))


def vocabulary(tables: list[ir.Table], column: str) -> ir.Table:
    """Distinct values of a text column over several tables."""
    values = [table.select(value=table[column]) for table in tables]
    # A union of one table is that table, so duplicates must be removed after it.
    return ibis.union(values[0], *values[1:]).filter(lambda table: table["value"].notnull()).distinct()


def timestamp_counts(impressions: ir.Table) -> ir.Table:
    """(timestamp, number of impressions), by time."""
    return impressions.group_by("timestamp").agg(lines=impressions.count()).order_by("timestamp")


def lines(
    events: ir.Table,
    impressions: ir.Table | None,
    item_ids: ir.Table,
    vocabularies: dict[str, ir.Table],
    cuts: tuple[int, int] | None,
    *,
    seed: int,
    shards: int,
) -> ir.Table:
    """Events and impressions with dense ids, and the keys that sort them.

    Args:
        events: the log of behaviours, with raw ids.
        impressions: the log of what was shown, with raw ids; None: there is none.
        item_ids: (raw_id, id).
        vocabularies: for ``behavior`` and ``scene``, as far as the data has them, (value, id).
        cuts: timestamps at which validation and test begin, for impressions without a split of their own.
        seed: of the order of users.
        shards: their number.

    Returns:
        shard, user_key, user_id, timestamp, item, and where there are such behavior, scene, label, split, line; an
        event's label is `EVENT`.
    """
    # Both logs become lines of one table, because a target and the behaviours before it are found by one sort.
    parts = [_dense(events, item_ids, vocabularies)]
    if impressions is not None:
        nothing = ibis.literal(-1, "int64")
        parts[0] = parts[0].mutate(label=ibis.literal(EVENT, "int8"), split=nothing.cast("int8"), line=nothing)
        label: ir.Value = ibis.literal(UNLABELED, "int8")
        split: ir.Value
        if "label" in impressions.columns:
            label = impressions["label"]
        if "label" not in impressions.columns:
            # There is nothing to train on: all of them are to be scored.
            split = ibis.literal(SPLITS.index("test"), "int8")
        elif "split" in impressions.columns:
            split = impressions["split"].cases(*((name, code) for code, name in enumerate(SPLITS)))
        else:
            assert cuts is not None, "impressions without a split are cut by time"
            split = ibis.cases(
                (impressions["timestamp"] < cuts[0], 0), (impressions["timestamp"] < cuts[1], 1), else_=2
            )
        shown = impressions.mutate(label=label.cast("int8"), split=split.cast("int8"))
        if "behavior" in vocabularies:
            shown = shown.mutate(behavior=ibis.null("string"))
        parts.append(_dense(shown, item_ids, vocabularies).select(parts[0].columns))
    table = ibis.union(*parts) if len(parts) > 1 else parts[0]
    # Shards are ranges of user keys: lines that are sorted by user key are sorted by shard.
    table = table.mutate(user_key=_user_key(table["user_id"], seed))
    return table.mutate(shard=((table["user_key"].cast("int64") * shards).floordiv(USER_KEY_RANGE)).cast("int32"))


def line_order(lines: ir.Table) -> list[str]:
    """Columns that sort lines: users together, in a shuffled order, by time, then by what makes the order unique."""
    keys = ["user_key", "user_id", "timestamp", "item", "behavior", "scene", "label", "split", "line"]
    return [key for key in keys if key in lines.columns]


def _dense(table: ir.Table, item_ids: ir.Table, vocabularies: dict[str, ir.Table]) -> ir.Table:
    # No line is lost: the dictionary holds every item of both logs.
    table = table.inner_join(item_ids.select(raw_id="raw_id", item="id"), [("item_id", "raw_id")]).drop(
        "raw_id", "item_id", "category_id"
    )
    for column, ids in vocabularies.items():
        named = ids.select(vocabulary_value="value", vocabulary_id="id")
        table = table.left_join(named, [(column, "vocabulary_value")]).drop("vocabulary_value", column)
        # A null of the log matches nothing and becomes 0, the unknown.
        table = table.mutate(vocabulary_id=ibis.coalesce(table["vocabulary_id"], 0).cast("int32"))
        table = table.rename({column: "vocabulary_id"})
    return table


def _user_key(user_id: ir.Value, seed: int) -> ir.Value:
    """A permutation of the residues mod the prime, x -> x^5 (5 does not divide p - 1).

    Every product fits 64 bits, so that engines without wrapping arithmetic agree. Ids that share a residue share a key;
    ``user_id`` then decides.
    """
    # The offset moves small ids away from 0, where x^5 is not yet shuffled.
    offset = (1_234_567_891 + seed * 987_654_321) % USER_KEY_RANGE
    # Below 2^31, so a product of two is below 2^62.
    x = (user_id % USER_KEY_RANGE + offset) % USER_KEY_RANGE
    square = x * x % USER_KEY_RANGE
    return (square * square % USER_KEY_RANGE * x % USER_KEY_RANGE).cast("int32")
