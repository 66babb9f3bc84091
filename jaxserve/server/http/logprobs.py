"""Log-probabilities in the shapes of OpenAI's and vLLM's APIs."""

from collections.abc import Sequence
from typing import Any

from jaxserve.core.logprobs import TokenLogprobs
from jaxserve.server.http.text_offsets import TextOffsets, prompt_offsets
from jaxserve.tokenizers.base import Tokenizer

_LEAST = -9999.0  # JSON has no infinity; this is what OpenAI's API says for it


class TokenNames:
    """What tokens are called in an answer.

    Args:
        tokenizer: the served model's.
        as_ids: `token_id:N`, for vLLM's `return_tokens_as_token_ids`; otherwise their texts.

    Attributes:
        tokenizer: as given.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def piece(self, token_id: int) -> bytes:
        """A token's bytes, a special one's name included."""
        return self.tokenizer.token_bytes(token_id, skip_special_tokens=False)

    def text(self, token_id: int) -> str:
        """A token's text, with U+FFFD where it is none by itself."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self.piece(token_id).decode("utf-8", errors="replace")

    def unique(self, token_id: int) -> str:
        """A token's text, or OpenAI's `bytes:` notation where it is none by itself."""
        if self._as_ids:
            return f"token_id:{token_id}"
        piece = self.piece(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(items: Sequence[TokenLogprobs], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""
    return {"content": response_logprobs(items, names), "refusal": None}


def response_logprobs(items: Sequence[TokenLogprobs], names: TokenNames) -> list[dict[str, Any]]:
    """`logprobs` of the Responses API, which are also the content of a chat's."""
    return [
        {
            **_chat_token(item.token_id, item.logprob, names),
            "top_logprobs": [
                _chat_token(token, logprob, names)
                for token, logprob in zip(item.top_ids, item.top_logprobs, strict=True)
            ],
        }
        for item in items
    ]


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.text(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": list(names.piece(token_id)),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of a completion, or of each of its chunks in turn.

    Args:
        names: what tokens are called.
        num_top: entries of `top_logprobs`; 0 for none, which is null there.
        echo: the text that the answer begins with; its tokens are the prompt's.
        skip_special_tokens: special tokens of the answer stand for no text.
    """

    def __init__(
        self, names: TokenNames, num_top: int, *, echo: str, skip_special_tokens: bool
    ) -> None:
        self._names = names
        self._num_top = num_top
        self._echo = echo
        self._offsets = TextOffsets(len(echo))
        self._skip = skip_special_tokens

    def of(
        self, prompt: Sequence[TokenLogprobs | int], answer: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        """The object for the next tokens.

        Args:
            prompt: of the prompt's tokens, if it is echoed and this is the first time; a token
                alone has no log-probability (the first one).
            answer: of the answer's next tokens.
        """
        tokenizer = self._names.tokenizer
        ids = [item if isinstance(item, int) else item.token_id for item in prompt]
        offsets = prompt_offsets(tokenizer, ids, self._echo)
        for item in answer:
            piece = tokenizer.token_bytes(item.token_id, skip_special_tokens=self._skip)
            offsets.append(self._offsets.push(piece))
        tokens, logprobs, tops = [], [], []
        for item in (*prompt, *answer):
            tokens.append(self._names.unique(item if isinstance(item, int) else item.token_id))
            logprobs.append(None if isinstance(item, int) else max(item.logprob, _LEAST))
            tops.append(None if isinstance(item, int) else self._top(item))
        return {
            "text_offset": offsets,
            "token_logprobs": logprobs,
            "tokens": tokens,
            "top_logprobs": tops if self._num_top else None,
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        # The token itself is always among them, as in OpenAI's API ("up to logprobs + 1").
        top = {
            self._names.unique(token): max(logprob, _LEAST)
            for token, logprob in zip(item.top_ids, item.top_logprobs, strict=True)
        }
        top.setdefault(self._names.unique(item.token_id), max(item.logprob, _LEAST))
        return top


def prompt_logprobs(
    items: Sequence[TokenLogprobs] | None, names: TokenNames
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: an object by token id for each token; the first has none."""
    if items is None:
        return None
    return [None, *(_by_id(item, names) for item in items)]


def _by_id(item: TokenLogprobs, names: TokenNames) -> dict[str, Any]:
    entries = {
        str(token): _entry(token, logprob, rank, names)
        for rank, (token, logprob) in enumerate(
            zip(item.top_ids, item.top_logprobs, strict=True), 1
        )
    }
    own = _entry(item.token_id, item.logprob, item.rank, names)
    return {**entries, str(item.token_id): own}


def _entry(token_id: int, logprob: float, rank: int, names: TokenNames) -> dict[str, Any]:
    return {
        "logprob": max(logprob, _LEAST),
        "rank": rank,
        "decoded_token": names.text(token_id),
    }
