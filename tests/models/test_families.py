"""Tiny models of every family against what Hugging Face transformers computes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.models.registry import FAMILIES
from jaxserve.testing.tiny_model import write_tiny_checkpoint
from tests.models.paged import run_paged

# Made by `scripts/make_family_references.py`.
REFERENCES = json.loads((Path(__file__).parents[1] / "references/families.json").read_text())
FIRST_CHUNKS = (13, 5, 9)  # then a token at a time: the prompt ends within the third
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]


def checkpoint(reference: dict[str, Any], directory: Path) -> Path:
    """The model that a reference was made of, with the configuration that transformers saved."""
    path = write_tiny_checkpoint(
        directory, family=reference["family"], seed=reference["seed"], **reference["config"]
    )
    (path / "config.json").write_text(json.dumps(reference["config"]))
    return path


def check(name: str, directory: Path, steps: list[tuple[int, ...]], **how: Any) -> None:
    """Logits as the reference has them, and the greedy token after each of the answer's."""
    reference = REFERENCES[name]
    tokens = reference["prompt"] + reference["answer"]
    path = checkpoint(reference, directory / name)
    got, *others = run_paged(path, [tokens] * len(steps[0]), steps, **how)
    for one in (got, *others):
        for position, expected in reference["logits"].items():
            np.testing.assert_allclose(one[int(position)], expected, rtol=0, atol=1e-3)
        assert one[len(reference["prompt"]) - 1 : -1].argmax(-1).tolist() == reference["answer"]


@pytest.mark.parametrize("name", REFERENCES)
def test_in_chunks_as_transformers_has_it(name: str, tmp_path: Path):
    """Chunks, and then one token at a time, in the program that loops over layers."""
    length = len(REFERENCES[name]["prompt"] + REFERENCES[name]["answer"])
    steps = [(n,) for n in FIRST_CHUNKS] + [(1,)] * (length - sum(FIRST_CHUNKS))
    check(name, tmp_path, steps, implementation="cpu", loop_layers=True)


# What differs by layer, or goes over all heads, on two devices and with the layers unrolled.
@pytest.mark.parametrize("name", [n for n in ("smollm3", "olmo3", "glm4") if n in REFERENCES])
def test_two_devices_and_unrolled_layers(name: str, tmp_path: Path):
    steps = [(23, 0), (23, 0), (5, 18), (0, 23), (0, 10)]
    check(
        name, tmp_path, steps,
        implementation="xla", loop_layers=False, mesh="data=1,tensor=2",
    )  # fmt: skip


def test_every_family_has_a_reference():
    known = {reference["config"]["model_type"] for reference in REFERENCES.values()}
    assert [name for name, family in FAMILIES.items() if not known & {*family.hf}] == []
