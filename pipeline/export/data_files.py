"""What an exported model has of the data set: how raw values become ids, and what belongs to items.

I = items by dense id, the unknown 0 included.
"""

import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.serve.dictionary import write_dictionary
from pipeline.stream.data_set import DataSet
from schemas.manifest import File
from schemas.served import ServedData, dictionary_file
from schemas.shards import ITEM_FEATURES, RawType
from schemas.storage import sha256


def write_data_files(folder: Path, data: DataSet, read: Collection[str]) -> tuple[ServedData, list[File]]:
    """Write dictionaries, features of items, and sets of ids.

    Args:
        folder: of the exported model.
        data: the data set that the model was trained on.
        read: names of the features that the model reads, or that its sequences are cut by.

    Returns:
        What the manifest says of the data set, and the records of the files.

    Raises:
        UserError: a file of the data set is damaged.
        OSError: the disk is full or broken.
    """
    manifest = data.manifest
    (folder / dictionary_file("item")).parent.mkdir(exist_ok=True)
    # Behaviours of one moment are in the order of all their features, so that these are needed whoever reads them.
    needed = {*read, *(each.name for each in manifest.declared if each.of == "behavior")}
    # Buckets of hashes have no raw ids.
    hashed = manifest.counts.items_collided is not None
    numbered = [each.name for each in manifest.declared if each.name in needed and each.encoding == "dictionary"]
    types: dict[str, RawType] = {}
    names = []
    for name in [*([] if hashed else ["item"]), *numbered]:
        raw = data.names(name)
        known = raw.is_valid().to_numpy(zero_copy_only=False)
        write_dictionary(
            folder / dictionary_file(name), raw.filter(pa.array(known)), np.flatnonzero(known).astype(np.int32)
        )
        types[name] = "text" if raw.type == pa.string() else "integer"
        names.append(dictionary_file(name))
    copied = [each.bag_file for each in manifest.declared if each.name in needed and each.bag_file is not None]
    if manifest.schema_version < 3:
        _write_categories(
            folder / ITEM_FEATURES, manifest.verified(data.folder, "items.parquet"), manifest.counts.items
        )
        names.append(ITEM_FEATURES)
    elif any(file.path == ITEM_FEATURES for file in manifest.files):
        copied.append(ITEM_FEATURES)
    for name in copied:
        shutil.copyfile(manifest.verified(data.folder, name), folder / name)
    files = [
        File(path=name, bytes=(folder / name).stat().st_size, sha256=sha256(folder / name))
        for name in [*names, *copied]
    ]
    served = ServedData(
        fingerprint=data.fingerprint,
        schema_version=manifest.schema_version,
        # The first versions did not say what raw categories are.
        features=tuple(
            each.model_copy(update={"type": each.type or types.get(each.name)}) for each in manifest.declared
        ),
        read=tuple(each.name for each in manifest.declared if each.name in read),
        labels=manifest.labels,
        user_type=manifest.user_type,
        item_type=types.get("item", manifest.item_type),
        items=manifest.counts.items,
        item_rows=manifest.largest_item,
        items_hashed=hashed,
        placed_items=manifest.placed_items,
        settings=manifest.settings,
    )
    return served, files


def _write_categories(path: Path, items: Path, count: int) -> None:
    """Write features of items, of a data set of versions 1 and 2: their one feature stands in their dictionary."""
    table = pq.read_table(items, columns=["id", "category"])
    category_I = np.zeros(count + 1, np.int32)
    category_I[table["id"].to_numpy()] = table["category"].to_numpy()
    features = pa.table({"category": category_I}, pa.schema([pa.field("category", pa.int32(), nullable=False)]))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, features.schema) as writer:
        writer.write_table(features)
