"""Runs a checkpoint's model ragged and paged, step by step, without an engine."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoints.load import load_params, open_checkpoint
from jaxserve.models.backend import KernelBackend
from jaxserve.models.graph import ModelGraph
from jaxserve.models.shard import shard_model
from jaxserve.parallel.mesh import make_mesh
from pallas_kernels.paged_batch import PagedBatch, to_pool

PAGE_SIZE, NUM_TOKENS, NUM_ROWS, MAX_PAGES = 4, 23, 5, 29


def run_paged(
    directory: Path,
    sequences: Sequence[Sequence[int]],
    steps: Sequence[Sequence[int]],
    implementation: str,
    loop_layers: bool,
    kv_dtype: jnp.dtype | None = None,
    mesh: str = "data=1,tensor=1",
) -> list[np.ndarray]:
    """Logits at every position of every sequence, computed step by step on shuffled pages."""
    checkpoint = open_checkpoint(directory)
    config, rules = shard_model(checkpoint.config, make_mesh(mesh))
    graph = ModelGraph(config)
    targets = graph.abstract_params(rules, np.dtype(np.float32))
    params = load_params(checkpoint, targets, progress=False)
    backend = KernelBackend(rules, implementation, loop_layers=loop_layers)

    @jax.jit
    def step(params, pool, token_ids, batch):
        model = graph.model(params)
        positions = batch.positions(NUM_TOKENS)[0]
        hidden = model.embedded(token_ids, np.float32)
        hidden, pool = model.run_layers(hidden, pool, batch, positions, backend)
        return model.logits(hidden, backend.linear), pool

    num_pages = len(sequences) * MAX_PAGES + 1
    pages = np.random.default_rng(1).permutation(num_pages - 1).reshape(len(sequences), -1)
    shape = (config.num_layers, num_pages, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    values = jnp.full(shape, jnp.nan, jnp.float32)
    pool = to_pool(values, backend.pool_dtype(kv_dtype or values.dtype))
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for counts in steps:
        token_ids = np.zeros(NUM_TOKENS, np.int32)
        starts, lens, ends = (np.zeros(NUM_ROWS, np.int32) for _ in range(3))
        table = np.full((NUM_ROWS, MAX_PAGES), num_pages - 1, np.int32)
        rows = [i for i in range(len(sequences)) if counts[i]]
        at = 0
        for row, i in enumerate(rows):
            new = sequences[i][done[i] : done[i] + counts[i]]
            token_ids[at : at + len(new)] = new
            done[i] += len(new)
            starts[row], lens[row], ends[row], table[row] = at, len(new), done[i], pages[i]
            at += len(new)
        batch = PagedBatch(*map(jnp.asarray, (starts, lens, ends, table)))
        out, pool = step(params, pool, jnp.asarray(token_ids), batch)
        for row, i in enumerate(rows):
            logits[i].append(np.asarray(out)[starts[row] : starts[row] + lens[row]])
    return [np.concatenate(parts) for parts in logits]
