"""The few shapes that steps are padded to, so that every program is known before serving."""

import bisect
import dataclasses
import itertools
import logging
from collections.abc import Sequence

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError

log = logging.getLogger(__name__)

SECOND_BUCKET = 8  # a step of 2 tokens costs nearly what one of 8 does; a program costs seconds


def doubling_buckets(largest: int) -> tuple[int, ...]:
    """1, 8, 16, 32, ... up to and including `largest`."""
    sizes, size = [1], SECOND_BUCKET
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest) if largest > 1 else (1,)


def parse_buckets(
    text: str | None, *, option: str, limit: int, num_shards: int = 1
) -> tuple[int, ...] | None:
    """Read the value of an option such as `--token-buckets 1,8,24,64`.

    The numbers are of a whole step, as the limits are; the buckets are of one data shard. If the
    limit itself is not among them it is added, and the log says so: every step must fit.

    Args:
        text: ascending numbers with commas between; None for no choice.
        option: the option's name, for messages.
        limit: the largest step, over all data shards.
        num_shards: data shards.

    Returns:
        Sizes of one shard's buckets, the last of them limit / num_shards; None for None.

    Raises:
        ConfigError: not such a list, a number above the limit, or one that the shards do not
            divide.
    """
    if text is None:
        return None
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} must be whole numbers with commas between, got {text!r}"
        ) from None
    if sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ConfigError(f"{option} must be positive and ascending, got {text}")
    if sizes[-1] > limit:
        raise ConfigError(f"{option} {sizes[-1]} is more than a step can have, {limit}")
    if sizes[-1] < limit:
        log.info("%s: added %d, the largest step there can be", option, limit)
        sizes.append(limit)
    for size in sizes:
        if size % num_shards:
            raise ConfigError(f"{option} {size} must divide by the mesh's data={num_shards}")
    return tuple(size // num_shards for size in sizes)


def pick(buckets: Sequence[int], size: int) -> int:
    """The smallest bucket that holds `size`.

    Raises:
        ValueError: even the largest bucket is too small; the scheduler broke its budget.
    """
    index = bisect.bisect_left(buckets, size)
    if index == len(buckets):
        raise ValueError(f"{size} exceeds the largest bucket, {buckets[-1]}")
    return buckets[index]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Shapes of one data shard's part of a step.

    Attributes:
        tokens: query tokens per shard; one backbone program each.
        sampled: rows that sample per shard; one sampler program each.
        max_rows: rows per shard at most (a step of t tokens has min(t, max_rows) of them).
        max_pages: width of the page table.
    """

    tokens: tuple[int, ...]
    sampled: tuple[int, ...]
    max_rows: int
    max_pages: int

    @classmethod
    def for_limits(
        cls,
        *,
        max_tokens: int,
        max_rows: int,
        max_model_len: int,
        page_size: int,
        tokens: tuple[int, ...] | None = None,
        sampled: tuple[int, ...] | None = None,
    ) -> "Buckets":
        """Buckets up to a shard's limits.

        Args:
            max_tokens, max_rows: of one shard's part of a step.
            max_model_len, page_size: in tokens.
            tokens, sampled: the buckets, ascending, up to the limits (see `parse_buckets` and
                `bucket_choice`); None for doubling ones.

        Raises:
            ConfigError: the largest bucket is not the limit.
        """
        tokens = tokens or doubling_buckets(max_tokens)
        sampled = sampled or doubling_buckets(max_rows)
        for name, sizes, limit in (("token", tokens, max_tokens), ("row", sampled, max_rows)):
            if sizes[-1] != limit:
                raise ConfigError(f"the largest {name} bucket is {sizes[-1]}, steps have {limit}")
        return cls(
            tokens=tokens,
            sampled=sampled,
            max_rows=max_rows,
            max_pages=-(-max_model_len // page_size),
        )

    @classmethod
    def of_config(
        cls, config: EngineConfig, *, max_model_len: int, num_shards: int = 1
    ) -> "Buckets":
        """The buckets of an engine with these options.

        Args:
            config: its limits, and its choice of buckets if it has one.
            max_model_len: as resolved for the model.
            num_shards: data shards.

        Raises:
            ConfigError: a choice of buckets that does not fit the limits.
        """
        max_tokens, max_rows = config.max_num_batched_tokens, config.max_num_seqs
        tokens, rows = (
            parse_buckets(text, option=option, limit=limit, num_shards=num_shards)
            for text, option, limit in (
                (config.token_buckets, "--token-buckets", max_tokens),
                (config.row_buckets, "--row-buckets", max_rows),
            )
        )
        return cls.for_limits(
            max_tokens=max_tokens // num_shards,
            max_rows=max_rows // num_shards,
            max_model_len=max_model_len,
            page_size=config.page_size,
            tokens=tokens,
            sampled=rows,
        )

    @property
    def late(self) -> tuple[int, ...]:
        """Row buckets of late steps, ascending: of `sampled` the last, and so on by quarters.

        A late step takes several programs (see `late_sampler`), and every program costs the
        start; fewer of them cost some late steps more padding.
        """
        chosen = [self.sampled[-1]]
        for size in reversed(self.sampled):
            if size <= chosen[-1] // 4:
                chosen.append(size)
        return tuple(reversed(chosen))

    def rows(self, tokens: int) -> int:
        """Rows of a step in the bucket of `tokens` tokens: every row brings at least one."""
        return min(tokens, self.max_rows)
