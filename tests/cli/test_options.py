"""Options come from EngineConfig alone; `jaxserve --help` is instant and groups them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jaxserve.cli.main import COMMANDS, main
from jaxserve.cli.options import Command, engine_options, options_table, settings_options
from jaxserve.cli.serve import serve
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import CheckpointError
from jaxserve.core.options import check_options, option

FIELDS = {field.name: field for field in dataclasses.fields(EngineConfig)}


def parse(*arguments: str, **options: object) -> EngineConfig:
    """The config that a command with engine options gets from these arguments."""
    got: list[EngineConfig] = []

    @click.command(cls=Command)
    @engine_options(**options)  # type: ignore[arg-type]
    def command(config: EngineConfig) -> None:
        got.append(config)

    result = CliRunner().invoke(command, list(arguments))
    if result.exit_code:
        raise RuntimeError(result.output)
    return got[0]


def test_no_options_are_the_defaults() -> None:
    assert parse("m") == EngineConfig(model="m")
    assert parse(model_required=False) == EngineConfig()


def test_every_field_can_be_given() -> None:
    given = {
        "tokenizer": "tok", "served_model_name": "name", "random_weights": True,
        "dtype": "float32", "max_model_len": 99, "seed": 5, "mesh": "tensor=2",
        "attention_implementation": "reference", "linear_implementation": "xla",
        "compilation_cache_dir": "/tmp/c", "strict_compile": True,
        "kv_cache_dtype": "bfloat16", "page_size": 32, "num_pages": 77,
        "kv_cache_memory": 1.5, "max_num_seqs": 3, "max_num_batched_tokens": 64, "max_waiting": 9,
        "policy": "fcfs", "overlap": False,
    }  # fmt: skip
    arguments = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    config = parse("m", *arguments)
    assert {name: getattr(config, name) for name in given} == given


def test_each_field_has_exactly_one_flag() -> None:
    names = [parameter.name for parameter in serve.params]
    assert len(names) == len(set(names))
    assert set(FIELDS) <= set(names)


def test_include_exclude_and_defaults() -> None:
    assert parse("m", "--seed", "3", include=("model", "seed")).seed == 3
    with pytest.raises(RuntimeError, match="No such option"):
        parse("m", "--mesh", "x", include=("model", "seed"))
    with pytest.raises(RuntimeError, match="No such option"):
        parse("m", "--mesh", "x", exclude=("mesh",))
    assert parse("m", defaults={"max_num_seqs": 7}).max_num_seqs == 7
    assert parse("m", "--max-num-seqs", "8", defaults={"max_num_seqs": 7}).max_num_seqs == 8
    assert parse(defaults={"model": "x"}, model_required=False).model == "x"
    assert parse(model_argument=False, defaults={"model": "x"}).model == "x"
    with pytest.raises(ValueError, match="max_num_seq"):
        parse("m", defaults={"max_num_seq": 7})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    num_tries: int | None = option(3, "Tries.", range="[1, 5]")
    sizes: tuple[int, ...] = option((1, 8), "Sizes.")
    sides: tuple[str, ...] | None = option(None, "Sides.", flag="--side")
    where: Path | None = option(None, "A place.")
    quiet: bool = option(False, "Say nothing.")
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self)


@click.command(cls=Command)
@engine_options(include=("model", "seed"))
@settings_options(Settings, "settings")
def configured(config: EngineConfig, settings: Settings) -> None:
    """Say what it got."""
    click.echo(repr(settings))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Settings()),
        (["--seed", "7", "--quiet"], Settings(seed=7, quiet=True)),
        (["--num-tries", "5", "--sizes", "4,2", "--where", "x"],
         Settings(num_tries=5, sizes=(4, 2), where=Path("x"))),
        (["--side", "a,b", "--side", "c"], Settings(sides=("a", "b", "c"))),
    ],
)  # fmt: skip
def test_any_dataclass_makes_flags(arguments: list[str], expected: Settings) -> None:
    result = CliRunner().invoke(configured, ["m", *arguments], catch_exceptions=False)
    assert result.output == f"{expected!r}\n"


def test_flags_of_a_dataclass_say_what_they_take() -> None:
    text = " ".join(CliRunner().invoke(configured, ["--help"]).output.split())
    assert "--sizes NUMBER,... Sizes. [default: 1,8]" in text
    assert "--num-tries INTEGER Tries. [default: 3]" in text
    for arguments, says in (
        (["--num-tries", "6"], "--num-tries must be in [1, 5], got 6"),
        (["--sizes", "1,x"], "not a list of numbers"),
    ):
        result = CliRunner().invoke(configured, ["m", *arguments])
        assert result.exit_code == 2 and says in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--page-size", "12"], "power of two"),
        (["--dtype", "float8"], "float8"),
        (["--kv-cache-dtype", "fp4"], "fp4"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be in [1, 65536]"),
        (["--num-pages", "many"], "many"),
    ],
)
def test_wrong_values_end_with_a_message(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(serve, ["m", *arguments])
    assert result.exit_code == 2 and says in result.output
    assert "Traceback" not in result.output


def test_errors_of_the_command_are_messages_too() -> None:
    @click.command(cls=Command)
    @engine_options
    def command(config: EngineConfig) -> None:
        raise CheckpointError(f"no checkpoint at {config.model}")

    result = CliRunner().invoke(command, ["nowhere"])
    assert result.exit_code == 1
    assert result.output == "Error: no checkpoint at nowhere\n"


def test_help_shows_every_option_under_its_heading() -> None:
    text = CliRunner().invoke(serve, ["--help"], terminal_width=100).output
    headings = ["Options:", "Model options:", "Device options:", "KV cache options:"]
    positions = [text.index(heading) for heading in [*headings, "Scheduling options:"]]
    assert positions == sorted(positions)
    assert positions[3] < text.index("--page-size") < positions[4]
    for name in FIELDS:
        assert name == "model" or f"--{name.replace('_', '-')}" in text
    assert "[default: 64]" in text


def test_the_markdown_table_has_every_option() -> None:
    lines = options_table().splitlines()
    for name, field in FIELDS.items():
        flag = f"`--{name.replace('_', '-')}`"
        rows = [line for line in lines if line.startswith(f"| {flag}")]
        assert len(rows) == (name != "model"), name
        assert not rows or field.metadata["help"].replace("|", "\\|") in rows[0]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from jaxserve.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'grpc'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", ["serve"])
def test_a_commands_help_does_not_import_jax(command: str) -> None:
    code = (
        "import sys; from jaxserve.cli.main import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["sevre"])
    assert result.exit_code == 2
    assert "No such command 'sevre'. Did you mean serve?" in result.output
    assert "mean" not in CliRunner().invoke(main, ["xyzzy"]).output


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0 and result.output.startswith("jaxserve, version ")


@pytest.mark.parametrize("command", ["serve", "generate", "bench throughput", "bench serve"])
def test_help_lists_options_alone_and_defaults_as_they_are_given(command: str) -> None:
    output = CliRunner().invoke(main, [*command.split(), "--help"]).output
    assert "\n  MODEL\n" not in output and "--help" in output
    assert 'default: ""' not in output and "default: (" not in output


@pytest.mark.parametrize("command", ["serve", "generate --prompt a", "bench throughput"])
def test_a_model_must_be_named(command: str) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2 and "Missing argument 'MODEL'" in result.output


def test_messages_name_options_as_they_are_given() -> None:
    with pytest.raises(RuntimeError, match="needs a --length-predictor"):
        parse("m", "--admission", "predicted")


def test_benchmarks_are_listed_with_their_whole_summary() -> None:
    output = CliRunner().invoke(main, ["bench", "--help"]).output
    assert "..." not in output.partition("Commands:")[2] and "Drive a running gRPC server" in output
