"""`jaxserve generate`: a model in the terminal, no server between."""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.options import Command, GroupedOption, engine_options, in_flags, sentence
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import InvalidRequest, JaxserveError
from jaxserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.outputs import TokenDelta
    from jaxserve.llm import LLM, Prompt

DEFAULT_MAX_TOKENS = 256
INTERACTIVE_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the sampling flags, and its function those given, as `sampling`."""
    flags: tuple[tuple[str, Any, str], ...] = (
        ("--temperature", float, "0 always takes the likeliest token (default: the model's)"),
        ("--top-p", float, "keep the likeliest tokens that reach this probability together "
         "(default: the model's)"),
        ("--top-k", int, "keep this many of the likeliest tokens; 0 keeps all (default: the "
         "model's)"),
        ("--min-p", float, "drop tokens less likely than this times the likeliest (default: the "
         "model's)"),
        ("--seed", int, "make the answer reproducible"),
        ("--max-tokens", int, f"tokens to generate at most (default: {DEFAULT_MAX_TOKENS})"),
        ("--stop", str, "text that ends the answer and is not part of it (repeatable)"),
        ("--ignore-eos/--no-ignore-eos", bool, "generate on past the model's end token"),
    )  # fmt: skip
    names = [flag.split("/")[0][2:].replace("-", "_") for flag, _, _ in flags]

    @functools.wraps(function)
    def with_params(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(f"sampling_{name}") for name in names}
        given = {name: value for name, value in values.items() if value not in (None, ())}
        try:
            SamplingParams(**given)  # refused now, not after the model is loaded
        except JaxserveError as error:
            spelled = {name: f"--{name.replace('_', '-')}" for name in names}
            raise click.UsageError(in_flags(str(error), spelled)) from error
        return function(*args, sampling=given, **kwargs)

    for name, (flag, kind, text) in reversed(list(zip(names, flags, strict=True))):
        with_params = click.option(
            flag, f"sampling_{name}", cls=GroupedOption, group="sampling", help=sentence(text),
            type=None if kind is bool else kind, multiple=name == "stop", default=None,
        )(with_params)  # fmt: skip
    return with_params


@click.command(cls=Command)
@click.option("--prompt", metavar="TEXT", help="Complete this text; - reads it from stdin.")
@click.option("--chat", metavar="TEXT", help="Answer this message, as a chat; - reads stdin.")
@click.option("--interactive", is_flag=True, help=f"Chat in the terminal: {INTERACTIVE_HELP}.")
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@sampling_options
@engine_options(exclude=("seed", "served_model_name"))
def generate(
    config: EngineConfig,
    sampling: dict[str, Any],
    prompt: str | None,
    chat: str | None,
    interactive: bool,
    system: str | None,
) -> None:
    """Generate text with MODEL, offline, and stream it to the terminal.

    MODEL is as for `jaxserve serve`. The text goes to stdout; token counts, time to first
    token and tokens per second go to stderr, and so do the stages of the start.
    """
    if (prompt is not None) + (chat is not None) + interactive != 1:
        raise click.UsageError("give one of --prompt, --chat and --interactive")
    if system is not None and prompt is not None:
        raise click.UsageError("--system goes with --chat or --interactive")
    messages = [] if system is None else [{"role": "system", "content": system}]
    prompt, chat = _read_dash(prompt), _read_dash(chat)
    from jaxserve.engine.stages import stage

    with stage("imports", "JAX and the engine imported"):  # only now, so that --help is instant
        from jaxserve.llm import LLM

    with contextlib.closing(LLM(**dataclasses.asdict(config))) as llm:
        advised = llm.model_info.default_sampling_params
        params = SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **advised, **sampling})
        if interactive:
            _Conversation(llm, params, messages).run()
            return
        if chat is not None:
            messages.append({"role": "user", "content": chat})
        wanted = _templated(llm, messages) if prompt is None else prompt
        _, finished = _answer(llm, wanted, params)
    if not finished:
        sys.exit(128 + signal.SIGINT)


def _read_dash(text: str | None) -> str | None:
    return sys.stdin.read() if text == "-" else text


def _templated(llm: "LLM", messages: list[dict[str, str]]) -> "Prompt":
    return {"prompt_token_ids": llm.tokenizer.apply_chat_template(messages)}


def _answer(llm: "LLM", prompt: "Prompt", params: SamplingParams) -> tuple[str, bool]:
    """Stream one answer to stdout and its figures to stderr.

    Returns:
        The answer, and whether it is whole (False: Ctrl-C ended it).
    """
    text: list[str] = []
    times = [time.perf_counter()]
    last: TokenDelta | None = None
    deltas = llm.stream(prompt, params)
    try:
        for delta in deltas:
            times.append(time.perf_counter())
            text.append(delta.text)
            last = delta
            click.echo(delta.text, nl=False)
    except KeyboardInterrupt:
        pass
    finally:
        deltas.close()  # so that an interrupted answer leaves the engine at once
    click.echo()
    if last is not None:
        click.echo(_figures(last, times), err=True)
    return "".join(text), last is not None and last.finish_reason is not None


def _figures(last: "TokenDelta", times: list[float]) -> str:
    """One line about an answer; `times` is its start, then when each delta came (s)."""
    ended = "interrupted" if last.finish_reason is None else last.finish_reason.value
    line = (
        f"[{last.num_prompt_tokens} tokens in, {last.num_output_tokens} out, {ended}; "
        f"first token after {times[1] - times[0]:.3f} s"
    )
    if last.num_output_tokens > 1:
        rate = (last.num_output_tokens - 1) / max(times[-1] - times[1], 1e-9)
        line += f", then {rate:.1f} tokens/s"
    return line + "]"


class _Conversation:
    """A chat whose history grows with every turn."""

    def __init__(self, llm: "LLM", params: SamplingParams, messages: list[dict[str, str]]) -> None:
        self._llm = llm
        self._params = params
        self._messages = messages
        self._num_first = len(messages)

    def run(self) -> None:
        """Read messages and answer them until the user leaves."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # not on every platform
                import readline  # noqa: F401 (importing it gives input() a history)
        click.echo(INTERACTIVE_HELP, err=True)
        while (message := self._read()) is not None:
            if message == "/clear":
                del self._messages[self._num_first :]
            elif message:
                self._turn(message)

    def _turn(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        try:
            answer, _ = _answer(self._llm, _templated(self._llm, self._messages), self._params)
        except InvalidRequest as error:  # most often a history as long as the context
            self._messages.pop()
            click.echo(f"{error}", err=True)
        else:
            self._messages.append({"role": "assistant", "content": answer})

    @staticmethod
    def _read() -> str | None:
        """The next message; None to leave."""
        while True:
            try:
                message = input("> ").strip()
            except KeyboardInterrupt:
                click.echo(f"\n{INTERACTIVE_HELP}", err=True)
                continue
            except EOFError:
                click.echo()
                return None
            return None if message == "/exit" else message
