"""What a store has of a user is what a request for the same model would say."""

import json
from pathlib import Path

from pipeline.export.data_files import write_data_files
from pipeline.ingest.recorded import settings_of
from pipeline.serve.columns import RequestColumns
from pipeline.serve.store import open_store
from pipeline.serve.stored_columns import StoredColumns
from pipeline.stream.data_set import DataSet
from tests.data.conftest import Dare
from tests.serve.test_store_commands import SETTINGS, lines, write


def test_a_history_has_the_columns_of_a_request(dare: Dare, tmp_path: Path) -> None:
    (tmp_path / "log.yaml").write_text(json.dumps(SETTINGS))
    log, data, model = write(tmp_path / "log.parquet", lines(150, 1)), tmp_path / "data", tmp_path / "model"
    options = ("split.min_behaviors=1", "split.negatives=0", "--config", tmp_path / "log.yaml")
    assert dare("prepare", "--out", data, "--events", log, *options)[0] == 0
    opened = DataSet.open(data)
    model.mkdir()
    served, _ = write_data_files(model, opened, {feature.name for feature in opened.manifest.declared})
    # Features of items are the model's own matter; a request may bring those of items that it does not know.
    of_items = {feature.name for feature in opened.manifest.features_of("item")}
    history = RequestColumns.of(served).history
    wanted = {column.name: column.of for column in history if column.used and column.feature not in of_items}
    columns = StoredColumns.of_settings(settings_of(served.settings, served.labels))
    assert {columns.user, *columns.names} >= wanted.keys()
    assert {name for name, of in wanted.items() if of == "user"} == {column.name for column in columns.users}
    assert dare("store", "load", "--store", tmp_path / "store", "--events", log, "--data", data)[0] == 0
    with open_store(str(tmp_path / "store"), columns) as store:
        assert set(store.history("ü1")) == {columns.user, *columns.names}
