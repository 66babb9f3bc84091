"""A whole server, as a process, over an engine without a device: for tests and benchmarks.

    python -m jaxserve.testing.fake_server --http-port 0 --rows 256 --tokens-per-second 20000

It prints the READY line of `jaxserve serve` and ends like it. Every token is `Z`, at a steady pace.
"""

import argparse
import asyncio

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.serve import serve
from jaxserve.server.server import ServerOptions
from jaxserve.testing.fake_engine import fake_engine
from jaxserve.testing.paced_executor import PacedExecutor

TOKEN = "Z"  # in no other word of an answer


def paced_engine(rows: int, tokens_per_second: float, max_model_len: int = 65_536) -> AsyncEngine:
    """An engine that emits so many tokens per second when as many requests run as it has rows."""
    page_size = 64
    return fake_engine(
        executor=PacedExecutor(rows / tokens_per_second, ord(TOKEN)),
        num_pages=rows * (max_model_len // page_size),
        page_size=page_size,
        max_model_len=max_model_len,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows, 512),
        max_waiting=4096,
    )


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens-per-second", type=float, default=20_000)
    parser.add_argument("--grace-period", type=float, default=30.0)
    parser.add_argument("--read-timeout", type=float, default=30.0)
    parser.add_argument("--write-timeout", type=float, default=30.0)
    given = parser.parse_args()
    options = ServerOptions(
        port=given.port,
        http_port=given.http_port,
        grace_period=given.grace_period,
        read_timeout=given.read_timeout,
        write_timeout=given.write_timeout,
    )
    asyncio.run(serve(lambda: paced_engine(given.rows, given.tokens_per_second), options))


if __name__ == "__main__":
    main()
