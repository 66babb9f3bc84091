"""What every tokenizer can do; the two real ones and the test one differ in a few methods."""

import abc
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.tokenizers.chat import ChatTemplate
from jaxserve.tokenizers.settings import TokenizerSettings, write_settings


class Tokenizer(abc.ABC):
    """Maps text to token ids and back.

    Decoding is defined by bytes: every token stands for a run of bytes, a text is all of them
    in a row, read as UTF-8 with U+FFFD for each invalid sequence (the Unicode standard's
    "maximal subpart" rule, as in Python's codecs). An incremental decoder can therefore agree
    with `decode` exactly. No "clean up" of spaces takes place.

    Args:
        settings: beginning and end tokens, and the chat template.
        vocab_size: ids are in [0, vocab_size).
        special_ids: ids that stand for no text (beginning, end, turns of a chat, ...).
        drops_leading_space: the encoder puts a space before a text, so `decode` removes one.
    """

    def __init__(
        self,
        settings: TokenizerSettings,
        *,
        vocab_size: int,
        special_ids: Iterable[int],
        drops_leading_space: bool = False,
    ) -> None:
        self.settings = settings
        self.vocab_size = vocab_size
        self.special_ids = frozenset(special_ids)
        self.drops_leading_space = drops_leading_space

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, or None where the model has none."""
        return self.settings.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation."""
        return self.settings.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that turns messages into a prompt, if the model has one."""
        return self.settings.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Special tokens spelled out in it become their one id.

        Args:
            text: any text that UTF-8 can carry.
            add_special_tokens: add what the model was trained with around a text (often BOS).

        Raises:
            InvalidRequest: the text has a lone surrogate, which no UTF-8 can carry.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        ids = self._encode_text(text)
        if not add_special_tokens:
            return ids
        return [*self.settings.prefix_ids, *ids, *self.settings.suffix_ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside of the vocabulary stand for nothing."""
        joined = b"".join(self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids)
        if self.drops_leading_space:
            joined = joined.removeprefix(b" ")
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes one token stands for; they may begin or end inside of a character.

        Empty for ids outside of the vocabulary (models pad theirs), and for special tokens
        unless `skip_special_tokens` is False, when it is the special token's own name.
        """
        if not 0 <= token_id < self.vocab_size:
            return b""
        if skip_special_tokens and token_id in self.special_ids:
            return b""
        return self._piece_bytes(token_id)

    @property
    def chat_variables(self) -> frozenset[str]:
        """Names that the chat template reads, such as `tools`; none where there is no template."""
        template = self._compiled_template
        return frozenset() if template is None else template.variables

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text that the model's chat template makes of the messages.

        Args and errors are those of `apply_chat_template`.
        """
        if self._compiled_template is None:
            raise InvalidRequest("this model has no chat template; send a plain prompt instead")
        bos, eos = self.bos_token_id, self.eos_token_ids
        return self._compiled_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=chat_template_kwargs,
            bos_token="" if bos is None else self._piece_bytes(bos).decode(),
            eos_token=self._piece_bytes(eos[0]).decode() if eos else "",
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation.

        The template alone decides whether there is a BOS, as in transformers, with which
        models are trained: adding one here would double it.

        Args:
            messages: in OpenAI's shape, each with at least "role" and "content"; see
                `tokenizers.messages.template_messages`.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end within the last message instead, for the answer to
                continue it.
            tools: functions that the model may call, in OpenAI's shape, for templates that read
                `tools` (see `chat_variables`).
            chat_template_kwargs: values of variables that the template reads, such as
                `enable_thinking`.

        Raises:
            InvalidRequest: there is no template, it refuses these messages, it reads no tools or
                no such variable, or a message has a wrong shape.
        """
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write files from which `load_tokenizer(directory)` makes an equal tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        self._save_vocabulary(directory)
        extra = self._extra_config()
        write_settings(directory, self.settings, lambda i: self._piece_bytes(i).decode(), extra)

    @functools.cached_property
    def _compiled_template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    def _extra_config(self) -> dict[str, object]:
        """More entries for tokenizer_config.json."""
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    @abc.abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, or None."""

    @abc.abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""

    @abc.abstractmethod
    def _piece_bytes(self, token_id: int) -> bytes:
        """Bytes of a token of the vocabulary; the name of a special one."""

    @abc.abstractmethod
    def _save_vocabulary(self, directory: Path) -> None:
        """Write the vocabulary file that the loader recognizes."""
