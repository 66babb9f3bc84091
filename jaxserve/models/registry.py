"""Which class builds which family. A new family is one file and one line here."""

from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Decoder
from jaxserve.models.gemma3 import Gemma3Layer
from jaxserve.models.llama import LlamaLayer

LAYERS = {"llama": LlamaLayer, "gemma3": Gemma3Layer}


def build_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model with random float32 weights; under `nnx.eval_shape` it costs no memory."""
    return Decoder(config, LAYERS[config.family], nnx.Rngs(params=seed))
