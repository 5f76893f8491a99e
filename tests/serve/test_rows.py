"""Rows of tables: written, mapped, verified as they are read."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.export.rows import in_precision, write_rows
from pipeline.serve.rows import StoredRows, open_tables
from schemas.errors import UserError
from schemas.model import ModelSettings
from schemas.programs import Programs
from schemas.served import RowPrecision, ServedData, ServedManifest, ServedStream, ServedTable

ROWS, DIM, BLOCK = 37, 8, 4


def table_of(precision: RowPrecision, rows: int = ROWS) -> ServedTable:
    return ServedTable(
        name="item_attention",
        kind="inherent",
        set="attention",
        feature="item",
        sequence=None,
        rows=rows,
        dim=DIM,
        precision=precision,
        block_rows=BLOCK,
    )


def export(folder: Path, precision: RowPrecision, rows_RD: Tensor) -> ServedManifest:
    """A folder of one table and its manifest."""
    table = table_of(precision, len(rows_RD))
    files = write_rows(folder, table, (in_precision(rows, precision) for rows in rows_RD.split(2 * BLOCK)))
    manifest = ServedManifest(
        version="0",
        run="run",
        step=1,
        record_sha256="",
        rows=precision,
        attention_rows=precision,
        model=ModelSettings(),
        stream=ServedStream(history_length=9, sequences=None),
        data=ServedData(
            fingerprint="",
            schema_version=4,
            features=(),
            read=(),
            labels=("label",),
            user_type="integer",
            item_type="integer",
            items=len(rows_RD) - 1,
            item_rows=len(rows_RD) - 1,
            items_hashed=False,
            placed_items=False,
            settings={},
        ),
        tables=(table,),
        programs=Programs(
            features=(),
            search="none",
            target_attention="attention",
            history_attention="attention",
            target_representation="attention",
            history_representation="attention",
            programs={},
        ),
        files=tuple(files),
    )
    manifest.write(folder)
    return manifest


def opened(folder: Path) -> StoredRows:
    (rows,) = open_tables(folder, ServedManifest.read(folder)).values()
    return rows


def drawn(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, rows)[:, None]


def test_fp32_is_bit_for_bit(tmp_path: Path) -> None:
    rows_RD = drawn()
    rows_RD[3] = -0.0
    export(tmp_path, "fp32", rows_RD)
    stored = opened(tmp_path)
    assert stored.scale_R is None
    assert torch.equal(stored.table_RD.view(torch.int32), rows_RD.view(torch.int32))
    id_X = torch.tensor([[0, 36, 3], [5, 5, 0]], dtype=torch.int32)
    assert torch.equal(stored.rows(id_X), rows_RD[id_X])
    assert stored.rows(torch.zeros(0, dtype=torch.int64)).shape == (0, DIM)


def test_bf16_is_the_nearest_and_of_two_the_even(tmp_path: Path) -> None:
    rows_RD = drawn()
    # Between 1 and the next one, 1 + 2^-7: in the middle, below it, above it; and a middle whose even neighbour is up.
    rows_RD[1, :4] = torch.tensor([1 + 2**-8, 1 + 2**-8 - 2**-20, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8])
    export(tmp_path, "bf16", rows_RD)
    rows = opened(tmp_path).rows(torch.arange(ROWS))
    assert rows[1, :4].tolist() == [1, 1, 1 + 2**-7, 1 + 2**-6]
    # The lower 16 bits of a float32 are what bf16 has not; half of the last bit that it has is the farthest away.
    assert bool(((rows - rows_RD).abs() <= rows_RD.abs() * 2**-8).all())
    assert torch.equal(rows.view(torch.int32) & 0xFFFF, torch.zeros(ROWS, DIM, dtype=torch.int32))


def test_int8_has_a_scale_a_row_and_zeros_stay_zeros(tmp_path: Path) -> None:
    rows_RD = drawn()
    rows_RD[7] = 0
    export(tmp_path, "int8", rows_RD)
    stored = opened(tmp_path)
    assert stored.table_RD.dtype == torch.int8
    assert stored.scale_R is not None
    largest_R = rows_RD.abs().amax(dim=1)
    assert torch.equal(stored.scale_R, largest_R / 127)
    assert torch.equal(stored.table_RD.abs().amax(dim=1), torch.where(largest_R > 0, 127, 0).to(torch.int8))
    rows = stored.rows(torch.arange(ROWS))
    assert torch.equal(rows, stored.table_RD.float() * stored.scale_R[:, None])
    assert bool(((rows - rows_RD).abs() <= stored.scale_R[:, None] * 0.50001).all())
    assert not rows[7].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused(precision: RowPrecision, value: float, tmp_path: Path) -> None:
    rows_RD = drawn()
    rows_RD[22, 3] = value
    with pytest.raises(UserError, match="table item_attention: row 22 is not finite"):
        export(tmp_path, precision, rows_RD)


def test_a_float_beyond_bf16_is_refused(tmp_path: Path) -> None:
    rows_RD = drawn()
    rows_RD[2, 0] = torch.finfo(torch.float32).max
    with pytest.raises(UserError, match="row 2 is not finite in bf16"):
        export(tmp_path, "bf16", rows_RD)


@pytest.mark.parametrize(("precision", "file"), [("fp32", "rows"), ("int8", "rows"), ("int8", "scale")])
def test_a_damaged_block_is_found_when_it_is_read_and_no_other_one(
    precision: RowPrecision, file: str, tmp_path: Path
) -> None:
    rows_RD = drawn()
    manifest = export(tmp_path, precision, rows_RD)
    path = tmp_path / f"rows/item_attention.{file}"
    content = bytearray(path.read_bytes())
    content[len(content) * 17 // ROWS] ^= 1  # of row 17, in the block of rows 16 to 19
    path.write_bytes(content)
    stored = opened(tmp_path)
    stored.rows(torch.tensor([15, 20, 36]))
    for _ in range(2):  # what was found damaged stays so
        with pytest.raises(UserError, match=r"item_attention\.rows: rows 16 to 19 differ from their checksum"):
            stored.rows(torch.tensor([3, 19]))
    with pytest.raises(UserError, match="rows 16 to 19"):
        stored.verify()
    with pytest.raises(UserError, match=rf"rows/item_attention\.{file} differs from the checksum in model\.json"):
        manifest.verify(tmp_path)


def test_a_block_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path, "fp32", drawn())
    stored, blocks = opened(tmp_path), list[int]()
    verify = stored._verify_block

    def counted(block: int) -> None:
        blocks.append(block)
        verify(block)

    monkeypatch.setattr(stored, "_verify_block", counted)
    stored.rows(torch.tensor([1, 2, 9]))
    stored.rows(torch.tensor([3, 11, 12]))
    assert blocks == [0, 2, 3]
    stored.verify()
    stored.rows(torch.arange(ROWS))
    assert sorted(blocks) == list(range(10))


def test_ids_outside_of_the_table_are_a_fault_of_ours(tmp_path: Path) -> None:
    export(tmp_path, "fp32", drawn())
    stored = opened(tmp_path)
    stored.verify()
    for id in (-1, ROWS):
        with pytest.raises(AssertionError):
            stored.rows(torch.tensor([0, id]))


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    rows_RD = drawn(4001)
    export(tmp_path, "fp32", rows_RD)
    stored, wrong = opened(tmp_path), list[int]()

    def read(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            id_X = torch.randint(4001, (300,), generator=generator)
            if not torch.equal(stored.rows(id_X), rows_RD[id_X]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_map_outlives_its_file_and_whoever_opened_it(tmp_path: Path) -> None:
    rows_RD = drawn()
    export(tmp_path, "fp32", rows_RD)
    table_RD = opened(tmp_path).table_RD
    (tmp_path / "rows/item_attention.rows").unlink()
    assert torch.equal(table_RD, rows_RD)


def test_a_manifest_that_does_not_fit_its_files(tmp_path: Path) -> None:
    manifest = export(tmp_path, "fp32", drawn())
    other = manifest.model_copy(update={"tables": (table_of("fp32", ROWS + 1),)})
    other.write(tmp_path)
    with pytest.raises(UserError, match=r"files: rows/item_attention\.rows must be 1216 bytes, by its table"):
        ServedManifest.read(tmp_path)
    outside = manifest.files[0].model_copy(update={"path": "../secret"})
    manifest.model_copy(update={"files": (*manifest.files, outside)}).write(tmp_path)
    with pytest.raises(UserError, match=r"files names '\.\./secret', which is not a file of this folder"):
        ServedManifest.read(tmp_path)
    manifest.model_copy(update={"format_version": 2}).write(tmp_path)
    with pytest.raises(UserError, match=r"model\.json: format version 2, this program reads 1"):
        ServedManifest.read(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model\.json: not an exported model"):
        ServedManifest.read(tmp_path)
