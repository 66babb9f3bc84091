"""What the host tells the sampler of rows whose tokens depend on those before."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxserve.core.errors import JaxserveError, RequestFailed
from jaxserve.core.request import Request
from jaxserve.core.step import SamplingExtras, StepPlan
from jaxserve.engine.grammars import GrammarState, MaskFiller
from jaxserve.engine.sampling_rules import SamplingRules
from jaxserve.engine.stream import RequestStream

log = logging.getLogger(__name__)

_NOTHING = (
    "no token can come next: the request's grammar, allowed_token_ids, bad_words and min_tokens "
    "leave none"
)


class LateExtras(NamedTuple):
    """What `Executor.sample` is told, and who has no next token.

    Attributes:
        by_row: extras by index of the row.
        complete: requests whose answer is complete and cannot go on.
        failed: requests for which no token can be found, and why.
    """

    by_row: dict[int, SamplingExtras]
    complete: list[Request]
    failed: list[tuple[Request, JaxserveError]]


class _Ruled(NamedTuple):
    """A row whose request has rules."""

    index: int
    request: Request
    rules: SamplingRules


def late_extras(
    plan: StepPlan, streams: Mapping[int, RequestStream], masks: MaskFiller
) -> LateExtras:
    """Work out the extras of a step's late rows.

    A request whose rules fail does not disturb the others.

    Args:
        plan: the step; the host knows all tokens before it.
        streams: by key, the requests that have not ended.
        masks: fills the masks of grammars.
    """
    extras = LateExtras({}, [], [])
    ruled: list[_Ruled] = []
    for index, row in enumerate(plan.rows):
        stream = streams.get(row.key) if row.late else None
        if stream is None:
            continue
        if row.params.has_penalties:
            extras.by_row[index] = _history(stream)
        if stream.rules is not None:
            try:
                stream.rules.follow(stream.request.output_token_ids)
                ruled.append(_Ruled(index, stream.request, stream.rules))
            except Exception as error:
                extras.failed.append((stream.request, _failure(error)))
    states = _grammar_states([entry for entry in ruled if entry.rules.matcher], masks)
    for entry in ruled:
        try:
            _allow(entry, states.get(entry.index), extras)
        except Exception as error:
            extras.failed.append((entry.request, _failure(error)))
    return extras


def _grammar_states(
    ruled: Sequence[_Ruled], masks: MaskFiller
) -> dict[int, GrammarState | JaxserveError]:
    matchers = [entry.rules.matcher for entry in ruled]
    try:
        states = masks.fill([matcher for matcher in matchers if matcher is not None])
    except Exception as error:
        states = [_failure(error)] * len(ruled)
    return {entry.index: state for entry, state in zip(ruled, states, strict=True)}


def _allow(entry: _Ruled, grammar: GrammarState | JaxserveError | None, extras: LateExtras) -> None:
    if isinstance(grammar, JaxserveError):
        raise grammar
    allowed = entry.rules.allowed(entry.request.output_token_ids, grammar)
    if allowed.mask is None:
        return
    if allowed.mask.any():
        before = extras.by_row.get(entry.index, SamplingExtras())
        extras.by_row[entry.index] = before._replace(mask=allowed.mask)
    elif allowed.is_complete:
        extras.complete.append(entry.request)
    else:
        raise RequestFailed(_NOTHING)


def _failure(error: Exception) -> JaxserveError:
    if isinstance(error, JaxserveError):
        return error
    log.error("a request's sampling rules failed", exc_info=error)
    return RequestFailed("the request's sampling rules failed; see the server's log")


def _history(stream: RequestStream) -> SamplingExtras:
    request = stream.request
    prompt = request.prompt_token_ids
    return SamplingExtras(None, prompt + request.output_token_ids, len(prompt))
