"""The page of `dare serve` in a headless Chromium, before a real server of two models."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import browser
from tests.served import Exported
from tests.servers import Server, count

pytestmark = pytest.mark.skipif(not browser.is_installed(), reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    with Server(folder, exported.folder, exported.other, "--store", folder / "store") as started:
        started.ready().post("/append", {"user": exported.user, "events": exported.history}).raise_for_status()
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(chromium: browser.Tab, server: Server) -> Iterator[browser.Tab]:
    """The page, as soon as it has asked the server what it has; at the end, nothing has gone wrong in it."""
    chromium.open(server.address())
    chromium.wait("document.querySelectorAll('#users button').length > 0")
    yield chromium
    assert not chromium.complaints


def texts(tab: browser.Tab, selector: str) -> Any:
    return tab.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)")


def show_user(tab: browser.Tab) -> None:
    tab.value("document.querySelector('#users button').click()")
    tab.wait("!document.getElementById('found').hidden")


def test_a_user_of_the_store(tab: browser.Tab, server: Server, exported: Exported) -> None:
    assert texts(tab, "#users button") == [str(exported.user)]
    assert len(texts(tab, "#models li")) == 2
    show_user(tab)
    assert texts(tab, "#said") != [""]
    summary = tab.value("document.querySelector('#line svg').getAttribute('aria-label')")
    assert summary.startswith(f"{count(exported)} events of user {exported.user} from ")
    # A stem with a head for each behaviour that each of the models has found.
    candidates = json.loads(tab.value("document.getElementById('candidates').value"))
    asked = {"user": exported.user, "candidates": candidates}
    scores = server.post("/score", asked).json()["scores"]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    first = server.post("/explain", {"user": exported.user, "candidate": candidates[order[0]]}).json()["models"]
    assert len(texts(tab, "#line .head.first")) == len(first[0]["retrieved"])
    assert len(texts(tab, "#line .head.second")) == len(first[1]["retrieved"])
    # Candidates in the order of the first model, with the scores of both.
    rows = texts(tab, "#ranked tbody tr")
    assert len(rows) == len(candidates)
    shown = texts(tab, "#ranked tbody tr td.meter.first")
    assert shown == [f"{scores[index]:.4f}" for index in order]
    others = server.post("/score", {**asked, "model": exported.other.name}).json()["scores"]
    assert texts(tab, "#ranked tbody tr td.meter.second") == [f"{others[index]:.4f}" for index in order]
    for number, side in enumerate(("first", "second")):
        weights = [f"{each['weight']:.4f}" for each in first[number]["retrieved"]]
        assert texts(tab, f"#explained td.meter.{side}") == weights


def test_another_candidate_is_explained_by_the_keyboard(tab: browser.Tab) -> None:
    show_user(tab)
    before = texts(tab, "#found-title")
    tab.value("document.querySelectorAll('#ranked tbody button')[1].focus()")
    tab.press("Enter", 13)
    tab.wait("document.querySelectorAll('#ranked tbody tr')[1].getAttribute('aria-selected') === 'true'")
    assert texts(tab, "#found-title") != before
    assert tab.value("document.querySelectorAll('#ranked tr[aria-selected=true]').length") == 1


def test_a_history_that_is_pasted(tab: browser.Tab, exported: Exported) -> None:
    tab.value(f"document.getElementById('pasted').value = {json.dumps(json.dumps(exported.history))}")
    tab.value("document.querySelector('#by-paste button').click()")
    tab.wait("!document.getElementById('found').hidden")
    assert texts(tab, "#line-help")[0].startswith(f"{count(exported)} events of this history")
    asked = json.dumps(json.dumps(exported.candidates))
    tab.value(f"document.getElementById('candidates').value = {asked}")
    tab.value("document.getElementById('rank').click()")
    tab.wait(f"document.getElementById('said').textContent.startsWith('{len(exported.candidates)} candidates')")
    assert len(texts(tab, "#ranked tbody tr")) == len(exported.candidates)


def test_mistakes_are_told_in_a_line_and_nothing_is_lost(tab: browser.Tab) -> None:
    show_user(tab)
    for field, form, value in (
        ("candidates", "#by-candidates", "["),
        ("candidates", "#by-candidates", "[{}]"),
        ("pasted", "#by-paste", '{"<b>no column</b>": [1]}'),
    ):
        tab.value("document.getElementById('said').textContent = ''")
        tab.value(f"document.getElementById({field!r}).value = {json.dumps(value)}")
        tab.value(f"document.querySelector('{form} button.main').click()")
        tab.wait("document.getElementById('said').className === 'bad' && document.getElementById('said').textContent")
        assert "\n" not in texts(tab, "#said")[0]
    assert texts(tab, "#said b") == []
    assert len(texts(tab, "#ranked tbody tr")) > 0
    # What the browser itself says about answers that are errors is no complaint of the page.
    tab.complaints[:] = [line for line in tab.complaints if "status of 400" not in line]


def test_everybody_can_use_it(tab: browser.Tab) -> None:
    show_user(tab)
    unnamed = """[...document.querySelectorAll('input, textarea, button')].filter(each =>
        !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim())).length"""
    assert tab.value(unnamed) == 0
    assert tab.value("document.documentElement.lang") == "en"
    assert tab.value("document.getElementById('said').getAttribute('role')") == "status"
    assert tab.value("document.querySelector('#line svg').getAttribute('role')") == "img"
    # On a narrow screen nothing stands out of it.
    tab.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    try:
        assert tab.value("document.documentElement.scrollWidth") <= 390
    finally:
        tab.call("Emulation.clearDeviceMetricsOverride")


def test_it_asks_nobody_but_its_server(tab: browser.Tab, server: Server) -> None:
    show_user(tab)
    asked = tab.value("performance.getEntriesByType('resource').map(each => each.name)")
    assert asked
    assert all(url.startswith(server.address() + "/") for url in asked)
    policy = server.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    refused = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert tab.value(refused) == "refused"
    tab.complaints.clear()
