"""Small days of a chain, made by hand, and the processes that learn them.

The days follow each other by their manifests alone, and have equal dictionaries.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.runs.checkpoint import checkpoints_in
from schemas.manifest import Chain, Day, data_set_fingerprint
from schemas.online import OnlineSettings
from schemas.shards import Split, dictionary_schema
from tests.datasets import ITEMS, User, manifest_of, random_users, reseal, write_dataset, write_manifest
from tests.launcher import start_ranks
from tests.runs import Run, small_settings

FIRST_S = 20_000
"""The earliest moment of each day, in seconds: some users have all their behaviours after it, others none."""
ROWLESS = 7
"""Every item of this many has no row; every second of the others has got it on day 1."""


def row_day(item: int) -> int | None:
    """Day on which an item got its row; None: it has none."""
    return None if item % ROWLESS == 0 else item % 2


def day_users(seed: int, users: int = 40, targets: int = 9) -> list[User]:
    return random_users(users, seed, most_targets=targets, splits=(Split.TRAIN,))


def write_day(folder: Path, users: Sequence[User], former: Path | None = None) -> Path:
    """Write a day that continues ``former``; None: day 0."""
    write_dataset(folder, users)
    ids = list(range(1, ITEMS + 1))
    days = [row_day(id) for id in ids]
    schema = dictionary_schema(text=False, of_items=True, of_days=True)
    content = [ids, ids, [1] * ITEMS, [1] * ITEMS, [0] * ITEMS, *_rows(ids, days)]
    pq.write_table(pa.table(content, schema=schema), folder / "items.parquet")
    reseal(folder, "items.parquet")
    chain = Chain(first_timestamp=FIRST_S, last_timestamp=FIRST_S, rows=ITEMS, layers=())
    if former is not None:
        before = Chain.model_validate(manifest_of(former)["chain"])
        last = Day(
            fingerprint=data_set_fingerprint(former),
            first_timestamp=FIRST_S,
            last_timestamp=FIRST_S,
            sources=(),
        )
        chain = chain.model_copy(update={"days": (*before.days, last)})
    write_manifest(folder, manifest_of(folder) | {"chain": chain.model_dump(mode="json")})
    return folder


def _rows(ids: list[int], days: list[int | None]) -> tuple[list[int], list[int]]:
    return [0 if day is None else id for id, day in zip(ids, days, strict=True)], [day or 0 for day in days]


def write_chain(folder: Path, count: int, *, first: int = 0, former: Path | None = None, **of_users: int) -> list[Path]:
    """Write days ``first`` .. below a folder, each of users of its own."""
    days: list[Path] = []
    for number in range(first, first + count):
        former = write_day(folder / f"d{number}", day_users(number, **of_users), former)
        days.append(former)
    return days


def online_settings(days: Sequence[Path], *overrides: str, **of_online: Any) -> OnlineSettings:
    train = small_settings("epochs=1", "checkpoint.every=2", *overrides)
    return OnlineSettings(days=tuple(map(str, days)), train=train, **of_online)


class Online(Run):
    """An online run that has been started.

    Args:
        ranks: number of processes.
        settings: of the run.
        folder: of the run.
        follow: where further days come.
        die_at: the first rank is killed right before it changes the folder for this time; None: it counts them.
    """

    def __init__(
        self, ranks: int, settings: OnlineSettings, folder: Path, follow: Path | None = None, die_at: int | None = None
    ) -> None:
        self.folder = folder
        self._said = tempfile.TemporaryDirectory()
        self._errors = [Path(self._said.name) / f"{rank}.err" for rank in range(ranks)]
        self._changes = Path(self._said.name) / "changes"
        arguments = (self._errors, self._changes, settings, folder, follow, die_at)
        self.processes = start_ranks(ranks, _learn, *arguments)

    @property
    def changes(self) -> int:
        """How often the first rank has changed something in the folder."""
        return int(self._changes.read_text())


def _learn(
    rank: int,
    errors: Sequence[Path],
    changes: Path,
    settings: OnlineSettings,
    folder: Path,
    follow: Path | None,
    die_at: int | None,
) -> None:
    from jobs.ranks import on_all_ranks
    from pipeline.online.run import learn_days
    from pipeline.progress import log_to_standard_error

    sys.stderr = errors[rank].open("w", buffering=1)
    log_to_standard_error()
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(folder) in str(arguments[0]):
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(hook)

    def work(device: torch.device) -> None:
        learn_days(settings, folder, device, follow=follow, show=lambda line: print(line, file=sys.stderr))
        if rank == 0:
            changes.write_text(str(count[0]))

    on_all_ranks(work)


def end_state(folder: Path) -> dict[str, Any]:
    """All that an online run leaves behind, but for times: of when, and of how long."""
    state: dict[str, Any] = {}
    for day in sorted((folder / "days").iterdir()):
        for name in ("before.json", "losses.jsonl", "validations.jsonl", "test.json", "settings.yaml"):
            state[f"{day.name}/{name}"] = (day / name).read_text()
        checkpoints = checkpoints_in(day / "checkpoints") if (day / "checkpoints").is_dir() else []
        state[f"{day.name}/checkpoints"] = [
            # Of equal states the index may differ: it numbers objects by chance.
            (checkpoint.step, [file for file in checkpoint.files or () if file.path != ".metadata"])
            for checkpoint in checkpoints
        ]
        # A run that is killed when it is finished, but for the time of its end, is not opened again.
        expected = (".lock", ".metadata", ".job.json.tmp")
        hidden = [path.name for path in day.rglob(".*") if path.name not in expected]
        assert not hidden, hidden
    days = json.loads((folder / "days.json").read_text())["days"]
    state["days"] = [{name: value for name, value in day.items() if name != "seconds"} for day in days]
    state["figure"] = (folder / "days.png").is_file()
    return state
