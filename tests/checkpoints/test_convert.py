import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.checkpoints.load import open_checkpoint
from jaxserve.checkpoints.orbax import OrbaxCheckpoint, write_orbax
from jaxserve.cli.main import main
from jaxserve.core.errors import CheckpointError
from jaxserve.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]


def convert(*args):
    return CliRunner().invoke(main, ["convert", *map(str, args)])


def entries(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_every_bit_survives(make_hf, tmp_path, bfloat16, family, dtype):
    source, expected = make_hf(family, shards=2, dtype=bfloat16 if dtype == "bfloat16" else dtype)
    result = convert(source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(tmp_path / "out")
    assert isinstance(checkpoint, OrbaxCheckpoint)
    assert checkpoint.config == open_checkpoint(source).config
    assert checkpoint.names == set(expected)
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(read, value, err_msg=name)


def test_tokenizer_and_chat_template_come_along(make_hf, tmp_path):
    source, _ = make_hf("llama")
    assert convert(source, tmp_path / "out").exit_code == 0
    old, new = (load_tokenizer(open_checkpoint(p).tokenizer_path)
                for p in (source, tmp_path / "out"))  # fmt: skip
    assert new.chat_template == old.chat_template
    messages = [{"role": "user", "content": "hello world"}]
    assert new.apply_chat_template(messages) == old.apply_chat_template(messages)
    assert new.eos_token_ids == old.eos_token_ids


def test_dtype_narrows_matrices_only(make_hf, tmp_path, bfloat16):
    source, expected = make_hf("qwen2")
    assert convert(source, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.read("layers.0.down").dtype == bfloat16
    np.testing.assert_array_equal(
        checkpoint.read("layers.0.down"), expected["layers.0.down"].astype(bfloat16)
    )
    np.testing.assert_array_equal(checkpoint.read("final_norm"), expected["final_norm"])
    # and an Orbax directory converts again
    assert convert(tmp_path / "out", tmp_path / "wide", "--dtype", "float32").exit_code == 0
    assert open_checkpoint(tmp_path / "wide").read("layers.0.down").dtype == np.float32


def test_existing_destination(make_hf, tmp_path):
    source, _ = make_hf("llama")
    other, expected = make_hf("qwen2")
    out = tmp_path / "out"
    assert convert(source, out).exit_code == 0
    again = convert(other, out)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert convert(other, out, "--force").exit_code == 0
    assert open_checkpoint(out).names == set(expected)
    precious = tmp_path / "precious"
    precious.mkdir()
    assert "not a converted checkpoint" in convert(other, precious, "--force").output
    assert entries(tmp_path) == ["llama-1", "out", "precious", "qwen2-1"]


def test_failure_leaves_nothing(make_hf, tmp_path):
    source, _ = make_hf("llama")
    (source / "tokenizer.json").write_text("{")
    result = convert(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert entries(tmp_path) == ["llama-1"]


def test_incomplete_parameters_are_refused(make_hf, tmp_path):
    checkpoint = open_checkpoint(make_hf("llama")[0])
    params = [(n, checkpoint.read(n)) for n in checkpoint.names if n != "layers.2.o"]
    with pytest.raises(CheckpointError, match=r"layers\.2\.o"):
        write_orbax(tmp_path / "out", checkpoint.config, params, lambda _: None)
    assert entries(tmp_path) == ["llama-1"]


@pytest.fixture
def converted(make_hf, tmp_path):
    """An Orbax checkpoint to damage."""
    assert convert(make_hf("llama")[0], tmp_path / "out").exit_code == 0
    return tmp_path / "out"


def edit_marker(path, edit):
    marker = json.loads((path / "jaxserve.json").read_text())
    edit(marker)
    (path / "jaxserve.json").write_text(json.dumps(marker))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m["config"].pop("num_heads"), "corrupt.*num_heads"),
        (lambda m: m["config"].update(intermediate_size=30), r"gate_up has shape .*29.*30"),
        (lambda m: m["config"].update(qkv_bias=True), "qkv_bias is missing"),
        (lambda m: m["config"].update(num_heads="six"), "corrupt.*num_heads"),
        (lambda m: m["config"].update(rope_scaling=3), "corrupt"),
        (lambda m: m.update(config=[1]), "corrupt"),
    ],
)
def test_configuration_must_fit(converted, edit, message):
    edit_marker(converted, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(converted)


def test_stored_lm_head_is_used_whatever_the_configuration_says(converted):
    edit_marker(converted, lambda m: m["config"].update(tie_embeddings=True))
    checkpoint = open_checkpoint(converted)
    assert not checkpoint.config.tie_embeddings
    assert "lm_head" in checkpoint.names


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("*METADATA", lambda f: f.unlink(), "cannot read .*METADATA: No such file"),
        ("*METADATA", lambda f: f.write_bytes(f.read_bytes()[:9]), "METADATA has 9 bytes of"),
        ("**/d/*", lambda f: f.write_bytes(b""), "has 0 bytes of"),
        ("**/d/*", lambda f: f.write_bytes(bytes(f.stat().st_size)), "has other contents than"),
        ("**/manifest.ocdbt", lambda f: f.write_bytes(b"x" * 9), "manifest.ocdbt has 9 bytes of"),
    ],
)
def test_damaged_weights_are_named(converted, capfd, pattern, damage, message):
    for file in (converted / "weights").glob(pattern):
        damage(file)
    with pytest.raises(CheckpointError, match=f"the checkpoint is damaged: .*{message}"):
        open_checkpoint(converted)
    assert capfd.readouterr() == ("", "")


def test_weights_of_older_conversions(converted):
    """In a process of its own, for TensorStore's failed reads end later, as warnings elsewhere."""
    # They did not write down what their files must be like.
    edit_marker(converted, lambda m: m.pop("files"))
    for file in (converted / "weights").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    script = (
        "import pathlib, sys\n"
        "from jaxserve.checkpoints.load import open_checkpoint\n"
        "from jaxserve.core.errors import CheckpointError\n"
        "try:\n"
        "    checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "    for name in checkpoint.names: checkpoint.read(name)\n"
        "except CheckpointError as error: print('refused', 'details' not in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(converted)], capture_output=True,
                          text=True, cwd=ROOT, check=False)  # fmt: skip
    assert done.stdout == "refused True\n"
