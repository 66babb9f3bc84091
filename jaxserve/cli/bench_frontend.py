"""`jaxserve bench frontend`: what gRPC and HTTP cost beside an engine of a steady pace."""

from pathlib import Path

import click

from jaxserve.cli.bench_options import number, output_json_option, write_json
from jaxserve.cli.options import Command


@click.command(cls=Command)
@click.option("--transports", default="grpc,sse", show_default=True, help="With commas between.")
@number("--streams", 256, "Streams at the same time.", click.IntRange(min=1))
@number("--tokens-per-second", 20_000.0, "That the engine emits over all streams.", float)
@number("--connections", 16, "Connections that gRPC's streams share.", click.IntRange(min=1))
@number("--seconds", 10.0, "How long to count.", float)
@number("--stalled", 0, "Clients beside them that connect and stall; measured without them, too.")
@output_json_option
def frontend(
    transports: str,
    streams: int,
    tokens_per_second: float,
    connections: int,
    seconds: float,
    stalled: int,
    output_json: Path | None,
) -> None:
    """Share of an engine's tokens that reach clients, and how much its steps are slowed."""
    import dataclasses

    from jaxserve.bench.frontend import measure

    names = transports.split(",")
    if unknown := set(names) - set(measure.TRANSPORTS):
        raise click.UsageError(f"there is no transport {sorted(unknown)[0]}")
    spec = measure.FrontendSpec(
        num_streams=streams,
        tokens_per_second=tokens_per_second,
        num_connections=connections,
        seconds=seconds,
    )
    alone = measure.measure_engine_alone(spec)
    costs = []
    for name in names:
        costs.append(measure.measure_front_end(name, spec))
        if stalled:
            beside = dataclasses.replace(spec, num_stalled=stalled)
            costs.append(measure.measure_front_end(name, beside))
    click.echo(measure.format_front_end_costs(costs, spec, alone))
    write_json(output_json, measure.to_dict(costs, spec, alone))
