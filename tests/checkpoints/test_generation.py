"""Where sampling defaults come from: the checkpoint, another file, or nowhere."""

import json
import logging

import pytest
from gguf import GGMLQuantizationType as Kind

from jaxserve.checkpoints.generation import read_generation
from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.checkpoints.orbax import write_orbax
from jaxserve.core.errors import ConfigError

ADVISED = {"temperature": 0.5, "top_k": 7, "max_new_tokens": 40}
APPLIED = {"temperature": 0.5, "top_k": 7, "max_tokens": 40}


def test_a_checkpoints_own(make_hf, tmp_path, caplog):
    path, _ = make_hf("llama")
    (path / "generation_config.json").write_text(json.dumps(ADVISED))
    checkpoint = open_checkpoint(path)
    with caplog.at_level(logging.INFO):
        assert read_generation(checkpoint, "auto") == (APPLIED, ())
    assert "temperature=0.5, top_k=7, max_tokens=40" in caplog.text
    for none in ("none", "vllm"):
        assert read_generation(checkpoint, none) == ({}, ())
    params = ((name, checkpoint.read(name)) for name in checkpoint.names)
    write_orbax(tmp_path / "o", checkpoint.config, params, lambda _: None,
                checkpoint.sampling_defaults)  # fmt: skip
    assert open_checkpoint(tmp_path / "o").sampling_defaults == APPLIED


def test_old_checkpoints_have_them_in_config_json(make_hf):
    path, _ = make_hf("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "temperature": 0.25}))
    assert open_checkpoint(path).sampling_defaults == {"temperature": 0.25}


def test_those_of_another_file(make_gguf, tmp_path):
    checkpoint = open_checkpoint(make_gguf("llama", Kind.F32)[0])
    assert read_generation(checkpoint, "auto") == ({}, ())
    other = tmp_path / "generation_config.json"
    other.write_text(json.dumps({**ADVISED, "eos_token_id": [5, 6]}))
    for source in (other, tmp_path):
        assert read_generation(checkpoint, str(source)) == (APPLIED, (5, 6))
    with pytest.raises(ConfigError, match="must be auto, none or a file"):
        read_generation(checkpoint, "automatic")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2", {"temperature": 0.2, "top_p": 0.9}),
        ("gemma3", {"temperature": 1.0, "top_k": 64, "top_p": 0.95}),
    ],
)
def test_demo_models_have_what_their_cards_advise(request, model, expected):
    checkpoint = open_checkpoint(request.getfixturevalue(f"{model}_gguf"))
    assert checkpoint.sampling_defaults == expected
