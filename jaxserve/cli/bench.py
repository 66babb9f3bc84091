"""`jaxserve bench`: one command per benchmark, in the files `bench_*.py` beside this one."""

import click

from jaxserve.cli.bench_offline import latency, startup, throughput
from jaxserve.cli.bench_peers import peers
from jaxserve.cli.bench_serve import serve


@click.group()
def bench() -> None:
    """Measure throughput, latency, serving and start-up."""


for _command in (throughput, latency, serve, startup, peers):
    bench.add_command(_command)
