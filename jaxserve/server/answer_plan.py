"""How the answers to one request are asked for and read: with tools, with thoughts, or plain."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.server.answer_events import AnswerEvent, Content, TextReader
from jaxserve.server.reasoning.registry import think_format
from jaxserve.server.reasoning.think import ThinkFormat, ThinkStream
from jaxserve.server.reasoning.thought_tokens import ThoughtTokens
from jaxserve.server.tools.call_marks import CallMarks
from jaxserve.server.tools.call_stream import CallStream
from jaxserve.server.tools.format import ToolFormat
from jaxserve.server.tools.prompting import with_tools_as_text
from jaxserve.server.tools.registry import tool_format
from jaxserve.server.tools.tool import Tool, ToolChoice
from jaxserve.tokenizers.base import Tokenizer

_NO_LIMIT = 2**31 - 1


def check_parsers(tool_call_parser: str, reasoning_parser: str) -> None:
    """Refuse parsers that do not exist.

    Raises:
        ConfigError: there is none of that name.
    """
    tool_format(tool_call_parser, chat_template=None, family="")
    think_format(reasoning_parser)


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How the served model writes what is not plain content.

    Attributes:
        calls: tool calls.
        thoughts: thoughts, if they are to be told apart.
        tokenizer: the model's.
    """

    calls: ToolFormat
    thoughts: ThinkFormat | None
    tokenizer: Tokenizer

    @classmethod
    def of_model(
        cls, tool_call_parser: str, reasoning_parser: str, tokenizer: Tokenizer, family: str
    ) -> "AnswerFormat":
        """The format that the server's options name, for a model.

        Raises:
            ConfigError: there is none of that name.
        """
        calls = tool_format(tool_call_parser, chat_template=tokenizer.tool_template, family=family)
        return cls(calls, think_format(reasoning_parser), tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """What one request wants of its answers, beside what the sampler knows.

    Attributes:
        form: how the model writes.
        tools: those that the request offers.
        choice: whether they are used.
        is_parallel: there may be several calls in an answer.
        thinking_budget: tokens of thought at most; None or -1, as in vLLM, for as many as it likes.
    """

    form: AnswerFormat
    tools: Sequence[Tool] = ()
    choice: ToolChoice = dataclasses.field(default_factory=ToolChoice)
    is_parallel: bool = True
    thinking_budget: int | None = None

    def messages(self, given: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """The messages for the chat template; with the tools, where it knows of none.

        Raises:
            InvalidRequest: a message has a wrong shape.
        """
        if self._template_knows_tools:
            return given
        has_calls = any(m.get("tool_calls") or m.get("role") == "tool" for m in given)
        if not self._offered and not has_calls:
            return given
        return with_tools_as_text(given, self._offered, self.form.calls)

    def template_tools(self) -> list[dict[str, Any]]:
        """The tools for the chat template, if it knows of any."""
        return [tool.for_template() for tool in self._offered if self._template_knows_tools]

    def shaped(self, params: SamplingParams, begun: str | None) -> SamplingParams:
        """The sampler's parameters with what the calls and thoughts need.

        A call that is required, or is to fit its schema in any case, is a matter of a grammar, and
        so is that there is only one. A grammar is for what comes after thoughts.

        Args:
            params: with the request's own grammar, if it has one.
            begun: what the prompt has of a thought that the model goes on with, or None.

        Raises:
            InvalidRequest: the grammar is too long, or the model is not known to think and has a
                budget for it.
        """
        grammar = self._grammar(params.grammar)
        thoughts = self.form.thoughts
        budget = None if self.thinking_budget == -1 else self.thinking_budget
        if thoughts is None and budget is not None:
            raise InvalidRequest(
                "thinking_token_budget: the server has no reasoning parser that says where this "
                "model's thoughts end",
                param="thinking_token_budget",
            )
        thinking = None
        if thoughts is not None and (grammar is not None or budget is not None):
            thinking = thoughts.budget(
                _NO_LIMIT if budget is None else budget,
                self.form.tokenizer,
                begun=begun,
            )
        return dataclasses.replace(
            params,
            grammar=grammar,
            thinking=thinking,
            skip_special_tokens=params.skip_special_tokens and not self._has_special_markers(),
        )

    def reader(self, begun: str | None, params: SamplingParams) -> TextReader:
        """Reads one answer.

        Args:
            begun: what the prompt has of a thought that the model goes on with, or None.
            params: the sampler's, from `shaped`.
        """
        thoughts = self.form.thoughts
        think = None
        if thoughts is not None:
            think = ThinkStream(thoughts, begun=begun)
        calls = None
        if self._offered:
            names = [tool.name for tool in self._callable]
            calls = CallStream(self._marks(params.grammar), names, is_parallel=self.is_parallel)
        return AnswerReader(think, calls)

    def thought_tokens(self, begun: str | None) -> ThoughtTokens | None:
        """Counts the thoughts of one answer; None if there are none to be told apart.

        Args:
            begun: what the prompt has of a thought that the model goes on with, or None.
        """
        thoughts = self.form.thoughts
        return thoughts and ThoughtTokens(thoughts, self.form.tokenizer, begun)

    @property
    def is_plain(self) -> bool:
        """Whether answers are nothing but content."""
        return self.form.thoughts is None and not self._offered

    @property
    def _template_knows_tools(self) -> bool:
        return "tools" in self.form.tokenizer.chat_variables

    @property
    def _offered(self) -> Sequence[Tool]:
        return () if self.choice.mode == "none" else self.tools

    @property
    def _callable(self) -> Sequence[Tool]:
        allowed = self.choice.allowed
        return [tool for tool in self._offered if allowed is None or tool.name in allowed]

    def _grammar(self, own: Grammar | None) -> Grammar | None:
        tools, calls = self._callable, self.form.calls
        if not tools:
            return own
        if self.choice.is_forced:
            # The answer is calls alone: its own grammar is for a content that it does not have.
            named = [tool for tool in tools if tool.name == self.choice.name]
            return calls.forced(named or tools, is_parallel=self.is_parallel and not named)
        if own is not None:
            return calls.or_else(own, tools, is_parallel=self.is_parallel)
        is_free = self.is_parallel and len(tools) == len(self._offered)
        if any(tool.is_strict for tool in tools) or not is_free:
            return calls.auto(tools, is_parallel=self.is_parallel)
        return None

    def _marks(self, grammar: Grammar | None) -> CallMarks:
        """Where calls are in an answer that this grammar shapes, if any."""
        calls = self.form.calls
        if grammar is None:
            return calls.marks
        if self.choice.is_forced or not self._callable:
            return calls.enforced_marks
        is_auto = grammar == calls.auto(self._callable, is_parallel=self.is_parallel)
        return calls.auto_marks if is_auto else calls.enforced_marks

    def _has_special_markers(self) -> bool:
        """Whether a marker is a token that stands for no text, unless such are spelled out."""
        markers: list[str] = []
        if self.form.thoughts is not None:
            markers += [self.form.thoughts.start, self.form.thoughts.end]
        if self._offered and self.form.calls.marks.anywhere:
            markers += self.form.calls.marks.openers
        tokenizer = self.form.tokenizer
        return any(tokenizer.token_to_id(marker) in tokenizer.special_ids for marker in markers)


class AnswerReader:
    """Thoughts first, then content and calls; see `TextReader`.

    Args:
        thoughts: tells thoughts, if there may be any.
        calls: tells calls, if there may be any.
    """

    def __init__(self, thoughts: TextReader | None, calls: TextReader | None) -> None:
        self._thoughts = thoughts
        self._calls = calls

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece; what has become certain."""
        if self._thoughts is None:
            return self._read(text)
        return self._refined(self._thoughts.push(text))

    def finish(self, *, is_cut: bool = False) -> list[AnswerEvent]:
        """The text is over; what was held back."""
        events: list[AnswerEvent] = []
        if self._thoughts is not None:
            events += self._refined(self._thoughts.finish(is_cut=is_cut))
        if self._calls is not None:
            events += self._calls.finish(is_cut=is_cut)
        return events

    def _refined(self, events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        return [
            finer
            for event in events
            for finer in (self._read(event.text) if isinstance(event, Content) else [event])
        ]

    def _read(self, text: str) -> list[AnswerEvent]:
        if self._calls is not None:
            return self._calls.push(text)
        return [Content(text)] if text else []
