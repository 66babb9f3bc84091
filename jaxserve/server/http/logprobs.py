"""Log-probabilities in the shapes of OpenAI's and vLLM's APIs."""

from collections.abc import Sequence
from typing import Any

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.tokenizers.base import Tokenizer

_LEAST = -9999.0  # JSON has no infinity; this is what OpenAI's API says for it


def chat_logprobs(items: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""
    content = [
        {
            **_chat_token(item.token_id, item.logprob, tokenizer),
            "top_logprobs": [
                _chat_token(token, logprob, tokenizer)
                for token, logprob in zip(item.top_ids, item.top_logprobs, strict=True)
            ],
        }
        for item in items
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token_id, skip_special_tokens=False)
    return {
        "token": piece.decode("utf-8", errors="replace"),
        "logprob": max(logprob, _LEAST),
        "bytes": list(piece),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, or of each of its chunks.

    Args:
        tokenizer: the served model's.
        as_ids: tokens are named `token_id:N`, as with vLLM's `return_tokens_as_token_ids`.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._offset = 0  # characters of text so far

    def of(self, items: Sequence[TokenLogprobs | int], num_top: int) -> dict[str, Any]:
        """The object for the next tokens.

        Args:
            items: of each token; a token alone has no log-probability (a prompt's first one).
            num_top: entries of `top_logprobs`; 0 for none, which is null there.
        """
        tokens, offsets, logprobs, tops = [], [], [], []
        for item in items:
            token_id = item if isinstance(item, int) else item.token_id
            tokens.append(self._name(token_id))
            offsets.append(self._offset)
            self._offset += len(self._text(token_id))
            logprobs.append(None if isinstance(item, int) else max(item.logprob, _LEAST))
            tops.append(None if isinstance(item, int) else self._top(item))
        return {
            "text_offset": offsets,
            "token_logprobs": logprobs,
            "tokens": tokens,
            "top_logprobs": tops if num_top else None,
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        # The token itself is always among them, as in OpenAI's API ("up to logprobs + 1").
        top = {
            self._name(token): max(logprob, _LEAST)
            for token, logprob in zip(item.top_ids, item.top_logprobs, strict=True)
        }
        top.setdefault(self._name(item.token_id), max(item.logprob, _LEAST))
        return top

    def _name(self, token_id: int) -> str:
        """A token's text; OpenAI's `bytes:` notation if it is not text by itself."""
        if self._as_ids:
            return f"token_id:{token_id}"
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _text(self, token_id: int) -> str:
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
        return piece.decode("utf-8", errors="replace")


def prompt_logprobs(
    items: Sequence[TokenLogprobs] | None, tokenizer: Tokenizer
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: an object by token id for each token; the first has none."""
    if items is None:
        return None
    return [None, *(_by_id(item, tokenizer) for item in items)]


def _by_id(item: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    entries = {
        str(token): _entry(token, logprob, rank, tokenizer)
        for rank, (token, logprob) in enumerate(
            zip(item.top_ids, item.top_logprobs, strict=True), 1
        )
    }
    own = _entry(item.token_id, item.logprob, item.rank, tokenizer)
    return {**entries, str(item.token_id): own}


def _entry(token: int, logprob: float, rank: int, tokenizer: Tokenizer) -> dict[str, Any]:
    piece = tokenizer.token_bytes(token, skip_special_tokens=False)
    return {
        "logprob": max(logprob, _LEAST),
        "rank": rank,
        "decoded_token": piece.decode("utf-8", errors="replace"),
    }
