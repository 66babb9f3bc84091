import pytest

from jaxserve.bench.settings import SharedSpec
from jaxserve.bench.sides import Sides, differing_answers, identity
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from tests.bench.virtual import VirtualTime


def test_every_other_round_goes_backwards() -> None:
    ran: list[str] = []
    results = Sides().take_turns("abc", 3, lambda name, number: ran.append(name) or number)
    assert "".join(ran) == "abc" + "cba" + "abc"
    assert results == {name: [0, 1, 2] for name in "abc"}


def test_an_engine_alone_is_closed_whatever_happens() -> None:
    sides, closed = VirtualTime().sides(), []
    with (
        pytest.raises(RuntimeError, match="half way"),
        sides.alone(EngineConfig(num_pages=8, max_model_len=64)) as driver,
    ):
        driver.engine.close = lambda: closed.append(True)
        raise RuntimeError("half way")
    assert closed == [True]


def test_differing_answers_are_counted_and_named() -> None:
    answers = {"a": [[1, 2], [3]], "b": [[1, 2], [4]], "c": [[1], [3, 3]]}
    assert differing_answers(answers) == {"b": 1, "c": 2}
    assert differing_answers(answers, cut=True) == {"b": 1, "c": 0}
    with pytest.raises(ValueError):
        differing_answers({"a": [[1]], "b": []})
    assert identity(0, 5) == "all 5 answers identical"
    assert identity(2, 5) == "2 of 5 answers DIFFER"


def test_numbers_must_be_positive_but_for_the_seed() -> None:
    assert SharedSpec(seed=0).seed == 0
    for field in ("num_requests", "request_rate", "rounds"):
        with pytest.raises(ConfigError, match=field):
            SharedSpec(**{field: 0})
