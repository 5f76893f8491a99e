"""Predictors answer as the trained model does, from raw lines, in any thread, and without the training program."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.distributed.process_group import process_group
from pipeline.evaluate.score import score_run
from pipeline.export.export import export_run
from pipeline.serve.predictor import Predictor
from pipeline.serve.store import open_store
from pipeline.serve.stored_columns import StoredColumns
from schemas.errors import RequestError, UserError
from tests.served import USERS, Exported, RawLog, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def predictor(exported: Exported) -> Predictor:
    return Predictor.load(exported.folder)


@pytest.fixture
def alone() -> Iterator[None]:
    with process_group(CPU):
        yield


def scored_lines(run: Path, log: RawLog, out: Path, which: str = "last") -> pd.DataFrame:
    """The impressions of the test, with what `dare score` says of them."""
    score_run(run, "test", which, None, out, CPU, overwrite=False, impressions=(str(log.shown_file),))
    lines = pq.read_table(next(out.glob("impressions-*.parquet"))).to_pandas()
    lines["row"] = np.arange(len(lines))
    return lines.dropna(subset=["score"])


def compare(predictor: Predictor, lines: pd.DataFrame, log: RawLog, columns: list[str]) -> None:
    """Compare every line of the test with the answer to its user's raw events."""
    assert len(lines) > 200
    for user, of_user in lines.groupby("customer"):
        candidates = [log.candidate(log.shown[row]) for row in of_user["row"]]
        found = predictor.score(log.history(int(user)), candidates)
        expected = of_user[columns].to_numpy(np.float64)
        np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("alone")
def test_dare_answers_as_dare_score_does(predictor: Predictor, exported: Exported, tmp_path: Path) -> None:
    lines = scored_lines(exported.run, exported.log, tmp_path / "scores")
    compare(predictor, lines, exported.log, ["score"])
    assert lines["score"].std() > 0.01


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("twin", ["model.retrieved.carts=3", "model.recent={history: 2}"]),
        ("sim-hard", []),
        ("sdim", []),
    ],
)
def test_other_models_answer_as_dare_score_does(
    raw_log: RawLog, tmp_path: Path, name: str, settings: list[str]
) -> None:
    sequences = "stream.sequences={history: {length: 12}, carts: {length: 5, where: {action: [cart, buy]}}}"
    more = [sequences, *settings] if settings else []
    run = train(raw_log, name, f"model.name={name}", "model.attention.dim=8", "checkpoint.every=100", *more)
    export_run(run, tmp_path / "model", "last", compile=False)
    lines = scored_lines(run, raw_log, tmp_path / "scores")
    compare(Predictor.load(tmp_path / "model"), lines, raw_log, ["score"])


def test_a_request_is_answered_by_its_model(predictor: Predictor, exported: Exported) -> None:
    scores = predictor.score(exported.history, exported.candidates)
    assert (scores.shape, scores.dtype) == ((len(exported.candidates),), np.float64)
    assert ((scores > 0) & (scores < 1)).all()
    assert predictor.score(exported.history, []).shape == (0,)
    # Nobody's history is one too.
    assert predictor.score({}, exported.candidates).shape == scores.shape
    other = Predictor.load(exported.other)
    assert other.version != predictor.version
    assert not np.allclose(other.score(exported.history, exported.candidates), scores)
    assert (predictor.model, predictor.run, predictor.labels) == ("dare", "run", ("label",))
    predictor.verify()
    assert predictor.seconds(exported.history) == exported.history["when"]


def test_candidates_do_not_depend_on_each_other(predictor: Predictor, exported: Exported) -> None:
    together = predictor.score(exported.history, exported.candidates)
    alone = [predictor.score(exported.history, [each])[0] for each in exported.candidates]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    order = np.random.default_rng(1).permutation(len(exported.history["when"]))
    shuffled = {
        name: [values[index] for index in order] if isinstance(values, list) else values
        for name, values in exported.history.items()
    }
    np.testing.assert_array_equal(predictor.score(shuffled, exported.candidates), together)


def test_columns_say_what_a_request_may_have(predictor: Predictor) -> None:
    columns = {(each.of == "candidate", each.name): each for each in predictor.columns}
    said = {key: (each.of, each.role, each.kind, each.required) for key, each in columns.items()}
    assert said[False, "product"] == ("behavior", "item", "integer", True)
    assert said[False, "when"] == ("behavior", "timestamp", "time", True)
    assert said[False, "action"] == ("behavior", "feature", "text", True)
    assert said[False, "city"] == ("user", "feature", "text", False)
    assert said[False, "customer"] == ("user", "user", "integer", False)
    assert said[True, "slot"] == ("candidate", "feature", "integer", True)
    assert said[True, "department"] == ("candidate", "feature", "text", False)
    assert (True, "action") not in said


def test_what_is_retrieved_is_explained(predictor: Predictor, exported: Exported) -> None:
    candidate = max(exported.candidates, key=lambda each: each["when"])
    retrieved = predictor.explain(exported.history, candidate)
    earlier = sum(when < candidate["when"] for when in exported.history["when"])
    assert len(retrieved) == min(4, earlier) > 0
    assert [each.weight for each in retrieved] == sorted((each.weight for each in retrieved), reverse=True)
    assert len({each.position for each in retrieved}) == len(retrieved)
    for each in retrieved:
        lists = {name: values[each.position] for name, values in exported.history.items() if isinstance(values, list)}
        assert each.behavior == lists
        assert each.timestamp == lists["when"] < candidate["when"]
        assert each.sequence == "history"
        assert 0 <= each.weight <= 1
    assert predictor.explain({}, candidate) == []


def test_threads_get_the_answers_that_one_gets(predictor: Predictor, exported: Exported) -> None:
    log = exported.log
    requests = [
        (log.history(user), [log.candidate(each) for each in log.shown[user : user + 20]]) for user in range(USERS)
    ]
    alone = [predictor.score(*request) for request in requests]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda request: predictor.score(*request), requests * 5))
    for found, expected in zip(together, alone * 5, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_user_of_a_store_has_the_history_that_is_stored(exported: Exported, tmp_path: Path) -> None:
    log, user = exported.log, exported.user
    bare = Predictor.load(exported.folder)
    with pytest.raises(RequestError, match="there is no store of histories; give the history itself"):
        bare.score(user, exported.candidates)
    with open_store(str(tmp_path / "store"), StoredColumns.of_settings(bare.settings)) as store:
        store.append(user, log.history(user))
        predictor = Predictor.load(exported.folder, store)
        expected = predictor.score(exported.history, exported.candidates)
        np.testing.assert_array_equal(predictor.score(user, exported.candidates), expected)
        assert predictor.explain(user, exported.candidates[0])
        np.testing.assert_array_equal(
            predictor.score(10**6, exported.candidates), predictor.score({}, exported.candidates)
        )


def test_a_store_is_opened_by_its_url(exported: Exported, tmp_path: Path) -> None:
    url, columns = str(tmp_path / "store"), StoredColumns.of_settings(Predictor.load(exported.folder).settings)
    with pytest.raises(UserError, match="there is no store of histories; `dare store load` makes one"):
        Predictor.load(exported.folder, url)
    wrong: Any = 17
    with pytest.raises(UserError, match="store is 17; give the path or URL of a store of histories, or what open_"):
        Predictor.load(exported.folder, wrong)
    open_store(str(tmp_path / "other"), columns.model_copy(update={"item": "when"})).close()
    with pytest.raises(UserError, match="it has item=when, and product is wanted"):
        Predictor.load(exported.folder, tmp_path / "other")
    with open_store(url, columns) as store:
        store.append(exported.user, exported.history)
    for store_of_histories in (url, tmp_path / "store"):
        with Predictor.load(exported.folder, store_of_histories) as predictor:
            found = predictor.score(exported.user, exported.candidates)
            np.testing.assert_array_equal(found, predictor.score(exported.history, exported.candidates))
        predictor.close()
        with pytest.raises(RequestError, match="there is no store of histories"):
            predictor.score(exported.user, exported.candidates)
    with open_store(url) as store:
        # Who opens it closes it.
        with Predictor.load(exported.folder, store) as predictor:
            assert predictor.answer(exported.user, []).behaviors == len(exported.history["when"])
        assert store.history(exported.user)["when"]


def test_an_answer_says_what_it_rests_on(predictor: Predictor, exported: Exported) -> None:
    known = [each for each in exported.candidates if each["product"] < 10**9]
    unknown = known[0] | {"product": 10**12}
    answer = predictor.answer(exported.history, [*known, unknown])
    none = predictor.answer({}, known)
    assert (answer.behaviors, none.behaviors) == (len(exported.history["when"]), 0)
    assert answer.unknown_items == none.unknown_items + 1
    np.testing.assert_array_equal(answer.scores, predictor.score(exported.history, [*known, unknown]))


def test_wrong_requests_name_the_place(predictor: Predictor, exported: Exported) -> None:
    wrong: list[tuple[Any, Any, str]] = [
        (exported.history | {"product": ["x"] * len(exported.history["when"])}, [], "history.product[0]: 'x' is not"),
        (exported.history, [{"product": 1, "when": 5}], "candidates[0]: column slot is missing"),
        (exported.history, [{"product": -1, "when": 5, "slot": 1}], "candidates[0].product is -1, and raw ids are"),
        ("x", [], "a user's id is given"),
        (
            None,
            [],
            "history is None; give a mapping of columns to lists of values ({} of somebody new), or the id of a",
        ),
        (True, [], "history is True; give a mapping of columns to lists"),
        (pd.DataFrame(exported.history), [], "history is of type DataFrame; give a mapping"),
    ]
    for history, candidates, said in wrong:
        with pytest.raises(RequestError) as error:
            predictor.score(history, candidates)
        assert str(error.value).startswith(said)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no model\.json"):
        Predictor.load(exported.data)


def test_answering_loads_nothing_of_training(exported: Exported) -> None:
    program = f"""
import json, sys
from pipeline.serve import Predictor
predictor = Predictor.load({str(exported.folder)!r})
request = json.loads(sys.stdin.read())
scores = predictor.score(request["history"], request["candidates"]).tolist()
heavy = ("torchrec", "fbgemm_gpu", "petastorm", "duckdb", "ibis", "pyspark")
print(json.dumps([scores, [name for name in heavy if name in sys.modules]]))
"""
    request = json.dumps(exported.body)
    ended = subprocess.run([sys.executable, "-c", program], input=request, text=True, capture_output=True, check=True)
    scores, loaded = json.loads(ended.stdout)
    assert loaded == []
    np.testing.assert_allclose(scores, Predictor.load(exported.folder).score(exported.history, exported.candidates))
