"""What the benchmark commands share: the dataset's options, lists of numbers, JSON output."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jaxserve.bench.workloads import Workload, WorkloadSpec

DATASETS = ("random", "prefix_repetition", "azure", "mooncake")

output_json_option = click.option(
    "--output-json", type=click.Path(path_type=Path, dir_okay=False), default=None,
    help="Write the results as JSON, too.",
)  # fmt: skip
disable_tqdm_option = click.option("--disable-tqdm", is_flag=True, help="Show no progress bar.")


class NumberList(click.ParamType):
    """Comma-separated numbers, as a tuple."""

    name = "number,..."

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; a default that is a tuple already stays as it is."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers", param, ctx)


def number(flag: str, default: Any, help: str, kind: Any = int) -> Callable[..., Any]:
    """An option that takes a number; a default of None is not shown."""
    shown = default is not None
    return click.option(flag, type=kind, default=default, show_default=shown, help=help)


def dataset_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the dataset's options, and its function a ready `dataset: WorkloadSpec`."""
    names = [
        "dataset_name", "dataset_path", "num_prompts", "random_input_len", "random_output_len",
        "random_range_ratio", "prefix_repetition_prefix_len", "prefix_repetition_suffix_len",
        "prefix_repetition_num_prefixes", "prefix_repetition_output_len", "time_scale",
        "max_input_len", "max_output_len",
    ]  # fmt: skip

    @functools.wraps(function)
    def with_dataset(*args: Any, **kwargs: Any) -> Any:
        from jaxserve.bench.workloads import WorkloadSpec

        seed = kwargs["config"].seed if "config" in kwargs else kwargs.pop("seed")
        spec = WorkloadSpec(seed=seed, **{name: kwargs.pop(name) for name in names})
        return function(*args, dataset=spec, **kwargs)

    options = [
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random",
                     show_default=True, help="What to send; azure and mooncake are traces."),
        click.option("--dataset-path", type=click.Path(path_type=Path), default=None,
                     help="The trace's file: Azure CSV or Mooncake JSONL."),
        number("--num-prompts", 1000, "Number of requests (of a trace: its first ones)."),
        number("--random-input-len", 1024, "random: tokens per prompt."),
        number("--random-output-len", 128, "random: tokens per answer."),
        number("--random-range-ratio", 0.0,
                "random: lengths vary evenly between (1 - ratio) and (1 + ratio) times.", float),
        number("--prefix-repetition-prefix-len", 256, "prefix_repetition: tokens per prefix."),
        number("--prefix-repetition-suffix-len", 256, "prefix_repetition: tokens per suffix."),
        number("--prefix-repetition-num-prefixes", 10, "prefix_repetition: distinct prefixes."),
        number("--prefix-repetition-output-len", 128, "prefix_repetition: tokens per answer."),
        number("--time-scale", 1.0,
                "Traces: multiply arrival times; 0.1 replays ten times as fast.", float),
        number("--max-input-len", None, "Cut longer prompts to this many tokens."),
        number("--max-output-len", None, "Cut longer answers to this many tokens."),
    ]  # fmt: skip
    for option in reversed(options):
        with_dataset = option(with_dataset)
    return with_dataset


def build_workload(spec: "WorkloadSpec", vocab_size: int, avoid: tuple[int, ...]) -> "Workload":
    """Make the requests, and say how many there are and what was cut."""
    from jaxserve.bench.workloads import build_workload

    workload = build_workload(spec, vocab_size, avoid)
    click.echo(
        f"{len(workload.items)} requests, {workload.num_input_tokens} tokens in, "
        f"{workload.num_output_tokens} out"
    )
    if workload.num_cut_inputs or workload.num_cut_outputs:
        click.echo(
            f"Cut: {workload.num_cut_inputs} prompts, {workload.num_cut_outputs} answers",
            err=True,
        )
    return workload


def write_json(path: Path | None, fields: dict[str, Any]) -> None:
    """Write a command's results, if a path was given; its folder is made."""
    import json

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")
