"""vLLM's keyword arguments."""

import dataclasses

import pytest

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.vllm_names import INSTEAD, SAME, engine_options

KNOWN = {field.name for field in dataclasses.fields(EngineConfig)}


def test_what_means_the_same_is_taken() -> None:
    given = {
        "tensor_parallel_size": 2, "data_parallel_size": 3, "block_size": 32,
        "enable_prefix_caching": False, "enable_chunked_prefill": True, "max_model_len": 9,
        "enforce_eager": False, "trust_remote_code": None,
    }  # fmt: skip
    assert engine_options(given, KNOWN) == {
        "mesh": "tensor=2,data=3", "page_size": 32, "prefix_cache": False, "prefill_first": False,
        "max_model_len": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.9}, "option of vLLM's: .*--kv-cache-memory"),
        ({"enforce_eager": True}, "enforce_eager is an option of vLLM's"),
        ({"nonsense": 1}, "no option 'nonsense'"),
        ({"mesh": "tensor=2", "tensor_parallel_size": 2}, "mesh says already"),
    ],
)
def test_what_does_not_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_options(options, KNOWN)


def test_no_name_of_ours_is_shadowed() -> None:
    names = {flag.lstrip("-").replace("-", "_") for flag in (*SAME, *INSTEAD)}
    assert not names & KNOWN
