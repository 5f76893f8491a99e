"""Generated data: what is planted can be measured, and is the same however it is cut, counted or written."""

import errno
import json
import sys
from pathlib import Path

import numba
import numpy as np
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from jobs.app import app
from jobs.cli import main
from pipeline.hashing import mix
from pipeline.synth.catalog import draw_past, uniform
from pipeline.synth.files import synthesize
from pipeline.synth.histories import BEHAVIORS, Histories, HistoryGenerator
from pipeline.synth.impressions import draw_impressions
from schemas.errors import UserError
from schemas.settings import load_settings
from schemas.storage import sha256
from schemas.synth import DAY, SynthSettings
from tests.synth_truth import GroundTruth

SMALL = SynthSettings(events=20_000, items=2_000, categories=50, max_length=2_000, impressions_per_user=5)


@pytest.fixture(scope="module")
def many() -> tuple[SynthSettings, Histories]:
    settings = SynthSettings(events=1_000_000, items=50_000, categories=200)
    generator = HistoryGenerator(settings)
    return settings, generator.histories(np.arange(1, generator.count()[0] + 1))


def user_of(histories: Histories, user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    span = slice(histories.start_U1[user], histories.start_U1[user + 1])
    return histories.item_id_E[span], histories.category_id_E[span], histories.timestamp_E[span]


def test_a_user_is_the_same_whoever_else_is_made():
    generator = HistoryGenerator(SMALL)
    users, events = generator.count()
    together = generator.histories(np.arange(1, users + 1))
    assert len(together.item_id_E) == events >= SMALL.events > events - SMALL.max_length
    for run in (1, 777, 10**9):
        parts = list(generator.stream(users, run))
        for name in set(Histories._fields) - {"start_U1"}:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(together, name))
    assert max(len(part.user_id_U) for part in generator.stream(users, 1)) == 1
    more = HistoryGenerator(SMALL.model_copy(update={"events": 10 * SMALL.events}))
    alone = more.histories(np.array([users]))
    for mine, theirs in zip(user_of(alone, 0), user_of(together, users - 1), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    other = HistoryGenerator(SMALL.model_copy(update={"seed": 1})).histories(np.array([users]))
    assert not np.array_equal(other.timestamp_E[:50], alone.timestamp_E[:50])


def test_compiled_random_numbers_are_those_of_ingest():
    keys = mix(np.arange(100), 3)
    expected = (mix(keys + np.uint64(17), 5) >> np.uint64(11)) * 2.0**-53
    draw = numba.njit(lambda key: uniform(key, 17, 5))
    assert [draw(key) for key in keys] == expected.tolist()


def test_past_behaviours_are_drawn_by_weight():
    decay = np.array([1.0, 0.5, 0.9, 1.0, 0.2, 0.7])
    weight = np.append(np.cumprod(decay[:0:-1])[::-1], 1.0)
    draw = numba.njit(lambda ticket: draw_past(decay, 6, ticket))
    tickets = (np.arange(100_000) + 0.5) / 100_000 * weight.sum()
    share = np.bincount([draw(ticket) for ticket in tickets], minlength=6) / 100_000
    np.testing.assert_allclose(share, weight / weight.sum(), atol=1e-4)
    assert draw(weight.sum() * 1.001) == 0, "rounding never leads before the first"


def test_lengths_have_a_heavy_tail():
    settings = SynthSettings(events=1)
    lengths = HistoryGenerator(settings).lengths(np.arange(1, 200_001))
    assert lengths.min() == settings.min_length
    assert 9_000 < lengths.max() <= settings.max_length
    for length in (100, 400, 1600):
        # The law, cut at the longest.
        tail, low, high = settings.length_tail, settings.min_length, settings.max_length + 1
        expected = (length**-tail - high**-tail) / (low**-tail - high**-tail)
        assert np.mean(lengths >= length) == pytest.approx(expected, rel=0.05)
    long = HistoryGenerator(settings.model_copy(update={"min_length": 12_000, "max_length": 15_000}))
    history = long.histories(np.array([1]))
    assert len(history.item_id_E) >= 12_000


def test_times_are_sessions_within_the_days(many):
    settings, histories = many
    gaps = np.diff(histories.timestamp_E)
    inside = np.ones(len(gaps), bool)
    inside[histories.start_U1[1:-1] - 1] = False
    assert gaps[inside].min() >= 1
    assert histories.timestamp_E.min() >= settings.first_timestamp
    assert histories.timestamp_E.max() < settings.first_timestamp + settings.days * DAY
    assert np.mean(gaps[inside]) > 10 * np.median(gaps[inside])


@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
def test_items_follow_zipf(power):
    settings = SynthSettings(events=500_000, items=20_000, categories=100, item_zipf=power)
    generator, truth = HistoryGenerator(settings), GroundTruth(settings)
    frequency = np.zeros(settings.items + 1, np.int64)
    for histories in generator.stream(generator.count()[0]):
        frequency += np.bincount(histories.item_id_E, minlength=settings.items + 1)
        np.testing.assert_array_equal(truth.category_of_item(histories.item_id_E), histories.category_id_E)
    falling = np.sort(frequency)[::-1][:1000]
    slope = np.polyfit(np.log(np.arange(4, 1001)), np.log(falling[3:]), 1)[0]
    assert slope == pytest.approx(-power, abs=0.1)


def test_interests_drift(many):
    settings, histories = many
    length = np.diff(histories.start_U1)
    similarity = np.zeros((2, 0))
    for user in np.argsort(length)[-30:]:
        _, category, timestamp = user_of(histories, user)
        day = (timestamp - settings.first_timestamp) // DAY

        def share(first: int, category=category, day=day) -> np.ndarray:
            count = np.bincount(category[(day >= first) & (day < first + 15)], minlength=settings.categories + 1)
            return count / max(np.linalg.norm(count), 1)

        near, far = share(60) @ share(75), share(60) @ share(150)
        similarity = np.append(similarity, [[near], [far]], axis=1)
    near, far = similarity.mean(axis=1)
    assert near > far + 0.1


def test_behaviours_follow_the_stated_chance(many):
    """Calibration of every category's chance at a step, and of the draw that a model would have to learn."""
    settings, histories = many
    truth = GroundTruth(settings)
    all_categories = np.arange(1, settings.categories + 1)
    expected, observed = np.zeros(20), np.zeros(20)
    for user in range(0, 600):
        _, category, timestamp = user_of(histories, user)
        step = len(category) - 1
        chance = truth.category_probability(
            category, timestamp, all_categories, np.full(settings.categories, timestamp[step])
        )
        assert chance.sum() == pytest.approx(1)
        band = np.minimum((chance * 20).astype(int), 19)
        expected += np.bincount(band, chance, 20)
        observed[band[category[step] - 1]] += 1
    deviation = np.abs(observed - expected) / np.sqrt(np.maximum(expected, 1))
    assert deviation.max() < 4
    assert observed[4:].sum() > 100, "relevance decides many of the steps"


def test_recent_behaviours_of_the_category_are_what_counts(many):
    """The category of a behaviour is more often that of a recent one than that of an old one, or chance's."""
    settings, histories = many
    truth = GroundTruth(settings)
    popularity = truth.category_popularity(histories.category_id_E)
    by_age = {}
    for lag in (1, 10, 100, 1000):
        same, chance, steps = 0, 0.0, 0
        for user in np.flatnonzero(np.diff(histories.start_U1) > 2000):
            _, category, _ = user_of(histories, user)
            same += np.sum(category[lag:] == category[:-lag])
            chance += popularity[histories.start_U1[user] : histories.start_U1[user + 1] - lag].sum()
            steps += len(category) - lag
        by_age[lag] = same / chance
    assert by_age[1] > by_age[100] > by_age[1000]
    assert by_age[1] > 2


def test_history_before_the_target_alone_is_relevant():
    truth = GroundTruth(SMALL)
    category, timestamp = np.array([7, 8, 7, 7]), np.array([0, 5, 10, 20]) * DAY
    target_timestamp = np.array([20, 10, 0]) * DAY
    relevance = truth.relevance(category, timestamp, np.array([7, 7, 7]), target_timestamp)
    weight = np.exp(-np.array([20, 15, 10]) / SMALL.decay_days)
    np.testing.assert_allclose(relevance[0], [*(weight / weight.sum() * [1, 0, 1]), 0])
    np.testing.assert_allclose(relevance[1], [weight[0] / weight[:2].sum(), 0, 0, 0])
    assert not relevance[2].any()
    assert truth.click_probability(category, timestamp, np.array([7]), np.array([0])) == SMALL.click_floor
    assert truth.category_probability(category, timestamp, np.array([7]), np.array([0])) == truth.category_popularity(
        np.array([7])
    )
    # Ages that underflow together still share one.
    far = truth.relevance(np.array([7, 7]), np.array([0, 1]), np.array([7]), np.array([10**9]))
    assert far.sum() == pytest.approx(1)


def test_labels_follow_the_stated_chance(many):
    settings, histories = many
    generator, truth = HistoryGenerator(settings), GroundTruth(settings)
    shown = draw_impressions(generator, histories)
    for user in (0, 1, 2, int(np.argmax(np.diff(histories.start_U1)))):
        _, category, timestamp = user_of(histories, user)
        assert shown.timestamp_UJ[user].min() > timestamp[0]
        stated = truth.click_probability(category, timestamp, shown.category_id_UJ[user], shown.timestamp_UJ[user])
        np.testing.assert_allclose(shown.click_probability_UJ[user], stated, rtol=1e-9)
    np.testing.assert_array_equal(truth.category_of_item(shown.item_id_UJ), shown.category_id_UJ)
    chance, label = shown.click_probability_UJ.ravel(), shown.label_UJ.ravel()
    band = (chance * 10).astype(int)
    for number in np.unique(band):
        chosen = band == number
        error = label[chosen].mean() - chance[chosen].mean()
        assert abs(error) < 4 * 0.5 / np.sqrt(chosen.sum()), number
    assert roc_auc_score(label, chance) > 0.75


def test_files_are_the_same_each_time_and_read_back(tmp_path):
    settings = SMALL.model_copy(update={"behavior": True, "scene": True})
    first = synthesize(settings, tmp_path / "a.parquet", tmp_path / "ai.parquet")
    synthesize(settings, tmp_path / "b.parquet", tmp_path / "bi.parquet")
    synthesize(SMALL, tmp_path / "a.csv")
    synthesize(SMALL, tmp_path / "b.csv")
    for one, two in (("a.parquet", "b.parquet"), ("ai.parquet", "bi.parquet"), ("a.csv", "b.csv")):
        assert sha256(tmp_path / one) == sha256(tmp_path / two)
    events = pq.read_table(tmp_path / "a.parquet")
    assert events.column_names == ["user_id", "item_id", "category_id", "timestamp", "behavior", "scene"]
    csv = pcsv.read_csv(
        tmp_path / "a.csv",
        pcsv.ReadOptions(column_names=["user_id", "item_id", "category_id", "behavior", "timestamp"]),
    )
    for name in csv.column_names:
        assert csv[name].to_pylist() == events[name].to_pylist(), name
    assert set(csv["behavior"].to_pylist()) == set(BEHAVIORS)
    generator = HistoryGenerator(settings)
    histories = generator.histories(np.arange(1, generator.count()[0] + 1))
    np.testing.assert_array_equal(events["item_id"], histories.item_id_E)
    np.testing.assert_array_equal(events["user_id"], histories.user_id_E())
    impressions = pq.read_table(tmp_path / "ai.parquet")
    assert len(impressions) == first.impressions == 5 * first.users
    auc = roc_auc_score(impressions["label"], impressions["click_probability"])
    assert first.bayes_auc == pytest.approx(auc, abs=0.05)
    names = {"a.parquet", "ai.parquet", "b.parquet", "bi.parquet", "a.csv", "b.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_runs_of_users_bound_the_memory():
    """What is held at once is a run, whose size does not grow with the number of events."""
    sizes = {}
    for events in (300_000, 1_200_000):
        generator = HistoryGenerator(SynthSettings(events=events, items=1_000, categories=10))
        users, _ = generator.count()
        sizes[events] = max(len(part.item_id_E) for part in generator.stream(users, 50_000))
    assert max(sizes.values()) <= 50_000 + SMALL.max_length + 10_000


@pytest.mark.parametrize(
    ("out", "impressions", "settings", "says"),
    [
        ("there.parquet", None, {}, "there.parquet is there already; give --overwrite"),
        ("new.parquet", "there.parquet", {}, "there.parquet is there already"),
        ("new.json", None, {}, "ends in .parquet or .csv"),
        ("new.parquet", "new.csv", {}, "ends in .parquet"),
        ("new.parquet", "new.parquet", {}, "a file each"),
        ("folder.csv", None, {}, "is a folder"),
        ("new.csv", None, {"scene": True}, "has no scene"),
    ],
)
def test_refuses(tmp_path, out, impressions, settings, says):
    (tmp_path / "there.parquet").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=says):
        synthesize(SMALL.model_copy(update=settings), tmp_path / out, impressions and tmp_path / impressions)
    assert (tmp_path / "there.parquet").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("min_length=20000", "min_length 20000 is above max_length 10000"),
        ("categories=200000", "200000 categories need at least as many items"),
        ("click_floor=0.9", "click_floor 0.9 is above click_ceiling 0.8"),
        ("max_length=10000000", "do not fit into days=180"),
        ("loyalty=1", "loyalty"),
        ("evnets=3", "evnets: unknown key; allowed here: .*events"),
    ],
)
def test_impossible_settings(override, says):
    with pytest.raises(ValueError, match=says):
        load_settings(SynthSettings, overrides=[override])


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "events.csv").write_text("mine")
    real, calls = HistoryGenerator.histories, []

    def fails_late(self, user_id_U):
        calls.append(user_id_U)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, user_id_U)

    monkeypatch.setattr(HistoryGenerator, "histories", fails_late)
    settings = SMALL.model_copy(update={"events": 1_000_000})
    with pytest.raises(UserError, match="no space left on the disk"):
        synthesize(settings, tmp_path / "events.csv", tmp_path / "shown.parquet", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["events.csv"]
    assert (tmp_path / "events.csv").read_text() == "mine"


def test_command(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "new" / "events.csv"
    app(["synth", "--out", str(out), "--json", "events=5000", "items=500", "categories=5"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["events"] == len(out.read_text().splitlines()) >= 5000
    assert report["bytes"] == out.stat().st_size
    monkeypatch.setattr(sys, "argv", ["dare", "synth", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"^dare: .*events.csv is there already"):
        main()
