"""Parts of an engine, from its blueprint."""

from pathlib import Path

from jaxserve.core.config import EngineConfig
from jaxserve.engine.blueprint import draw_up
from jaxserve.engine.build_parts import estimate_costs


def test_costs_do_not_depend_on_how_weights_are_held(gemma3_gguf: Path) -> None:
    """Q4_K_M holds parts of one weight in different formats."""
    costs = [
        estimate_costs(
            draw_up(EngineConfig(model=str(gemma3_gguf), num_pages=64, quantization=how)).lowering
        )
        for how in ("auto", "none")
    ]
    assert costs[0] == costs[1]
    assert costs[0].seconds_per_token > 0
