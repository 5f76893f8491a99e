"""`dare bench search-features`: what travels in records and what does not, and that both ways find the same."""

import pytest

from benchmarks.search_features import MORE, measure


@pytest.mark.slow
def test_features_travel_in_records_or_lie_beside_the_items() -> None:
    ranks, targets, length = 2, 24, 30
    found = measure(ranks, targets, length, items=500, rounds=1)
    assert [(of["more"], of["where"]) for of in found] == [
        (0, "record"),
        *((more, where) for more in range(1, len(MORE) + 1) for where in ("record", "item")),
    ]
    assert all(of["same"] for of in found)
    travelling = {of["more"]: of for of in found if of["where"] == "record"}
    # Row, category and position have 8 + 14 + 6 bits; the features 14, 16, 6, 5 and 15 more.
    assert [travelling[more]["words"] for more in range(len(MORE) + 1)] == [1, 2, 2, 3, 3, 3]
    for of in found[1:]:
        if of["where"] == "item":
            assert of["words"] == 1
            # Four targets share a history; half of its behaviours leave the rank, give or take.
            word, more = 4 * targets / 4 * length / ranks, travelling[of["more"]]
            saved = more["search_bytes"] - of["search_bytes"]
            assert 0.8 * word * (more["words"] - 1) < saved < 1.2 * word * (more["words"] - 1)
