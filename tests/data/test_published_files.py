"""Files as they are published: MovieLens's own, delimiters of several characters, Latin-1, and hours."""

import io
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.prepare import prepare
from pipeline.ingest.text import SEPARATOR, PlainText
from pipeline.ingest.times import clock
from schemas.errors import UserError
from schemas.manifest import Manifest
from schemas.prepare import PRESETS, PrepareSettings
from schemas.settings import load_settings

TITLES = ["Misérables, Les (1995)", 'La "Dolce" Vita: 8½ (1960)', "Heat (1995)"]
GENRES = ["Drama|Musical", "Drama", "Action|Crime|Drama"]


class Blocks(io.BytesIO):
    """Bytes that come in blocks of some sizes, whatever was asked for."""

    def __init__(self, content: bytes, sizes: list[int]) -> None:
        super().__init__(content)
        self._sizes = sizes

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self._sizes.pop() if self._sizes else size)


@given(
    lines=st.lists(st.lists(st.text(st.characters(codec="latin-1", exclude_characters="\x1f\n")), min_size=1)),
    delimiter=st.sampled_from(["::", "|", "||", ":::", "-:-"]),
    sizes=st.lists(st.integers(1, 7)),
)
def test_text_is_the_same_however_it_is_cut(lines: list[list[str]], delimiter: str, sizes: list[int]) -> None:
    text = "\n".join(delimiter.join(line) for line in lines)
    stream = PlainText(Blocks(text.encode("latin-1"), sizes), "latin-1", delimiter, "a.dat")
    parts = []
    while part := stream.read(5):
        parts.append(part)
    assert b"".join(parts).decode() == text.replace(delimiter, SEPARATOR)


def movielens(folder: Path) -> None:
    """Three files in MovieLens-1M's form: no header, two colons, several genres, titles in Latin-1."""
    folder.mkdir()
    movies = [
        f"{number}::{title}::{genres}" for number, (title, genres) in enumerate(zip(TITLES, GENRES, strict=True), 1)
    ]
    movies += [f"{number}::Film {number} (2000)::Comedy" for number in range(4, 41)]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    films = [(user, movie) for user in (1, 2) for movie in range(4 * user - 3, 4 * user + 27)]
    rated = [f"{user}::{movie}::{movie % 5 + 1}::{978300000 + 60 * movie}\n" for user, movie in films]
    (folder / "ratings.dat").write_text("".join(rated))


def movielens_settings(folder: Path) -> PrepareSettings:
    values = {"events": {"files": [str(folder / "ratings.dat")]}}
    return load_settings(PrepareSettings, [PRESETS["movielens"]], [], values)


def test_movielens_as_it_is_published(tmp_path: Path) -> None:
    movielens(tmp_path / "ml")
    prepare(movielens_settings(tmp_path / "ml"), tmp_path / "data")
    manifest = Manifest.read(tmp_path / "data")
    features = {feature.name: feature for feature in manifest.declared}
    assert (features["genres"].of, features["genres"].kind, features["genres"].missing) == ("item", "ids", 0)
    assert manifest.counts.behaviors == 60
    items = pq.read_table(tmp_path / "data/items.parquet").to_pylist()
    genres = {row["id"]: row["raw_id"] for row in pq.read_table(tmp_path / "data/feature-genres.parquet").to_pylist()}
    assert sorted(genres.values()) == ["Action", "Comedy", "Crime", "Drama", "Musical"]
    bags = pyarrow.ipc.open_file(tmp_path / "data/bags-genres.arrow").read_all()["ids"].to_pylist()
    of_item = pyarrow.ipc.open_file(tmp_path / "data/item_features.arrow").read_all()["genres"].to_pylist()
    for row in items:
        wanted = GENRES[row["raw_id"] - 1] if row["raw_id"] <= 3 else "Comedy"
        assert sorted(genres[id] for id in bags[of_item[row["id"]]]) == sorted(wanted.split("|"))
    users = pq.read_table(tmp_path / "data/shard-00000.parquet").to_pylist()
    ages = {row["id"]: row["raw_id"] for row in pq.read_table(tmp_path / "data/feature-age.parquet").to_pylist()}
    assert {row["user_id"]: ages[row["user_age"]] for row in users} == {1: 1, 2: 56}


def test_a_separator_within_a_value_is_refused(tmp_path: Path) -> None:
    movielens(tmp_path / "ml")
    with (tmp_path / "ml/ratings.dat").open("a") as file:
        file.write(f"1::2{SEPARATOR}::3::978300000\n")
    with pytest.raises(UserError, match=r"ratings.dat: a value has the control character 0x1f in it"):
        prepare(movielens_settings(tmp_path / "ml"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@given(seconds=st.integers(0, 2_000_000_000), zone=st.sampled_from([None, "+08:00", "-03:30", "America/New_York"]))
def test_hours_and_weekdays_are_those_of_the_logs_clock(seconds: int, zone: str | None) -> None:
    here = datetime.fromtimestamp(seconds, UTC)
    if zone is not None:
        offset = zone if zone[0] in "+-" else None
        here = here.astimezone(
            datetime.fromisoformat(f"2000-01-01T00:00:00{offset}").tzinfo if offset else ZoneInfo(zone)
        )
    values = pa.array([seconds, None], pa.int64())
    assert clock(values, zone, "hour").to_pylist() == [here.hour, None]
    assert clock(values, zone, "weekday").to_pylist() == [here.weekday(), None]
