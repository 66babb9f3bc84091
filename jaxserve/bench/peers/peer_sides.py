"""The sides of a comparison by their names: an engine, and the form of the weights it runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.bench.quality import side_options
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError

OURS = "jaxserve"
LLAMA_CPP = "llama.cpp"
FILE = "file"  # the weights of the file that was given, as they are


@dataclasses.dataclass(frozen=True)
class Engine:
    """A script that runs one engine, and what to install for it."""

    script: str
    pip: str


ENGINES = {
    OURS: Engine("jaxserve_peer.py", "jaxserve"),
    "transformers": Engine("transformers_peer.py", "torch transformers gguf"),
    LLAMA_CPP: Engine("llama_cpp_peer.py", "llama-cpp-python"),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The files that sides read.

    Attributes:
        source: the GGUF file that was given.
        float32: its copy in float32.
    """

    source: Path
    float32: Path

    def quantised(self, form: str) -> Path:
        """Where llama.cpp's own quantisation of them is, or is to be."""
        return self.float32.with_name(f"{self.float32.stem}-{form}.gguf")


@dataclasses.dataclass(frozen=True)
class Side:
    """One engine on one form of the weights.

    Attributes:
        engine: a name of `ENGINES`.
        form: "" for float32; for ours the engine's options as `bench quality` has them, for
            llama.cpp a type that it quantises to, or FILE.
    """

    engine: str
    form: str = ""

    @classmethod
    def of(cls, name: str) -> "Side":
        """The side of a name: ENGINE, or ENGINE@FORM.

        Raises:
            ConfigError: there is no such engine, or it takes no such form.
        """
        engine, _, form = name.partition("@")
        if engine not in ENGINES:
            raise ConfigError(f"no side {name!r}; there are {', '.join(ENGINES)}")
        if form and engine not in (OURS, LLAMA_CPP):
            raise ConfigError(f"{engine} runs float32 only here, not {form!r}")
        side = cls(engine, form)
        if form and engine == OURS:
            EngineConfig(**side.options)  # refuses what there is not
        return side

    @property
    def options(self) -> dict[str, Any]:
        """The options of our engine for this form."""
        return side_options(self.form) if self.form else {}

    @property
    def multiplies_integers(self) -> bool:
        """Whether activations are rounded to int8, as llama.cpp does for all it quantises."""
        if self.engine == OURS:
            return self.options.get("activation_dtype") == "int8"
        return bool(self.form)

    def file(self, weights: Weights) -> Path:
        """The GGUF file that the side reads."""
        if not self.form:
            return weights.float32
        is_made = self.engine == LLAMA_CPP and self.form != FILE
        return weights.quantised(self.form) if is_made else weights.source

    def work(self, weights: Weights, config: EngineConfig) -> dict[str, Any]:
        """What the side's script is told beside the cases."""
        work: dict[str, Any] = {"model": str(self.file(weights))}
        if self.engine == OURS:
            kept = ("compilation_cache_dir", "page_size", "max_num_batched_tokens", "overlap")
            work["jaxserve_options"] = {n: getattr(config, n) for n in kept} | self.options
        elif self.form not in ("", FILE):
            work["quantise"] = {"source": str(weights.float32), "type": self.form}
        return work

    def weight_bytes(self, weights: Weights) -> tuple[int, int]:
        """Bytes of the layers' weights and of the head's, as the side reads them in a step.

        A tied embedding is the head; an untied one is a look-up of a few rows, and left out.
        """
        path = self.file(weights)
        return _our_bytes(path, self.options) if self.engine == OURS else _gguf_bytes(path)


def _gguf_bytes(path: Path) -> tuple[int, int]:
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    return layers, sizes.get("output.weight", sizes["token_embd.weight"])


def _our_bytes(path: Path, options: Mapping[str, Any]) -> tuple[int, int]:
    import jax
    import numpy as np

    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.engine.products import choose_products
    from jaxserve.models.graph import ModelGraph
    from jaxserve.models.shard import shard_model
    from jaxserve.parallel.mesh import bytes_per_device, make_mesh

    checkpoint, float32 = open_checkpoint(path), np.dtype("float32")
    architecture, rules = shard_model(checkpoint.config, make_mesh("", jax.devices("cpu")[:1]))
    graph = ModelGraph(architecture)
    config = EngineConfig(model=str(path), **options)
    _, storage = choose_products(config, checkpoint, graph.parameters, rules, float32)
    sizes = {
        name: bytes_per_device(weight)
        for name, weight in graph.abstract_params(rules, float32, storage).items()
    }
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    return layers, sizes.get("lm_head", sizes["embed"])
