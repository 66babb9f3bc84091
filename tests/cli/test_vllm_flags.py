"""vLLM's names for options: ours where they mean the same, else refused with what to use."""

import click
import pytest
from click.testing import CliRunner

from jaxserve.cli.generate import generate
from jaxserve.cli.main import main
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig
from jaxserve.core.vllm_names import INSTEAD, SAME

GOT: list[EngineConfig] = []


@click.command(cls=Command)
@click.option("--text")
@click.option("--flag", is_flag=True)
@engine_options(model_required=False)
def command(config: EngineConfig, text: str | None, flag: bool) -> None:
    assert text is None or text.startswith("--")
    GOT.append(config)


def parsed(*arguments: str) -> EngineConfig:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return GOT.pop()


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 2
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--model m", {"model": "m"}),
        ("m --tensor-parallel-size 4", {"model": "m", "mesh": "tensor=4"}),
        ("-tp 4 --data-parallel-size=2", {"mesh": "tensor=4,data=2"}),
        ("--tensor_parallel_size 2 -dp 3", {"mesh": "tensor=2,data=3"}),
        ("--block-size 32", {"page_size": 32}),
        ("--block-size=32 --max_num_seqs 3", {"page_size": 32, "max_num_seqs": 3}),
        ("--no-enable-prefix-caching", {"prefix_cache": False}),
        ("--enable-prefix-caching", {"prefix_cache": True}),
        ("--num-gpu-blocks-override 9", {"num_pages": 9}),
        ("--scheduling-policy priority", {"policy": "priority"}),
        ("--enable-chunked-prefill --no-async-scheduling", {"overlap": False}),
        ("--max-model-len 99 --tokenizer t", {"max_model_len": 99, "tokenizer": "t"}),
        ("--generation-config vllm", {"generation_config": "vllm"}),
    ],
)
def test_what_means_the_same_is_taken(theirs: str, ours: dict) -> None:
    assert parsed(*theirs.split()) == EngineConfig(**ours)


@pytest.mark.parametrize("name", INSTEAD)
def test_what_does_not_is_refused_by_name(name: str) -> None:
    assert f"{name} is an option of vLLM's: " in refused(name, "3")


def test_every_name_in_a_hint_is_an_option() -> None:
    """Of `serve`, which has them all."""
    serve = main.get_command(click.Context(main), "serve")
    assert serve is not None
    names = {name for p in serve.params for name in (*p.opts, *p.secondary_opts)}
    hinted = {word.strip(",;.") for text in INSTEAD.values() for word in text.split()}
    hinted = {word for word in hinted if word.startswith("--")}
    assert hinted | set(SAME.values()) <= names
    assert not (set(SAME) | set(INSTEAD)) & names


def test_a_mesh_and_sizes_contradict_each_other() -> None:
    assert "--mesh says already" in refused("--mesh", "tensor=2", "--tensor-parallel-size", "2")
    assert "is given twice" in refused("-tp", "2", "--tensor-parallel-size", "4")


def test_values_are_left_alone() -> None:
    assert parsed("--text", "--enforce-eager", "--flag", "m").model == "m"
    assert "unexpected extra argument" in refused("m", "--", "--enforce-eager")


def test_unknown_options_suggest_what_they_may_mean() -> None:
    assert refused("--max-seqs", "3").endswith("Did you mean --max-num-seqs?")
    assert "Did you mean --page-size?" in refused("--page-sizes", "3")
    assert "Did you mean --max-model-len?" in refused("--max-len", "3")
    assert refused("--nonsense-size", "3").endswith("No such option '--nonsense-size'.")


def test_commands_without_an_engine_have_no_names_of_vllms() -> None:
    result = CliRunner().invoke(main, ["pull", "--enforce-eager"])
    assert "No such option '--enforce-eager'." in result.output
    result = CliRunner().invoke(generate, ["--swap-space", "4", "--prompt", "a", "m"])
    assert "--host-cache-memory" in result.output
