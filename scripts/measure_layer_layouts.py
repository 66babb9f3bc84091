"""Measure how the layers of a decode step should be laid out, on the device JAX finds.

Prints a Markdown table for steps of 1, 8 and 32 sequences at the shapes of SmolLM2-135M, with
random float32 weights and a paged KV pool that is donated to the step:

* layers unrolled in the program, or one `lax.scan` over stacked weights, or a loop that shares
  one attention and switches between the layers' own weights (as `Decoder` does on CPU);
* one KV array per layer, or one stacked array (in the scan: carried whole through the loop,
  and addressed by layer);
* weights [out, in] or [in, out]; activations token-major [T, E] or feature-major [E, T].

    python scripts/measure_layer_layouts.py [--pages 1000] [--repeats 20]

The trap it exists to show: "temporaries" as large as the KV pool mean that XLA copies the pool
in every step. The step time includes the output head.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, E, HEADS, KV_HEADS, D, F, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
GROUP = HEADS // KV_HEADS
PAGE, CONTEXT = 16, 128
WEIGHTS = {  # name: (out, in)
    "qkv": ((HEADS + 2 * KV_HEADS) * D, E),
    "o": (E, HEADS * D),
    "gate_up": (2 * F, E),
    "down": (E, F),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """One variant of the step program."""

    layers: Literal["unrolled", "scan", "switch"]
    stacked_kv: bool
    out_in: bool = True
    feature_major: bool = False

    @property
    def row(self) -> str:
        """The variant as cells of the table."""
        return " | ".join(
            (
                self.layers,
                "stacked" if self.stacked_kv else "per layer",
                "[out, in]" if self.out_in else "[in, out]",
                "[E, T]" if self.feature_major else "[T, E]",
            )
        )


def project(layout: Layout, weight: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply activations [T, in] (or [in, T] where feature-major) by a weight."""
    w_in, x_in = int(layout.out_in), 1 - int(layout.feature_major)
    if layout.feature_major:
        return jax.lax.dot_general(weight, x, (((w_in,), (x_in,)), ((), ())))
    return jax.lax.dot_general(x, weight, (((x_in,), (w_in,)), ((), ())))


def norm(layout: Layout, x: jax.Array) -> jax.Array:
    """RMS-normalise over the features; no scale, which costs the same everywhere."""
    axis = 0 if layout.feature_major else 1
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 1e-5)


def attention(qkv: jax.Array, pool: jax.Array, layer: Any, batch: dict[str, jax.Array]):
    """Write K, V of [T, 960] into the pool and attend over each sequence's pages.

    The pool is [pages, 16, 2, KV heads, D], with a leading layer axis unless `layer` is None.
    Returns ([T, HEADS * D], pool).
    """
    tokens = qkv.shape[0]
    q, kv = qkv[:, : HEADS * D], qkv[:, HEADS * D :].reshape(tokens, 2, KV_HEADS, D)
    at = () if layer is None else (layer,)
    page, offset = batch["slots"] // PAGE, batch["slots"] % PAGE
    pool = pool.at[(*at, page, offset)].set(kv, mode="drop")
    context = pool[(*at, batch["pages"])].reshape(tokens, -1, 2, KV_HEADS, D)
    q = q.reshape(tokens, KV_HEADS, GROUP, D)
    scores = jnp.einsum("tkgd,tckd->tkgc", q, context[:, :, 0]) * D**-0.5
    seen = jnp.arange(context.shape[1]) < batch["lengths"][:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    out = jnp.einsum("tkgc,tckd->tkgd", weights, context[:, :, 1])
    return out.reshape(tokens, HEADS * D), pool


def block(layout: Layout, weights: dict[str, jax.Array], x, pool, layer, batch):
    """One transformer layer: returns (activations, pool)."""
    qkv = before_attention(layout, weights, x)
    mixed, pool = attention(qkv.T if layout.feature_major else qkv, pool, layer, batch)
    return after_attention(layout, weights, x, mixed), pool


def before_attention(layout: Layout, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Everything of a layer up to its Q, K and V."""
    return project(layout, weights["qkv"], norm(layout, x))


def after_attention(layout: Layout, weights: dict[str, jax.Array], x, mixed) -> jax.Array:
    """Everything of a layer behind attention."""
    x += project(layout, weights["o"], mixed.T if layout.feature_major else mixed)
    gate_up = project(layout, weights["gate_up"], norm(layout, x))
    gate, up = jnp.split(gate_up, 2, axis=0 if layout.feature_major else 1)
    return x + project(layout, weights["down"], jax.nn.silu(gate) * up)


def step(layout: Layout, weights: dict[str, Any], kv: Any, batch: dict[str, jax.Array]):
    """One greedy decode step: returns (token ids [T], kv)."""
    x = weights["embed"][batch["tokens"]]
    x = x.T if layout.feature_major else x
    if layout.layers == "switch":

        def turn(i, state):
            x, pool = state
            branches = [functools.partial(before_attention, layout, w) for w in weights["layers"]]
            mixed, pool = attention(jax.lax.switch(i, branches, x), pool, i, batch)
            branches = [functools.partial(after_attention, layout, w) for w in weights["layers"]]
            return jax.lax.switch(i, branches, x, mixed), pool

        x, kv = jax.lax.fori_loop(0, LAYERS, turn, (x, kv))
    elif layout.layers == "scan" and layout.stacked_kv:

        def carry(state, per_layer):
            x, pool = state
            return block(layout, per_layer[0], x, pool, per_layer[1], batch), None

        (x, kv), _ = jax.lax.scan(carry, (x, kv), (weights["layers"], jnp.arange(LAYERS)))
    elif layout.layers == "scan":

        def slices(x, per_layer):
            return block(layout, per_layer[0], x, per_layer[1], None, batch)

        # The nearest to "one array per layer" that a scan has: each layer's own slice in and out.
        x, kv = jax.lax.scan(slices, x, (weights["layers"], kv))
    elif layout.stacked_kv:
        for layer in range(LAYERS):
            x, kv = block(layout, weights["layers"][layer], x, kv, layer, batch)
    else:
        kv = list(kv)
        for layer in range(LAYERS):
            x, kv[layer] = block(layout, weights["layers"][layer], x, kv[layer], None, batch)
    x = norm(layout, x)
    head = dataclasses.replace(layout, out_in=True)  # the tied embedding is always [V, E]
    return jnp.argmax(project(head, weights["embed"], x), 0 if layout.feature_major else 1), kv


def make_weights(layout: Layout) -> dict[str, Any]:
    """Return random weights: per layer, or stacked for the scan."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5)

    shapes = {k: s if layout.out_in else s[::-1] for k, s in WEIGHTS.items()}
    layers: Any
    if layout.layers == "scan":
        layers = {k: weight(LAYERS, *shape) for k, shape in shapes.items()}
    else:
        layers = [{k: weight(*shape) for k, shape in shapes.items()} for _ in range(LAYERS)]
    return {"embed": weight(VOCAB, E), "layers": layers}


def make_batch(tokens: int, num_pages: int) -> dict[str, jax.Array]:
    """Return the inputs of `tokens` sequences with CONTEXT tokens, on pages of their own."""
    pages = np.arange(tokens * (CONTEXT // PAGE)).reshape(tokens, -1) % num_pages
    return {
        "tokens": jnp.arange(tokens) + 7,
        "pages": jnp.asarray(pages),
        "slots": jnp.asarray(pages[:, -1] * PAGE + PAGE - 1),  # the newest token's place
        "lengths": jnp.full(tokens, CONTEXT),
    }


def measure(layout: Layout, weights: Any, tokens: int, num_pages: int, repeats: int) -> str:
    """Compile and time one variant; returns a row of the table."""
    shape = (num_pages, PAGE, 2, KV_HEADS, D)
    if layout.stacked_kv or layout.layers == "scan":
        kv: Any = jnp.zeros((LAYERS, *shape), jnp.float32)
    else:
        kv = [jnp.zeros(shape, jnp.float32) for _ in range(LAYERS)]
    batch = make_batch(tokens, num_pages)
    program = jax.jit(functools.partial(step, layout), donate_argnums=1)
    lowered = program.lower(weights, kv, batch)
    start = time.perf_counter()
    run: Callable[..., Any] = (compiled := lowered.compile())
    compile_seconds = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out, kv = run(weights, kv, batch)
        out.block_until_ready()
        jax.block_until_ready(kv)
        times.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not report memory"
    best, middle = 1e3 * min(times), 1e3 * float(np.median(times))
    return (
        f"| {tokens} | {layout.row} | {compile_seconds:.2f} | {best:.1f} | {middle:.1f} "
        f"| {memory.temp_size_in_bytes / 2**20:.1f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--pages", type=int, default=1000, help="pages of 16 tokens in the pool")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per variant")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    pool = LAYERS * args.pages * PAGE * 2 * KV_HEADS * D * 4 / 2**20
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, KV pool {pool:.0f} MiB\n")
    print(
        "| tokens | layers | KV | weights | activations | compile s | best ms | median ms | ",
        end="",
    )
    print("temporaries MiB |\n|---:|---|---|---|---|---:|---:|---:|---:|")
    layouts = [
        Layout("switch", True),
        Layout("unrolled", True),
        Layout("unrolled", False),
        Layout("scan", True),
        Layout("scan", False),
        Layout("unrolled", True, out_in=False),
        Layout("unrolled", True, feature_major=True),
    ]
    for layout in layouts:
        weights = make_weights(layout)
        for tokens in args.tokens:
            print(measure(layout, weights, tokens, args.pages, args.repeats), flush=True)


if __name__ == "__main__":
    main()
