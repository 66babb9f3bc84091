"""`jaxserve generate` over a tiny model: what it prints, and how it is interrupted."""

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from jaxserve.cli.generate import generate
from jaxserve.cli.main import main
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.outputs import TokenDelta
from jaxserve.llm import LLM
from jaxserve.testing.tiny_model import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {"num_pages": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16}
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture(scope="module")
def llm(model: Path, program_cache_dir: Path) -> LLM:
    options = {"chat_special_tokens": True, **SMALL}
    return LLM(str(model), compilation_cache_dir=str(program_cache_dir), **options)


@pytest.fixture
def run(llm: LLM, model: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on an engine that is there already."""
    monkeypatch.setattr("jaxserve.llm.LLM", lambda **_: llm)
    monkeypatch.setattr(llm, "close", lambda: None)  # as the command does at its end

    def invoke(*arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(generate, [str(model), *arguments], input=input)
        load = llm.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_used_pages == 0
        return result

    return invoke


def greedy(llm: LLM, prompt: str | Mapping, max_tokens: int) -> str:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_a_command_line_from_files_to_text(
    model: Path, program_cache_dir: Path, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [x for name, v in SMALL.items() for x in ("--" + name.replace("_", "-"), str(v))]
    flags += ["--compilation-cache-dir", str(program_cache_dir)]
    arguments = [str(model), "--prompt", "hello", "--temperature", "0", "--max-tokens", "9"]
    result = CliRunner().invoke(main, ["generate", *arguments, *flags])
    assert result.exit_code == 0, result.output
    assert result.stdout == greedy(llm, "hello", 9) + "\n"
    stages = [r.__dict__["stage"] for r in caplog.records if "stage" in r.__dict__]
    assert {"imports", "checkpoint", "kernels", "weights", "programs"} == set(stages)
    assert len(stages) == 5  # each once, though stderr is no terminal


def test_figures_are_on_stderr(run: Run) -> None:
    result = run("--prompt", "hello", "--temperature", "0", "--max-tokens", "9", "--ignore-eos")
    pattern = r"\[6 tokens in, 9 out, length; first token after \S+ s, then \S+ tokens/s\]\n"
    assert re.fullmatch(pattern, result.stderr)


def test_a_dash_reads_stdin(run: Run, llm: LLM) -> None:
    result = run("--prompt", "-", "--temperature", "0", "--max-tokens", "5", input="from stdin")
    assert result.stdout == greedy(llm, "from stdin", 5) + "\n"


def test_a_chat_message_is_templated(run: Run, llm: LLM) -> None:
    result = run("--chat", "hi", "--system", "be", "--temperature", "0", "--max-tokens", "5")
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    ids = llm.tokenizer.apply_chat_template(messages)
    assert result.stdout == greedy(llm, {"prompt_token_ids": ids}, 5) + "\n"


def test_chats_may_be_let_have_control_tokens(llm: LLM) -> None:
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "a<eos>"}])
    assert ids == [256, *b"user: a", 257, *b"\nassistant:"]


def test_sampling_flags_reach_the_sampler(run: Run, llm: LLM) -> None:
    flags = ["--temperature", "0.9", "--top-p", "0.8", "--top-k", "50", "--min-p", "0.01",
             "--seed", "7", "--max-tokens", "20", "--stop", "q", "--stop", "zz"]  # fmt: skip
    params = SamplingParams(
        temperature=0.9, top_p=0.8, top_k=50, min_p=0.01, seed=7, max_tokens=20, stop=("q", "zz")
    )
    expected = llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text
    assert run("--prompt", "hello", *flags).stdout == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of"),
        (("--prompt", "a", "--chat", "b"), "give one of"),
        (("--prompt", "a", "--system", "b"), "--system goes with"),
        (("--prompt", "a", "--top-p", "1.5"), "--top-p must be in"),
        (("--prompt", "a", "--page-size", "3"), "--page-size must be a power of two"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_a_prompt_beyond_the_context_is_a_message(run: Run) -> None:
    result = run("--prompt", "x" * 600)
    assert result.exit_code == 1 and "leaves no room" in result.stderr


@pytest.fixture
def streamed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chat prompts that were answered, as text."""
    prompts: list[str] = []
    stream = LLM.stream

    def record(self: LLM, prompt: Mapping, params: SamplingParams) -> Iterator[TokenDelta]:
        prompts.append(self.tokenizer.decode(prompt["prompt_token_ids"]))
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", record)
    return prompts


def test_a_conversation_keeps_its_history(run: Run, streamed: list[str]) -> None:
    flags = ("--interactive", "--temperature", "0", "--max-tokens", "4", "--ignore-eos")
    result = run(*flags, input="one\n\ntwo\n/clear\nthree\n/exit\nfour\n")
    assert result.exit_code == 0, result.output
    answers = [line.removeprefix("> ") for line in result.stdout.splitlines()]
    first = "user: one\nassistant:"
    assert streamed[0] == first and streamed[2] == "user: three\nassistant:"
    assert len(streamed) == 3
    assert streamed[1].startswith("user: one\nassistant: ")
    assert streamed[1].endswith("\nuser: two\nassistant:")
    assert len(answers) >= 3


def test_end_of_input_leaves(run: Run) -> None:
    assert run("--interactive", input="").exit_code == 0


def test_a_conversation_survives_a_message_that_is_too_long(run: Run, streamed: list[str]) -> None:
    result = run("--interactive", "--max-tokens", "2", input=f"{'x' * 600}\nshort\n/exit\n")
    assert result.exit_code == 0 and "leaves no room" in result.stderr
    assert streamed[-1] == "user: short\nassistant:"


@pytest.fixture
def ctrl_c_at_third(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C, as in a terminal, while the third piece of the first answer is written."""
    echo, pieces = click.echo, 0

    def interrupting(message: object = None, **options: object) -> None:
        nonlocal pieces
        pieces += options.get("nl") is False
        if pieces == 3:
            pieces += 1
            os.kill(os.getpid(), signal.SIGINT)
        echo(message, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(click, "echo", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_at_third")
def test_ctrl_c_ends_an_answer(run: Run) -> None:
    result = run("--prompt", "hello", "--max-tokens", "200", "--ignore-eos")
    assert result.exit_code == 130
    assert "3 out, interrupted" in result.stderr


@pytest.mark.usefixtures("ctrl_c_at_third")
def test_ctrl_c_ends_an_answer_and_not_the_conversation(run: Run, streamed: list[str]) -> None:
    flags = ("--interactive", "--max-tokens", "30", "--ignore-eos")
    result = run(*flags, input="one\ntwo\n/exit\n")
    assert result.exit_code == 0, result.output
    assert "3 out, interrupted" in result.stderr and "30 out, length" in result.stderr
    assert len(streamed) == 2
