"""`dare export`: the folder has what the checkpoint and the data set have, whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import signal
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from embeddings.models import MODELS, build_model
from pipeline.export import export as exporting
from pipeline.export.data_files import write_data_files
from pipeline.export.export import CONTENTS, SEARCHES_WITHOUT_ROWS, export_delta, export_run, served_tables
from pipeline.runs.checkpoint_files import keys_in, load_values
from pipeline.runs.delta import table_of
from pipeline.serve.dictionary import Dictionary
from pipeline.serve.rows import StoredRows, TableKey, open_tables
from pipeline.stream.data_set import DataSet
from schemas.errors import UserError
from schemas.programs import Programs
from schemas.served import RowPrecision, ServedManifest, file_of
from schemas.shards import ITEM_FEATURES
from tests.disks import mounted_disk
from tests.exported import Deltas
from tests.launcher import start, wait
from tests.runs import run_dare
from tests.toy_model import META, settings_of, sizes_of


@pytest.fixture
def programs_made_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of weights that were exported before are copied: tracing them takes seconds."""
    made = tmp_path_factory.getbasetemp() / "programs"
    write_programs = exporting.write_programs

    def write(settings: Any, sizes: Any, dense: dict[str, Tensor], folder: Path, *, compile: bool) -> Programs:
        key = hashlib.sha256(b"".join(value.numpy().tobytes() for value in dense.values())).hexdigest()
        if key not in MADE:
            (made / key).mkdir(parents=True)
            MADE[key] = write_programs(settings, sizes, dense, made / key, compile=compile)
        shutil.copytree(made / key, folder, dirs_exist_ok=True)
        return MADE[key]

    monkeypatch.setattr(exporting, "write_programs", write)


MADE: dict[str, Programs] = {}


def of_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """All tables of a checkpoint, read as a model's are, by name."""
    values = {
        str(table_of(key)): (key, torch.empty(shape))
        for key, shape in keys_in(checkpoint).items()
        if key.startswith("model.") and table_of(key) and key.endswith(".weight") and shape is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a load in a single process
        load_values(dict(values.values()), checkpoint)
    return {name: tensor for name, (_, tensor) in values.items()}


def contents(folder: Path) -> dict[str, str]:
    """The checksum of each file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path) -> dict[str, StoredRows]:
    return {rows.table.name: rows for rows in open_tables(folder, ServedManifest.read(folder)).values()}


def test_float32_is_the_checkpoint_bit_for_bit(deltas: Deltas, exported_full: Path) -> None:
    expected = of_checkpoint(deltas.full.path)
    tables = stored(exported_full)
    assert set(tables) == set(expected)
    for name, rows in tables.items():
        assert rows.table.precision == "fp32"
        assert rows.all_rows().numpy().tobytes() == expected[name].numpy().tobytes()
    opened = open_tables(exported_full, ServedManifest.read(exported_full))
    assert opened[TableKey("attention", "item", None)].table.name == "item_attention"
    assert opened[TableKey("attention", "position", "history")].table.name == "history_position_attention"


def test_the_manifest_says_what_was_exported(deltas: Deltas, exported_full: Path) -> None:
    manifest = ServedManifest.read(exported_full)
    assert (manifest.run, manifest.step) == ("run", deltas.full.step)
    assert manifest.lengths == {"history": 12}
    assert manifest.data.labels == ("click", "buy")
    assert (manifest.data.user_type, manifest.data.item_type) == ("text", "text")
    assert "scene" not in manifest.data.read
    assert manifest.dictionary("scene") is not None  # a feature of behaviours
    assert manifest.dictionary("brand") is None  # hashed
    manifest.verify(exported_full)
    listed = {file.path for file in manifest.files}
    assert listed == set(contents(exported_full)) - {"model.json"}
    assert all(any(path.match(pattern) for pattern in CONTENTS) for path in exported_full.iterdir())


@pytest.mark.usefixtures("programs_made_once")
def test_what_is_not_item_rows_stays_float32(deltas: Deltas, tmp_path: Path) -> None:
    step = str(deltas.full.step)
    manifest = export_run(deltas.run, tmp_path / "M", step, rows="bf16", attention_rows="int8", compile=False)
    expected = of_checkpoint(deltas.full.path)
    assert manifest.version != export_run(deltas.run, tmp_path / "other", step, compile=False).version
    tables = stored(tmp_path / "M")
    for name, rows in tables.items():
        value_RD = expected[name].numpy()
        found_RD = rows.all_rows().numpy()
        if name == "item_attention":
            assert rows.table.precision == "int8"
            scale_R = np.abs(value_RD).max(axis=1, keepdims=True) / np.float32(127)
            assert np.abs(found_RD - value_RD).max() <= scale_R.max() * 0.5001
            assert np.array_equal(found_RD, np.rint(value_RD / np.where(scale_R == 0, 1, scale_R)) * scale_R)
        elif name == "item_representation":
            assert rows.table.precision == "bf16"
            bits_RD = value_RD.view(np.uint32).astype(np.uint64)
            # To the nearest, of two the even: half of the last bit is added, less one where the bit is not set.
            nearest_RD = (bits_RD + 0x7FFF + ((bits_RD >> 16) & 1)) & 0xFFFF0000
            assert np.array_equal(found_RD.view(np.uint32), nearest_RD)
        else:
            assert rows.table.precision == "fp32"
            assert np.array_equal(found_RD, value_RD)


@pytest.mark.parametrize("name", MODELS)
def test_precisions_and_copies_for_the_search(name: str) -> None:
    settings = settings_of(name)
    model = build_model(settings, sizes_of(settings), META)
    specs, roles = model.tables.specs.values(), MODELS[name].roles

    def tables_of(search: str, *precisions: RowPrecision) -> dict[str, tuple[RowPrecision, bool]]:
        programs = Programs(
            features=(),
            search=search,  # type: ignore[arg-type]
            target_attention=roles.target_attention,
            history_attention=roles.history_attention,
            target_representation=roles.target_representation,
            history_representation=roles.history_representation,
            programs={},
        )
        return {each.name: (each.precision, each.search) for each in served_tables(specs, programs, *precisions)}

    both = tables_of("dot_product", "bf16", "int8")
    items = [spec.name for spec in specs if spec.feature == "item"]
    shared = roles.history_attention in roles.representation
    for item in items:
        alone = item.removeprefix("item_") not in roles.representation
        assert both[item] == ("int8" if alone else "bf16", False)
    assert [each for each, (_, search) in both.items() if search] == [f"item_{roles.history_attention}-search"] * shared
    assert all(precision == "fp32" for each, (precision, _) in both.items() if not each.startswith("item_"))
    same = tables_of("dot_product", "int8", "int8")
    assert not any(search for _, search in same.values())
    for search in SEARCHES_WITHOUT_ROWS:
        if roles.attention <= roles.representation:
            with pytest.raises(UserError, match=rf"--attention-rows int8: .* its search .{search}. reads none"):
                tables_of(search, "fp32", "int8")
        else:
            assert "int8" in {precision for precision, _ in tables_of(search, "fp32", "int8").values()}


def check_data(folder: Path, data: DataSet, read: set[str]) -> None:
    told, files = write_data_files(folder, data, read)
    manifest = data.manifest
    assert {file.path for file in files} == set(contents(folder))
    assert (told.items, told.item_rows) == (manifest.counts.items, manifest.largest_item)
    for name in ("item", *(file.path[13:-6] for file in files if file.path.startswith("dictionaries/"))):
        raw = data.names(name)
        found = Dictionary.open(folder / f"dictionaries/{name}.arrow").ids(raw)
        assert found.tolist() == [0 if value is None else id for id, value in enumerate(raw.to_pylist())]


def test_dictionaries_features_of_items_and_sets(deltas: Deltas, tmp_path: Path) -> None:
    data = DataSet.open(deltas.data)
    check_data(tmp_path, data, {"item", "category", "tags", "age"})
    assert set(contents(tmp_path)) == {
        *(f"dictionaries/{name}.arrow" for name in ("item", "category", "tags", "action", "scene", "topics")),
        *("bags-tags.arrow", "bags-topics.arrow", ITEM_FEATURES),
    }
    for name in (ITEM_FEATURES, "bags-tags.arrow"):
        assert (tmp_path / name).read_bytes() == (deltas.data / name).read_bytes()


def test_data_sets_of_an_earlier_version(few_users: Path, tmp_path: Path) -> None:
    data = DataSet.open(few_users)
    assert data.manifest.schema_version < 3
    check_data(tmp_path, data, {"category"})
    category_I = pa.ipc.open_file(tmp_path / ITEM_FEATURES).read_all()["category"].to_numpy()
    items = pa.parquet.read_table(few_users / "items.parquet")
    assert category_I[0] == 0
    assert np.array_equal(category_I[items["id"].to_numpy()], items["category"].to_numpy())


@pytest.mark.usefixtures("programs_made_once")
@pytest.mark.parametrize("rows", [("fp32", "fp32"), ("bf16", "int8")])
def test_a_delta_is_what_a_full_export_of_its_step_is(
    rows: tuple[RowPrecision, RowPrecision],
    deltas: Deltas,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tables are read in many parts.
    monkeypatch.setattr(exporting, "WINDOW_BYTES", 1)
    monkeypatch.setattr(exporting, "block_rows", lambda _: 8)
    precisions: dict[str, Any] = {"rows": rows[0], "attention_rows": rows[1]}
    full, step = tmp_path / "full", str(deltas.delta.step)
    export_run(deltas.run, full, str(deltas.full.step), compile=False, **precisions)
    before = contents(full)
    mapped = [(table, table.all_rows()) for table in stored(full).values()]
    export_run(deltas.run, tmp_path / "whole", step, compile=False, **precisions)
    if rows == ("fp32", "fp32"):
        # Programs that are made a second time are the same, to the byte.
        MADE.clear()
        shutil.rmtree(tmp_path_factory.getbasetemp() / "programs")
    export_delta(deltas.run, tmp_path / "delta", step, full, compile=False)
    assert contents(tmp_path / "delta") == contents(tmp_path / "whole")
    # What was exported before is as it was, also for who has mapped it.
    assert contents(full) == before
    assert all(torch.equal(table.all_rows(), rows_RD) for table, rows_RD in mapped)
    shared = [name for name in before if os.path.samefile(full / name, tmp_path / "delta" / name)]
    assert {"dictionaries/item.arrow", ITEM_FEATURES} <= set(shared)
    assert "rows/item_attention.rows" not in shared
    shutil.rmtree(full)
    ServedManifest.read(tmp_path / "delta").verify(tmp_path / "delta")


@pytest.mark.usefixtures("programs_made_once")
def test_a_delta_does_not_read_the_tables_of_its_full_checkpoint(
    deltas: Deltas, exported_full: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(deltas.run, run)
    for file in (run / "checkpoints" / deltas.full.path.name).glob("*.distcp"):
        file.unlink()
    manifest = export_delta(run, tmp_path / "M", str(deltas.delta.step), exported_full, compile=False)
    assert manifest.step == deltas.delta.step


def test_a_delta_of_another_checkpoint_is_refused(deltas: Deltas, exported_full: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a full checkpoint, no delta; export it without --delta"):
        export_delta(deltas.run, tmp_path / "M", str(deltas.full.step), exported_full)
    other = tmp_path / "other"
    shutil.copytree(exported_full, other)
    manifest = ServedManifest.read(other)
    manifest.model_copy(update={"record_sha256": "0" * 64}).write(other)
    with pytest.raises(UserError, match=rf"other is step {manifest.step} of run run, not the full checkpoint of step"):
        export_delta(deltas.run, tmp_path / "M", str(deltas.delta.step), other)
    assert not (tmp_path / "M").exists()


def test_the_command_line(deltas: Deltas, exported_full: Path, tmp_path: Path) -> None:
    code, output, errors = run_dare(tmp_path, "export", "--check", exported_full, "--json")
    assert (code, errors) == (0, "")
    manifest = ServedManifest.read(exported_full)
    told = json.loads(output.splitlines()[-1])
    assert (told["version"], told["step"], told["files"]) == (manifest.version, manifest.step, len(manifest.files))
    shutil.copytree(exported_full, tmp_path / "damaged")
    path = tmp_path / "damaged/rows/item_representation.rows"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    code, _, errors = run_dare(tmp_path, "export", "--check", tmp_path / "damaged")
    assert code == 1
    assert errors.splitlines() == [
        f"dare: {tmp_path}/damaged: rows/item_representation.rows differs from the checksum in model.json; export the "
        "model again"
    ]
    code, _, errors = run_dare(tmp_path, "export", "--run", deltas.run, "--out", tmp_path / "M", "--rows", "fp8")
    assert code == 2
    assert "'fp8'" in errors
    for arguments, line in (
        (["--check", tmp_path], f"{tmp_path}: no model.json: not an exported model"),
        (["--check", tmp_path, "--out", tmp_path], "--check names the exported model and stands alone"),
        (["--run", deltas.run], "--run names a run's folder and --out that of the model"),
        (
            ["--run", deltas.run, "--out", tmp_path / "M", "--delta", exported_full, "--rows", "bf16"],
            "--delta: data set and precisions are those of the full export",
        ),
    ):
        code, _, errors = run_dare(tmp_path, "export", *arguments)
        assert code == 1
        assert len(errors.splitlines()) == 1
        assert line in errors


def _export_uncompiled(arguments: list[str], output: Path, errors: Path) -> None:
    from tests.runs import _dare

    os.environ["CXX"] = "no-such-compiler"
    _dare(arguments, output, errors)


def test_a_machine_without_a_compiler_exports_by_the_command_line(deltas: Deltas, tmp_path: Path) -> None:
    arguments = ["export", "--run", str(deltas.run), "--out", str(tmp_path / "M"), "--attention-rows", "int8"]
    assert wait([start(_export_uncompiled, arguments, tmp_path / "out", tmp_path / "err")]) == [0]
    said = (tmp_path / "out").read_text().splitlines()
    assert said[-1] == "programs are not compiled: no C++ compiler is at hand"
    assert re.match(
        rf"{tmp_path}/M: exported: dare, step \d+ of run, version [0-9a-f]{{12}}; tables: \d+ in fp32", said[0]
    )
    assert ", 1 in int8 (" in said[0]
    # What takes long tells of itself more than once.
    stages = dict.fromkeys(line.rpartition(": ")[0] for line in (tmp_path / "err").read_text().splitlines())
    assert [*stages] == ["trace programs", "write rows", "write dictionaries and features of items"]


@pytest.mark.usefixtures("programs_made_once")
def test_what_does_not_fit_is_refused(deltas: Deltas, exported_full: Path, few_users: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no settings\.yaml: not the folder of a run"):
        export_run(tmp_path / "nothing", tmp_path / "M")
    (tmp_path / "run").mkdir()
    shutil.copy(deltas.run / "settings.yaml", tmp_path / "run")
    with pytest.raises(UserError, match="no checkpoint yet; train first"):
        export_run(tmp_path / "run", tmp_path / "M")
    with pytest.raises(UserError, match="no checkpoint '77'; choose best, last, or one of the steps"):
        export_run(deltas.run, tmp_path / "M", "77")
    with pytest.raises(UserError, match=r"has other dictionaries than .* was trained with"):
        export_run(deltas.run, tmp_path / "M", "last", few_users)
    with pytest.raises(UserError, match="is not empty; choose another folder or pass --overwrite"):
        export_run(deltas.run, exported_full, "last", compile=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex', which this command did not write"):
        export_run(deltas.run, tmp_path / "mine", "last", overwrite=True, compile=False)
    assert not (tmp_path / "M").exists()


@pytest.mark.usefixtures("programs_made_once")
def test_rows_that_are_not_finite_are_refused_and_nothing_stays(
    deltas: Deltas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = exporting.StoredTables.rows

    def broken(self: Any, name: str, count: int) -> Iterator[Tensor]:
        for rows_XD in rows(self, name, count):
            if name == "item_representation":
                rows_XD[3, 1] = torch.nan
            yield rows_XD

    monkeypatch.setattr(exporting.StoredTables, "rows", broken)
    with pytest.raises(UserError, match="table item_representation: row 3 is not finite"):
        export_run(deltas.run, tmp_path / "M", "last", compile=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("programs_made_once")
def test_it_takes_the_place_of_another_export_while_that_is_mapped(
    deltas: Deltas, exported_full: Path, tmp_path: Path
) -> None:
    out = tmp_path / "M"
    shutil.copytree(exported_full, out)
    mapped = stored(out)
    export_run(deltas.run, out, str(deltas.delta.step), overwrite=True, compile=False)
    assert ServedManifest.read(out).step == deltas.delta.step
    expected = of_checkpoint(deltas.full.path)
    for name, rows in mapped.items():
        assert torch.equal(rows.all_rows(), expected[name])
    assert list(tmp_path.iterdir()) == [out]


def _export(run: Path, out: Path, errors: Path, die: bool) -> None:
    import sys

    from pipeline.errors import tell
    from pipeline.export.export import export_run

    if die:
        ServedManifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    try:
        export_run(run, out, "last", compile=False)
    except (UserError, OSError) as error:
        with errors.open("w") as sys.stderr:
            sys.exit(tell(error))


@pytest.mark.usefixtures("programs_made_once")
def test_a_kill_before_the_end_leaves_no_model_and_the_next_export_cleans_up(deltas: Deltas, tmp_path: Path) -> None:
    out = tmp_path / "M"
    assert wait([start(_export, deltas.run, out, tmp_path / "errors", True)]) == [-signal.SIGKILL]
    assert not out.exists()
    assert (tmp_path / ".M.partial").exists()
    export_run(deltas.run, out, "last", compile=False)
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_full_disk_leaves_nothing(deltas: Deltas, exported_full: Path, tmp_path: Path) -> None:
    half = sum(path.stat().st_size for path in exported_full.rglob("*") if path.is_file()) // 2048
    with mounted_disk(tmp_path / "disk", half) as disk:
        assert wait([start(_export, deltas.run, disk / "M", tmp_path / "errors", False)]) == [1]
        (line,) = (tmp_path / "errors").read_text().splitlines()
        assert line.startswith(f"dare: {disk}/M")
        assert "no space left" in line
        assert not list(disk.iterdir())


def test_no_file_begins_like_a_pickle(exported_full: Path) -> None:
    for path in sorted(exported_full.rglob("*")):
        if not path.is_file() or path.suffix in (".rows", ".scale", ".crc32"):  # numbers and nothing else
            continue
        parts = {path.name: path.read_bytes()}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts |= {name: archive.read(name) for name in archive.namelist()}
        for name, content in parts.items():
            assert not name.endswith((".pkl", ".pickle")), f"{path}: {name}"
            assert not (content[:1] == b"\x80" and content[1:2] in (b"\2", b"\3", b"\4", b"\5")), f"{path}: {name}"


def test_files_lead_to_no_other_place(exported_full: Path) -> None:
    for name in ("rows/../model.json", "/etc/passwd", "other/x", "rows/..", ""):
        with pytest.raises(UserError, match="which is not a file of this folder"):
            file_of(exported_full, name)
