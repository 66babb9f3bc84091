"""Penalties and biases of a late step as a list of edits of single logits: the host's side.

A request's penalties touch the tokens it has so far, one in a hundred of the vocabulary; so the
device is told which logits to change and how, and not a number for every logit. Tokens are
counted anew from the history in every step: the device keeps nothing of a request, which could
be preempted, moved or gone.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.step import SamplingExtras
from jaxserve.runner.logit_programs import ALL_TOKENS, EDIT_FIELDS, NO_ROW

NO_EXTRAS = SamplingExtras()


class LateRow(NamedTuple):
    """A row that samples in a late step.

    Attributes:
        shard: index on the mesh's data axis.
        place: index among the shard's rows.
        params: the request's settings.
        extras: what else its token depends on.
    """

    shard: int
    place: int
    params: SamplingParams
    extras: SamplingExtras = NO_EXTRAS


def pack_edits(
    rows: Iterable[LateRow], *, num_shards: int, capacity: int, vocab_size: int
) -> list[np.ndarray]:
    """The edits of a step's rows, in as many arrays as it takes; none if nothing is edited.

    Args:
        rows: the step's rows.
        num_shards: data shards.
        capacity: edits per shard that one array holds.
        vocab_size: tokens are below it.

    Returns:
        Arrays int32 [num_shards, EDIT_FIELDS, capacity]; see `logit_programs.edit_logits`.

    Raises:
        ValueError: a token is not in the vocabulary.
    """
    shards: list[list[np.ndarray]] = [[] for _ in range(num_shards)]
    for row in rows:
        if row.params.logit_bias or (row.params.has_penalties and len(row.extras.history)):
            shards[row.shard].append(_row_edits(row, vocab_size))
    joined = [np.concatenate(edits, axis=1) if edits else None for edits in shards]
    longest = max((edits.shape[1] for edits in joined if edits is not None), default=0)
    calls = []
    for start in range(0, longest, capacity):
        call = np.zeros((num_shards, EDIT_FIELDS, capacity), np.int32)
        call[:, 0] = NO_ROW
        for shard, edits in enumerate(joined):
            if edits is not None:
                part = edits[:, start : start + capacity]
                call[shard, :, : part.shape[1]] = part
        calls.append(call)
    return calls


def _row_edits(row: LateRow, vocab_size: int) -> np.ndarray:
    """One row's edits, int32 [EDIT_FIELDS, n]: every token once.

    As in vLLM, a bias comes first, then the repetition penalty of all tokens so far, then
    frequency and presence penalties of those of the answer.
    """
    params, extras = row.params, row.extras
    history = np.asarray(extras.history if params.has_penalties else (), np.int64)
    num_prompt = extras.num_prompt_tokens
    if params.repetition_penalty == 1:  # the prompt does not matter
        history, num_prompt = history[num_prompt:], 0
    biases = np.array([token for token, _ in params.biases], np.int64)
    tokens, places = np.unique(np.concatenate([history, biases]), return_inverse=True)
    if len(tokens) and not 0 <= tokens[0] <= tokens[-1] < vocab_size:
        raise ValueError(f"tokens {tokens[0]}..{tokens[-1]} are not all in [0, {vocab_size})")
    count, answer = len(tokens), places[num_prompt : len(history)]
    factor = np.ones(count, np.float32)
    factor[places[: len(history)]] = params.repetition_penalty
    counts = np.bincount(answer, minlength=count)
    minus = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    values = np.array([value for _, value in params.biases])
    bias = np.bincount(places[len(history) :], values, minlength=count)

    edits = np.empty((EDIT_FIELDS, count), np.int32)
    edits[0], edits[1] = row.place, tokens
    edits.view(np.float32)[2:] = bias, factor, minus
    return edits


def pack_masks(rows: Iterable[LateRow], shape: tuple[int, ...]) -> np.ndarray | None:
    """The masks of a step's rows, or None if no row has any.

    Args:
        rows: the step's rows.
        shape: of the result: shards, rows per shard, words of a mask.

    Returns:
        uint32; all tokens are allowed where a row has no mask.

    Raises:
        ValueError: a mask has another length, or allows nothing.
    """
    masks = None
    for row in rows:
        mask = row.extras.mask
        if mask is None:
            continue
        if mask.shape != shape[2:] or mask.dtype != np.uint32:
            raise ValueError(f"a mask is {mask.dtype} {mask.shape}, not uint32 {shape[2:]}")
        if not mask.any():
            raise ValueError("a mask allows no token at all")
        if masks is None:
            masks = np.full(shape, ALL_TOKENS)
        masks[row.shard, row.place] = mask
    return masks
