"""What every tokenizer can do; the two real ones and the test one differ in a few methods."""

import abc
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.json_values import is_too_deep
from jaxserve.tokenizers.chat import ChatTemplate
from jaxserve.tokenizers.control_marks import ControlMarks
from jaxserve.tokenizers.messages import template_messages
from jaxserve.tokenizers.settings import TokenizerSettings, settings_config, write_settings

# Models write such tags inside of a turn (<think>, <tool_call>), and templates look for them.
_TAG = re.compile(r"</?[\w-]+>")


class ChatPrompt(NamedTuple):
    """A conversation as the model gets it.

    Attributes:
        text: what the chat template made of it.
        token_ids: the text's; names of control tokens in what came from the caller are text.
    """

    text: str
    token_ids: list[int]


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

    Attributes:
        parses_special_in_chat: a caller's text in a chat may have control tokens, spelled out.
            Off, for whoever writes a part of a prompt could else end their turn in it and speak
            as somebody else.
    """

    parses_special_in_chat = False

    def __init__(
        self,
        settings: TokenizerSettings,
        *,
        vocab_size: int,
        special_ids: Iterable[int],
        drops_leading_space: bool = False,
    ) -> None:
        settings.check_vocabulary(vocab_size)
        self.settings = settings
        self.vocab_size = vocab_size
        self.special_ids = frozenset(special_ids)
        self.drops_leading_space = drops_leading_space
        self._templates: dict[str, ChatTemplate] = {}

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

    @property
    def tool_template(self) -> str | None:
        """The one that is taken for messages with tools: `tool_use` where there is such a one."""
        return self.settings.named_templates.get("tool_use", self.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Special tokens spelled out in it become their one id.

        Args:
            text: any text that UTF-8 can carry.
            add_special_tokens: add what the model was trained with around a text (often BOS).

        Raises:
            InvalidRequest: the text has a lone surrogate, which no UTF-8 can carry.
        """
        _check_unicode(text)
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
        """Names that the chat templates read, such as `tools`; none where there is no template."""
        sources = filter(None, {self.chat_template, self.tool_template})
        return frozenset().union(*(self._compiled(source).variables for source in sources))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """A conversation's text and token ids, by the model's chat template.

        The template alone decides whether there is a BOS, as in transformers, with which
        models are trained: adding one here would double it.

        Control tokens are the template's: what the caller's texts spell out like one is encoded
        as the text that it is, unless `parses_special_in_chat`.

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
        source = self.tool_template if tools else self.chat_template
        if source is None:
            for_tools = " for conversations without tools" if self.tool_template else ""
            raise InvalidRequest(
                f"this model has no chat template{for_tools}; send a plain prompt instead"
            )
        for name, value in (("tools", tools), ("chat_template_kwargs", chat_template_kwargs)):
            if is_too_deep(value):
                raise InvalidRequest(f"{name} is nested too deep", param=name)
        marks = ControlMarks(()) if self.parses_special_in_chat else self._control_marks
        bos, eos = self.bos_token_id, self.eos_token_ids
        marked = self._compiled(source).render(
            marks.mark_messages(template_messages(messages)),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=marks.mark(tools),
            variables=_marked_values(chat_template_kwargs, marks),
            bos_token="" if bos is None else self._piece_bytes(bos).decode(),
            eos_token=self._piece_bytes(eos[0]).decode() if eos else "",
            special_tokens=self.settings.special_tokens,
        )
        text = marks.restored(marked)
        ids = self.encode(text, add_special_tokens=False)
        control = self._control_ids
        if not self.parses_special_in_chat and [i for i in ids if i in control] != [
            self.token_to_id(name) for name in marks.control_in(marked)
        ]:
            ids = self._encode_marked(marked)
        return ChatPrompt(text, ids)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """The token ids of a conversation; arguments and errors are those of `render_chat`."""
        return self.render_chat(messages, **options).token_ids

    def save(self, directory: Path) -> None:
        """Write files from which `load_tokenizer(directory)` makes an equal tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        self._save_vocabulary(directory)
        write_settings(directory, self.settings, self._token_name, self._extra_config())

    def config(self) -> dict[str, object]:
        """What `save` writes as tokenizer_config.json: special tokens by name, chat template."""
        return settings_config(self.settings, self._token_name, self._extra_config())

    def _token_name(self, token_id: int) -> str:
        return self._piece_bytes(token_id).decode()

    def _compiled(self, source: str) -> ChatTemplate:
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source)
        return self._templates[source]

    @functools.cached_property
    def _control_marks(self) -> ControlMarks:
        """Control tokens are those that stand for no text, and those that the template writes."""
        special = [self._piece_bytes(i).decode() for i in self.special_ids]
        template = f"{self.chat_template or ''}{self.tool_template or ''}"
        others = sorted(self._text_tokens())
        written = [name for name in others if name in template and name.strip()]
        return ControlMarks(
            [*filter(str.strip, special), *written],
            [*others, *_TAG.findall(template)],
            [name for name in written if _TAG.fullmatch(name)],
        )

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        ids = (self.token_to_id(name) for name in self._control_marks.control)
        return frozenset(i for i in ids if i is not None)

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
    def _encode_marked(self, text: str) -> list[int]:
        """Token ids of a text with `_control_marks`, where what is marked is never a token."""

    @abc.abstractmethod
    def _text_tokens(self) -> Collection[str]:
        """Names that are found in a text before it is cut into pieces, and stand for text."""

    @abc.abstractmethod
    def _piece_bytes(self, token_id: int) -> bytes:
        """Bytes of a token of the vocabulary; the name of a special one."""

    @abc.abstractmethod
    def _save_vocabulary(self, directory: Path) -> None:
        """Write the vocabulary file that the loader recognizes."""


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text is not valid Unicode: {error}") from error


def _marked_values(variables: Mapping[str, Any] | None, marks: ControlMarks) -> dict[str, Any]:
    return {name: marks.mark(value) for name, value in (variables or {}).items()}
