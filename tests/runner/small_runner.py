"""A device runner of a small model with random weights, and rows for its plans."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.cache.page_store import PageStore
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import SamplingExtras, StepPlan, StepResult, StepRow
from jaxserve.models.backend import KernelBackend
from jaxserve.models.config import ModelConfig
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.device_runner import DeviceRunner
from jaxserve.runner.lowering import StepLowering
from jaxserve.runner.program_cache import ProgramCache
from jaxserve.runner.step_program import StepProgram

GREEDY = SamplingParams(temperature=0)


class SmallRunner:
    """A runner of random weights; its pages hold four tokens.

    Args:
        mesh: data and tensor.
        programs: where compiled programs are kept.
        config: the model.
        sampled: row buckets of one shard.
        moves_pages: whether it has a page store, and copies pages.

    Attributes:
        runner: as served.
        store: its page store.
        last_shard: index of the last data shard.
    """

    def __init__(
        self,
        mesh: str,
        programs: Path,
        config: ModelConfig,
        *,
        sampled: tuple[int, ...] = (4,),
        moves_pages: bool = False,
    ) -> None:
        config, rules = shard_model(config, make_mesh(mesh))
        buckets = Buckets(tokens=(16,), sampled=sampled, max_rows=sampled[-1], max_pages=4)
        step = StepProgram(ModelGraph(config), KernelBackend(rules, "xla"), buckets)
        float32 = jnp.dtype("float32")
        lowering = StepLowering(step, float32, 16 * rules.data, 4, float32)
        random = np.random.default_rng(0)
        self._params = {
            name: jax.device_put(random.standard_normal(p.shape, np.float32) * 0.3, p.sharding)
            for name, p in lowering.params.items()
        }
        self._norm_eps = config.norm_eps
        self.last_shard = rules.data - 1
        layout = lowering.page_layout
        self.store = PageStore(layout.shape, layout.dtype, host_bytes=2**20)
        store = self.store if moves_pages else None
        self.runner = DeviceRunner(lowering, self._params, store, prefix_cache=moves_pages)
        settings = {"mesh": mesh, "config": config, "sampled": sampled, "test": __name__}
        self.runner.compile(ProgramCache(programs, settings))

    def row(
        self, tokens: list[int], pages: tuple[int, ...], start: int = 0, **fields: Any
    ) -> StepRow:
        """A row, greedy and of the last shard unless told otherwise."""
        shard = fields.pop("shard", self.last_shard)
        slot = 4 * shard + fields.pop("slot", 0)
        values: dict[str, Any] = dict(samples=True, params=GREEDY, seed=0) | fields
        return StepRow(
            key=slot, slot=slot, shard=shard, start=start, num_tokens=len(tokens),
            token_ids=tuple(tokens), page_ids=pages, **values,
        )  # fmt: skip

    def result(
        self, *rows: StepRow, extras: Mapping[int, SamplingExtras] | None = None, **movements: Any
    ) -> StepResult:
        """Run one step, sampled late if there are any extras, even of no row."""
        handle = self.runner.launch(StepPlan(rows, **movements))
        if extras is not None:
            self.runner.sample(handle, extras)
        return self.runner.collect(handle)

    def step(self, *rows: StepRow, **more: Any) -> list[int]:
        """Run one step for its tokens."""
        return self.result(*rows, **more).token_ids.tolist()

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """The head's logits of hidden states that are not normed: float64 [rows, vocab]."""
        norm, embed = (np.asarray(self._params[k], np.float64) for k in ("final_norm", "embed"))
        hidden = hidden.astype(np.float64)
        rms = np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + self._norm_eps)
        return hidden / rms * norm @ embed.T
