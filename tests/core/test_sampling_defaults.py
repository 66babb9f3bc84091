"""Sampling defaults as checkpoints have them."""

import logging

import pytest

from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_defaults import (
    described,
    from_generation_config,
    from_gguf_metadata,
    to_generation_config,
)

QWEN = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "pad_token_id": 151643, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20,
    "top_p": 0.8, "transformers_version": "4.37.0", "max_new_tokens": 2048, "min_p": None,
}  # fmt: skip


def test_a_generation_config(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        defaults = from_generation_config(QWEN, "x")
    assert defaults == {
        "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1,
        "max_tokens": 2048,
    }  # fmt: skip
    assert not caplog.records
    assert from_generation_config(to_generation_config(defaults), "x") == defaults
    assert described(defaults).startswith("temperature=0.7, top_p=0.8, top_k=20")


def test_what_is_not_applied_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert from_generation_config({"no_repeat_ngram_size": 3, "num_beams": 1}, "x") == {}
    assert [record.message for record in caplog.records] == [
        "x: not applied, as it is not known here: no_repeat_ngram_size = 3"
    ]


def test_gguf_metadata() -> None:
    metadata = {
        "general.name": "x", "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.0499999523162842,
    }  # fmt: skip
    assert from_gguf_metadata(metadata, "x") == {
        "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature cannot be -1"),
        ({"temperature": "warm"}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k cannot be 2.5"),
        ({"top_p": float("nan")}, "top_p cannot be nan"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_generation_config(values, "generation_config.json")
