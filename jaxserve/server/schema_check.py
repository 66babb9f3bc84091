"""Judges finished answers by what of their JSON schema no grammar of tokens can enforce."""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any, NoReturn

import jsonschema_rs

from jaxserve.core.json_schema import left_out
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.outputs import TokenDelta
from jaxserve.tokenizers.base import Tokenizer

log = logging.getLogger(__name__)

# Steps of a pattern that looks around: such patterns can take for ever on a text made for it.
_PATTERNS = jsonschema_rs.FancyRegexOptions(backtrack_limit=100_000)
_MAX_RULE_CHARS = 300


class SchemaCheck:
    """Looks at the answers to one request once they are whole.

    An answer that does not fit is sent all the same, since OpenAI's API has no word for it: it
    costs a log line, and is counted.

    Args:
        request_id: for the log.
        params: of the request.
        tokenizer: the served model's.
        count: called for each answer that does not fit.
    """

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        tokenizer: Tokenizer,
        count: Callable[[], object],
    ) -> None:
        grammar = params.grammar
        self._source = None
        if grammar is not None and grammar.kind == "json_schema" and not grammar.is_strict:
            self._source = grammar.source
        self._request_id = request_id
        self._params = params
        self._tokenizer = tokenizer
        self._count = count
        self._ids: dict[int, list[int]] = {}

    async def take(self, index: int, delta: TokenDelta) -> None:
        """Take the next delta of an answer; judge the answer if it is the last one."""
        if self._source is None:
            return
        ids = self._ids.setdefault(index, [])
        ids += delta.token_ids
        if delta.finish_reason is None:
            return
        del self._ids[index]
        if not delta.finish_reason.is_natural:
            return
        rule = await asyncio.to_thread(self._broken_rule, ids, self._source)
        if rule is not None:
            log.warning("request %s: an answer breaks its schema's %s", self._request_id, rule)
            self._count()

    def _broken_rule(self, ids: list[int], source: str) -> str | None:
        schema = json.loads(source)
        if not left_out(schema):
            return None
        try:
            answer = json.loads(self._tokenizer.decode(self._after_thoughts(ids)))
        except (ValueError, RecursionError):
            return None  # cut off
        return broken_rule(schema, answer)

    def _after_thoughts(self, ids: list[int]) -> list[int]:
        if self._params.thinking is None:
            return ids
        end = list(self._params.thinking.end_ids)
        for i in range(len(ids) - len(end) + 1):
            if ids[i : i + len(end)] == end:
                return ids[i + len(end) :]
        return ids


def broken_rule(schema: Any, answer: Any) -> str | None:
    """The first rule of a schema that a value breaks; None if there is none.

    That is also so if the schema is none. Nothing is fetched from elsewhere for it, and no pattern
    takes for ever.

    Args:
        schema: a JSON schema, as parsed.
        answer: a JSON value, as parsed.

    Returns:
        The rule's place, as `properties.x.not`. It has nothing of the answer, for logs.
    """
    try:
        validator = jsonschema_rs.validator_for(
            schema, pattern_options=_PATTERNS, retriever=_refuse_to_fetch
        )
        error = next(iter(validator.iter_errors(answer)), None)
    except ValueError as error:
        log.debug("a schema cannot be judged by: %s", error)
        return None
    return None if error is None else ".".join(map(str, error.schema_path))[:_MAX_RULE_CHARS]


def _refuse_to_fetch(uri: str) -> NoReturn:
    raise ValueError(f"{uri} is not part of the schema")
