"""Every family, run ragged and paged in several steps, against a dense float64 forward pass."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.models.numpy_reference import NumpyModel
from tests.models.paged import run_paged

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

# Odd sizes, no two alike where that can be, so that a wrong axis cannot pass.
SIZES = {
    "vocab_size": 311,
    "hidden_size": 37,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6},
    "llama-3.1-rope": {"family": "llama", "rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "qwen2-bias": {"family": "qwen2"},
    "mistral-window": {"family": "mistral", "sliding_window": 11},
    "gemma3": {
        "family": "gemma3",
        "sliding_window": 7,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "query_pre_attn_scalar": 23,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}
# What each of three sequences computes per step: whole prompts, chunks, decodes, pauses.
STEPS = [(19, 4, 0), (13, 1, 9), (1, 1, 21), (1, 17, 5), (0, 1, 1), (1, 1, 1), (1, 20, 1)]


# All families on one backend; on the others, what they treat differently: groups, windows, layers.
@pytest.mark.parametrize(
    ("name", "implementation", "loop_layers"),
    [
        *((name, "cpu", True) for name in MODELS),
        *((name, "xla", True) for name in ("llama-tied", "mistral-window", "gemma3")),
        *((name, "xla", False) for name in ("qwen2-bias", "gemma3")),
    ],
)
def test_paged_steps_equal_the_dense_forward_pass(
    name: str, implementation: str, loop_layers: bool, tmp_path: Path
):
    directory = write_tiny_checkpoint(tmp_path / name, seed=3, **SIZES | MODELS[name])
    random = np.random.default_rng(5)
    lengths = [sum(counts[i] for counts in STEPS) for i in range(len(STEPS[0]))]
    sequences = [random.integers(0, SIZES["vocab_size"], n).tolist() for n in lengths]
    model = NumpyModel(directory)
    logits = run_paged(directory, sequences, STEPS, implementation, loop_layers)
    for got, tokens in zip(logits, sequences, strict=True):
        expected = model.logits(tokens)
        assert got.shape == expected.shape
        assert np.std(expected) > 0.3, "logits too flat to tell a wrong model"
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "cpu"), ("gemma3", "xla"), ("llama", "reference")]
)
def test_a_bfloat16_pool_rounds_keys_and_values_and_nothing_else(
    name: str, implementation: str, tmp_path: Path
):
    """What the dense pass with rounded K and V computes, and far from what it does without."""
    directory = write_tiny_checkpoint(tmp_path / name, seed=3, **SIZES | MODELS[name])
    random = np.random.default_rng(5)
    tokens = random.integers(0, SIZES["vocab_size"], sum(counts[0] for counts in STEPS)).tolist()
    steps = [(counts[0],) for counts in STEPS]
    bfloat16 = jnp.dtype("bfloat16")
    [got] = run_paged(directory, [tokens], steps, implementation, True, bfloat16)

    def distance(kv_dtype: jnp.dtype | None) -> float:
        """Root mean square: single values may well be rounded the other way."""
        return float(np.sqrt(np.mean((got - NumpyModel(directory, kv_dtype).logits(tokens)) ** 2)))

    assert distance(bfloat16) < 2e-4 < 1e-3 < distance(None)


def test_the_reference_tells_the_models_apart(tmp_path: Path):
    """Each feature the variants turn on changes the logits by far more than the tolerance."""
    tokens = list(range(40))
    changes = {
        "llama": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
        "mistral-window": {"sliding_window": None},
        "gemma3": {"sliding_window": 8},
    }
    for name, change in changes.items():
        options = SIZES | MODELS[name]
        first = write_tiny_checkpoint(tmp_path / name, seed=3, **options)
        other = write_tiny_checkpoint(tmp_path / f"{name}-other", seed=3, **options | change)
        distance = np.abs(NumpyModel(first).logits(tokens) - NumpyModel(other).logits(tokens))
        assert distance.max() > 1e-2, name
