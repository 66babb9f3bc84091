"""`jaxserve bench prefix-cache`: shared prompts and long chats, with and without cached pages."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.bench_options import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.bench.sides import BuildEngine

PARTS = ("shared", "chat")
TIER_GIB = 1.0


def quiet_engines() -> "BuildEngine":
    """Builds engines without progress bars, for benchmarks that build several."""
    import functools

    from jaxserve.engine.build import build_sync_engine

    return functools.partial(build_sync_engine, progress=False)


@click.command("prefix-cache", cls=Command)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, show_default="both",
              help="What to run; may be given twice.")  # fmt: skip
@number("--num-requests", 32, "shared: requests per round.")
@number("--prefix-len", 512, "shared: tokens of the system prompt.")
@number("--suffix-len", 32, "shared: tokens that are each request's own.")
@number("--output-len", 32, "shared: tokens per answer.")
@number("--request-rate", None, "shared: requests per second (default: all at once).", float)
@number("--rounds", 2, "shared: rounds, each with a system prompt of its own.")
@number("--num-sessions", 6, "chat: sessions; the device has room for two.")
@number("--num-turns", 10, "chat: turns of each session.")
@number("--message-len", 32, "chat: new tokens per turn.")
@number("--answer-len", 64, "chat: tokens answered per turn.")
@output_json_option
@disable_tqdm_option
@engine_options(
    include=("model", "random_weights", "dtype", "seed", "compilation_cache_dir",
             "kv_cache_dtype", "page_size", "host_cache_memory", "disk_cache_memory",
             "disk_cache_dir", "max_num_seqs", "max_num_batched_tokens", "overlap"),
    # Small pages: what is shared is shared by the page.
    defaults={"host_cache_memory": TIER_GIB, "disk_cache_memory": TIER_GIB, "max_num_seqs": 32,
              "page_size": 16},
)  # fmt: skip
def prefix_cache(
    config: EngineConfig,
    parts: tuple[str, ...],
    output_json: Path | None,
    disable_tqdm: bool,
    **options: Any,
) -> None:
    """TTFT, throughput and prefill tokens with cached KV pages and without.

    Part `shared`: requests that begin with the same system prompt. Part `chat`: sessions that
    take turns on a device with room for two of them, with host memory below it and, over a
    restart, a disk (kept in a new folder inside of --disk-cache-dir, and removed at the end).
    """
    results: dict[str, Any] = {}
    for part in parts or PARTS:
        run = _shared if part == "shared" else _chat
        results[part] = run(config, options, not disable_tqdm)
        click.echo("")
    write_json(output_json, results)


def _shared(config: EngineConfig, options: dict[str, Any], progress: bool) -> dict[str, Any]:
    from jaxserve.bench.prefix_cache import SharedSpec, format_shared, measure_shared

    names = ("num_requests", "prefix_len", "suffix_len", "output_len", "request_rate", "rounds")
    spec = SharedSpec(seed=config.seed, **{name: options[name] for name in names})
    result = measure_shared(config, spec, build=quiet_engines(), progress=progress)
    click.echo(format_shared(result, spec))
    return result


def _chat(config: EngineConfig, options: dict[str, Any], progress: bool) -> dict[str, Any]:
    import tempfile

    from jaxserve.bench.chat_sessions import ChatSpec, format_chat, measure_chat

    names = ("num_sessions", "num_turns", "message_len", "answer_len")
    spec = ChatSpec(seed=config.seed, **{name: options[name] for name in names})
    if config.disk_cache_dir is not None:
        Path(config.disk_cache_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.disk_cache_dir, prefix="jaxserve-kv-") as disk:
        result = measure_chat(
            config, spec, disk_dir=Path(disk), build=quiet_engines(), progress=progress
        )
    click.echo(format_chat(result, spec))
    return result
