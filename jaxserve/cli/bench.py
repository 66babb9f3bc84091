"""`jaxserve bench`: one command per benchmark, in the files `bench_*.py` beside this one."""

import click

from jaxserve.cli.bench_compare import (
    chunked_prefill,
    fairness,
    grammars,
    policies,
    predictor,
    prefix_cache,
)
from jaxserve.cli.bench_engine import (
    buckets,
    frontend,
    host_cost,
    latency,
    padding,
    peers,
    quality,
    spans,
    startup,
    steps,
    throughput,
)
from jaxserve.cli.bench_serve import serve


class _Benchmarks(click.Group):
    """A group that lists its commands with the whole first paragraph of their help."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list, by name."""
        rows = [(name, _summary(command)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _summary(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())


@click.group(cls=_Benchmarks)
def bench() -> None:
    """Measure throughput, latency, serving, start-up, and what single techniques buy."""


_COMMANDS: tuple[click.Command, ...] = (
    throughput, latency, serve, startup, peers,
    prefix_cache, chunked_prefill, policies, predictor, fairness, padding, buckets, host_cost,
    steps, spans, quality, frontend, grammars,
)  # fmt: skip
for _command in _COMMANDS:
    bench.add_command(_command)
