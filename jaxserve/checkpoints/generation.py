"""Which sampling defaults a model is served with: its own, none, or those of another file."""

import logging
from pathlib import Path
from typing import NamedTuple

from jaxserve.checkpoints.base import Checkpoint
from jaxserve.checkpoints.safetensors import GENERATION_CONFIG, read_json
from jaxserve.core.errors import ConfigError
from jaxserve.core.sampling_defaults import SamplingDefaults, described, from_generation_config
from jaxserve.models.config_values import ConfigValues

log = logging.getLogger(__name__)

NONE = ("none", "vllm")  # vLLM's name, for its own defaults and nobody else's


class Generation(NamedTuple):
    """What is served beside a model's weights.

    Attributes:
        sampling: defaults of requests that do not say.
        eos_token_ids: more tokens that end an answer.
    """

    sampling: SamplingDefaults
    eos_token_ids: tuple[int, ...]


def read_generation(checkpoint: Checkpoint, source: str) -> Generation:
    """Find the defaults, and log what applies.

    Args:
        checkpoint: the model.
        source: `auto` for the model's own, `none` (or vLLM's name for it, `vllm`), or a
            generation_config.json or its directory.

    Raises:
        ConfigError: there is no such file, or a value in it is out of range.
        CheckpointError: the file is not a JSON object.
    """
    eos: tuple[int, ...] = ()
    if source in NONE:
        sampling: SamplingDefaults = {}
    elif source == "auto":
        sampling = checkpoint.sampling_defaults
    else:
        path = Path(source).expanduser()
        path = path / GENERATION_CONFIG if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"generation_config must be auto, none or a file; there is no {path}")
        values = read_json(path)
        sampling = from_generation_config(values, str(path))
        eos = ConfigValues(values, str(path)).token_ids("eos_token_id")
    log.info(
        "sampling defaults of requests that do not say: %s",
        described(sampling) or "temperature=1, nothing cut off",
    )
    return Generation(sampling, eos)
