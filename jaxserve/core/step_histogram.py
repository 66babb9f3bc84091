"""How large the steps were that a server ran: what good buckets are chosen from."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.core.step import StepPlan

FORMAT = "jaxserve step histogram 1"


class StepHistogram:
    """Counts steps by their tokens and their rows that sample, both of the fullest data shard.

    The fullest shard decides about the bucket of all. One count a step, so it can always run.

    Attributes:
        num_shards: data shards of the mesh.
        steps: by (tokens, rows that sample) of a step's fullest shard.

    Raises:
        ConfigError: no shards.
    """

    def __init__(self, num_shards: int = 1) -> None:
        if num_shards < 1:
            raise ConfigError(f"there must be at least one data shard, got {num_shards}")
        self.num_shards = num_shards
        self.steps: Counter[tuple[int, int]] = Counter()

    def add(self, plan: StepPlan) -> tuple[int, int]:
        """Count a step; one that only moves pages is none.

        Returns:
            Tokens, and rows that sample, of its fullest shard (each).
        """
        if not plan.rows:
            return 0, 0
        if self.num_shards == 1:  # a list is summed faster than a generator
            tokens, sampled = [r.num_tokens for r in plan.rows], [r.samples for r in plan.rows]
            sizes = sum(tokens), sum(sampled)
        else:
            tokens, sampled = [0] * self.num_shards, [0] * self.num_shards
            for row in plan.rows:
                tokens[row.shard] += row.num_tokens
                sampled[row.shard] += row.samples
            sizes = max(tokens), max(sampled)
        self.steps[sizes] += 1
        return sizes

    @property
    def num_steps(self) -> int:
        """Steps counted."""
        return self.steps.total()

    def tokens(self) -> Counter[int]:
        """Steps by tokens of the fullest shard."""
        return self._by(0)

    def sampled(self) -> Counter[int]:
        """Steps by rows that sample in the fullest shard."""
        return self._by(1)

    def _by(self, axis: int) -> Counter[int]:
        counts: Counter[int] = Counter()
        for sizes, count in self.steps.items():
            counts[sizes[axis]] += count
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them."""
        steps = [[*sizes, count] for sizes, count in sorted(self.steps.items())]
        return {"format": FORMAT, "num_shards": self.num_shards, "tokens_sampled_count": steps}

    @classmethod
    def from_dict(cls, fields: Any) -> "StepHistogram":
        """Read what `to_dict` made.

        Raises:
            ConfigError: it is something else.
        """
        try:
            if fields["format"] != FORMAT:
                raise ValueError(f"its format is {fields['format']!r}, not {FORMAT!r}")
            histogram = cls(_whole(fields["num_shards"]))
            for tokens, sampled, count in fields["tokens_sampled_count"]:
                if _whole(tokens) < 1 or not 0 <= _whole(sampled) <= tokens or _whole(count) < 1:
                    raise ValueError(f"no step is like {[tokens, sampled, count]}")
                histogram.steps[tokens, sampled] += count
        except (KeyError, TypeError, ValueError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(f"not a step histogram: {what}") from error
        return histogram

    def save(self, path: Path) -> None:
        """Write the counts as JSON, in place of what the file held.

        Raises:
            OSError: the file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "StepHistogram":
        """Read a file that `save` wrote.

        Raises:
            ConfigError: it cannot be read or holds something else; the message names it.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # ConfigError is a ValueError, too
            raise ConfigError(f"cannot read the step histogram {path}: {error}") from error


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value
