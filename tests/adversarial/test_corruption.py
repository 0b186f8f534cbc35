"""500 of the forgeries of tests/bench/corruption.py, which makes 10,000."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.corruptions import Forger, Forgery

COUNT = 500


@pytest.fixture(scope="module")
def forger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forger]:
    forger = Forger(tmp_path_factory.mktemp("forger"))
    yield forger
    assert forger.unharmed()
    untouched = Forgery("untouched", forger.content[3], forger.signature[3])
    assert forger.outcome(untouched) == "accepted", "what is not forged is taken"


@pytest.mark.parametrize("part", range(10))
def test_no_forgery_is_taken_and_none_is_a_crash(part: int, forger: Forger) -> None:
    for i in range(part, COUNT, 10):
        forgery = forger.make(i)
        assert forger.outcome(forgery) == "refused", f"{i}: {forgery.kind}"
