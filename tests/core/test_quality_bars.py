"""Formats outside their bars say so."""

import dataclasses

from jaxserve.core.config import EngineConfig
from jaxserve.core.quality_bars import OPTIONS, bar_of, quality_warnings


def test_options_are_the_engine_s() -> None:
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    assert set(OPTIONS) <= fields.keys()
    assert quality_warnings({name: str(fields[name].default) for name in OPTIONS}) == []


def test_what_is_within_its_bar_says_nothing() -> None:
    assert quality_warnings({"quantization": "int8", "kv_cache_dtype": "int8"}) == []


def test_what_is_outside_says_by_how_much() -> None:
    int4, activations = quality_warnings({"quantization": "int4", "activation_dtype": "int8"})
    assert "quantization int4" in int4 and "20.8 %" in int4 and "4.0 %" in int4
    assert "activation_dtype int8" in activations and "bench quality" in activations


def test_the_coarsest_format_sets_the_bar() -> None:
    assert bar_of({"quantization": "int4", "kv_cache_dtype": "int8"}) == 0.04
    assert bar_of({"quantization": "none", "kv_cache_dtype": "fp8"}) == 0.005
    assert bar_of({"quantization": "auto"}) is None
