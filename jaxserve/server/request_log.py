"""One log line per request, when it has ended."""

import logging
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.records import RequestRecord
from jaxserve.tokenizers.base import Tokenizer

log = logging.getLogger("jaxserve.requests")

_SECONDS = {
    "queue_seconds": "queue_seconds",
    "ttft_seconds": "time_to_first_token",
    "prefill_seconds": "prefill_seconds",
    "decode_seconds": "decode_seconds",
    "e2e_seconds": "e2e_seconds",
}


class RequestLog:
    """Writes the lines, at level INFO, to the logger `jaxserve.requests`; a `RequestConsumer`.

    Args:
        tokenizer: turns prompts into text; None: no line has any of it.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        log.setLevel(logging.INFO)

    def __call__(self, record: RequestRecord, prompt_token_ids: Sequence[int]) -> None:
        """Write one."""
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "finish_reason": record.finish_reason.value,
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "preemptions": record.num_preemptions,
        }
        if record.tenant:
            fields["tenant"] = record.tenant
        for name, attribute in _SECONDS.items():
            seconds = getattr(record, attribute)
            if seconds is not None:
                fields[name] = round(seconds, 6)
        if self._tokenizer is not None:
            fields["prompt"] = self._tokenizer.decode(list(prompt_token_ids))
        log.info("request ended", extra=fields)
