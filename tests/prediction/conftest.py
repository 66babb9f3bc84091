"""What the tests of predictors share."""

from collections.abc import Callable

import pytest
from jax.stages import Compiled, Lowered

from jaxserve.prediction.features import Features
from tests.prediction.made_up import HIDDEN, embed


@pytest.fixture(scope="session")
def features() -> Features:
    return Features(embed, HIDDEN)


@pytest.fixture(scope="session")
def compile_once() -> Callable[[str, Callable[[], Lowered]], Compiled]:
    """Keeps programs by name, as a program cache does."""
    programs: dict[str, Compiled] = {}

    def get(name: str, lower: Callable[[], Lowered]) -> Compiled:
        if name not in programs:
            programs[name] = lower().compile()
        return programs[name]

    return get
