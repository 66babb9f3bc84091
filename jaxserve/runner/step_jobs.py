"""Every program that a runner can call, by name, apart from those it cannot do without."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from jax.stages import Lowered

from jaxserve.runner.lowering import StepLowering

Job = Callable[[], Lowered]


class StepJobs(NamedTuple):
    """The programs of a runner.

    Attributes:
        needed: with these any step can run, padded to the largest buckets.
        rest: those of the smaller buckets, the smallest first: they decode.
    """

    needed: Mapping[str, Job]
    rest: Mapping[str, Job]


def step_jobs(lowering: StepLowering, *, stores: bool, copies: bool) -> StepJobs:
    """All programs of a runner with this lowering.

    Args:
        lowering: lowers them.
        stores: whether plans may save and fetch pages.
        copies: whether plans may have page copies.
    """
    buckets = lowering.program.buckets
    *tokens, most_tokens = buckets.tokens
    *sampled, most_sampled = buckets.sampled
    *late, most_late = buckets.late
    needed: dict[str, Job] = {
        **page_jobs(lowering, stores=stores, copies=copies),
        **backbone_jobs(lowering, most_tokens),
        f"sampler-{most_sampled}": partial(lowering.sampler, most_sampled),
        **late_jobs(lowering, most_late),
    }
    rest: dict[str, Job] = {}
    for n in tokens:
        rest |= backbone_jobs(lowering, n)
    rest |= {f"sampler-{n}": partial(lowering.sampler, n) for n in sampled}
    for n in late:
        rest |= late_jobs(lowering, n)
    return StepJobs(needed, rest)


def whole_name(num_tokens: int) -> str:
    """Name of the program that is the whole backbone."""
    return f"backbone-{num_tokens}"


def embed_name(num_tokens: int) -> str:
    """Name of the program before the spans."""
    return f"embed-{num_tokens}"


def span_name(kind: int, num_tokens: int) -> str:
    """Name of the program of all spans that are like the one of this number."""
    return f"span-{kind}-{num_tokens}"


def finish_name(num_tokens: int) -> str:
    """Name of the program after the spans."""
    return f"finish-{num_tokens}"


def backbone_jobs(lowering: StepLowering, num_tokens: int) -> dict[str, Job]:
    """The programs of the backbone in one token bucket: one, or those of its spans."""
    if len(lowering.program.spans) == 1:
        return {whole_name(num_tokens): partial(lowering.backbone, num_tokens)}
    jobs: dict[str, Job] = {embed_name(num_tokens): partial(lowering.embed, num_tokens)}
    for kind in dict.fromkeys(lowering.span_kinds):
        jobs[span_name(kind, num_tokens)] = partial(lowering.span, kind, num_tokens)
    return jobs | {finish_name(num_tokens): partial(lowering.finish, num_tokens)}


def late_jobs(lowering: StepLowering, n: int) -> dict[str, Job]:
    """The programs of late steps in one bucket of rows."""
    return {
        f"late-logits-{n}": partial(lowering.late_logits, n),
        f"edit-logits-{n}": partial(lowering.edit_logits, n),
        f"late-draw-{n}": partial(lowering.late_draw, n),
        f"logprobs-{n}": partial(lowering.token_logprobs, n),
    }


def page_jobs(lowering: StepLowering, *, stores: bool, copies: bool) -> dict[str, Job]:
    """The programs that move pages: none that no plan can ask for."""
    jobs: dict[str, Job] = {}
    for n in lowering.page_pieces if stores else ():
        jobs[f"save-pages-{n}"] = partial(lowering.save_pages, n)
        jobs[f"fetch-pages-{n}"] = partial(lowering.fetch_pages, n)
    if copies:
        jobs["copy-pages"] = lowering.copy_pages
    return jobs


def calls_kernels(name: str) -> bool:
    """Whether a program of this name has attention or linear layers in it."""
    return name.startswith(("backbone-", "span-", "sampler-", "late-logits-"))
