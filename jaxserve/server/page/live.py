"""`GET /live`: what the engine does, as JSON that is cheap to ask for once a second.

A snapshot tells what is new since an earlier one, whose `cursor` is passed as `since`. All times
are seconds on one monotonic clock; nothing in it names a request, a tenant or a prompt::

    {
      "state": "ready",            or "warming up", "draining", "stopped"
      "cursor": "9f3c01d2-811-40", for the next `since`; opaque
      "from_start": false,         true if `steps` and `requests` are all that is remembered: no
                                   `since` was given, or it is another process's
      "time": 5127.31,             now; 0 while warming up
      "model": {"name": ..., ...}, the fields of `engine.outputs.ModelInfo`; null while warming up
      "load": {...},               those of `EngineLoad`, and `num_used_pages`; likewise
      "steps": [[collected, tokens, token_bucket, sampled_rows, row_bucket, seconds], ...],
      "requests": [[finished, ttft, itl, output_tokens], ...]
                                   of those that ended; ttft and itl (the mean time between tokens)
                                   null where there was none
      "pages": {                   null while warming up
        "device": [{"pages": 512, "bin_pages": 1, "used": [per bin], "cached": [per bin]}, ...],
                                   one per data shard; what is neither used nor cached is free
        "host": {"pages": 3, "max_pages": 64, "bytes": 4096},   null without such a tier
        "disk": {...}
      }
    }
"""

import dataclasses
import secrets
import time
from typing import Any

from jaxserve.cache.store_stats import TierStats
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.outputs import KvMap
from jaxserve.engine.records import RequestRecord, StepRecord
from jaxserve.server.context import ServerContext

MAX_BINS = 1024
_MAP_SECONDS = 0.5


class LiveView:
    """Makes snapshots of the engine of a context.

    Args:
        context: the server's.
    """

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._process = secrets.token_hex(4)
        self._pages: dict[str, Any] | None = None
        self._pages_at = 0.0

    def snapshot(self, since: str = "") -> dict[str, Any]:
        """What the module's docstring describes, as plain values.

        Args:
            since: an earlier snapshot's cursor; anything else counts as none.
        """
        engine = self._context.engine
        if engine is None:
            return {
                "state": "warming up", "cursor": "", "from_start": True, "time": 0.0,
                "model": None, "load": None, "steps": [], "requests": [], "pages": None,
            }  # fmt: skip
        seen = self._parse(since)
        after_step, after_request = seen or (0, 0)
        # Requests first: one that ends in between comes with the next snapshot, not never.
        requests = engine.records.requests(after_request)
        steps = engine.records.steps(after_step)
        load = engine.load()
        return {
            "state": self._state(engine),
            "cursor": self._cursor(
                steps[-1].number if steps else after_step,
                requests[-1].number if requests else after_request,
            ),
            "from_start": seen is None,
            "time": engine.records.now(),
            "model": dataclasses.asdict(engine.model_info),
            "load": {**dataclasses.asdict(load), "num_used_pages": load.num_used_pages},
            "steps": [_step(record) for record in steps],
            "requests": [_request(record) for record in requests],
            "pages": self._page_map(engine),
        }

    def _state(self, engine: AsyncEngine) -> str:
        if engine.is_ready:
            return "ready"
        return "draining" if engine.is_alive else "stopped"

    def _cursor(self, step: int, request: int) -> str:
        return f"{self._process}-{step}-{request}"

    def _parse(self, cursor: str) -> tuple[int, int] | None:
        """The numbers of the last step and request that were seen; None if it is not ours."""
        parts = cursor.split("-")
        if len(parts) != 3 or parts[0] != self._process or len(cursor) > 64:
            return None
        try:
            return int(parts[1]), int(parts[2])
        except ValueError:
            return None

    def _page_map(self, engine: AsyncEngine) -> dict[str, Any]:
        """The map, made anew twice a second at most, however many look."""
        now = time.monotonic()
        if self._pages is None or now - self._pages_at >= _MAP_SECONDS:
            self._pages, self._pages_at = _pages(engine.kv_map(MAX_BINS)), now
        return self._pages


def _step(record: StepRecord) -> list[float]:
    return [
        record.collected, record.num_tokens, record.token_bucket,
        record.num_sampled, record.row_bucket, record.seconds,
    ]  # fmt: skip


def _request(record: RequestRecord) -> list[float | None]:
    return [
        record.finished, record.time_to_first_token, record.seconds_per_output_token,
        record.num_output_tokens,
    ]  # fmt: skip


def _pages(kv_map: KvMap) -> dict[str, Any]:
    return {
        "device": [
            {
                "pages": shard.num_pages,
                "bin_pages": shard.bin_pages,
                "used": shard.used,
                "cached": shard.cached,
            }
            for shard in kv_map.device
        ],
        "host": _tier(kv_map.host),
        "disk": _tier(kv_map.disk),
    }


def _tier(stats: TierStats | None) -> dict[str, int] | None:
    if stats is None or not stats.max_pages:
        return None
    return {"pages": stats.num_pages, "max_pages": stats.max_pages, "bytes": stats.num_bytes}
