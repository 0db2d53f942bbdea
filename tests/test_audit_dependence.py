"""model/audit/dependence.py: what a graph of documents says about the order of scoring."""

import pytest

from model.audit.dependence import Edge, describe, find_cycle


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (set(), "no document moved another's score"),
        ({(0, 1), (1, 2), (0, 2)}, "document 0 moves the score of document 1 behind it: documents are not independent"),
        ({(0, 1), (5, 2)}, "document 5 moves the score of document 2, which comes before it"),
        ({(0, 1), (1, 0)}, "no order of scoring is sound, documents depend on each other: "),
        ({(0, 4), (4, 2), (2, 0), (0, 1)}, "no order of scoring is sound, documents depend on each other: "),
    ],
)
def test_edges_that_point_forward_or_round_are_told_apart(edges: set[Edge], words: str) -> None:
    assert describe(edges).startswith(words)


def test_a_cycle_is_found_with_its_documents() -> None:
    cycle = find_cycle({(0, 4), (4, 2), (2, 0), (0, 1)})
    assert cycle[0] == cycle[-1]
    assert set(cycle) == {0, 2, 4}
    assert find_cycle({(0, 1), (1, 2), (0, 2)}) == []
