"""Chat prompts in a mix of its own: most ask for a little, some for a lot, as in real traffic."""

import random

from jaxserve.bench.prompts import ChatPrompt, make_prompts
from jaxserve.core.errors import ConfigError

# Kinds that SmolLM2-135M answers with 140 tokens and more on average; the others take under 100.
LONG_KINDS = frozenset({"story", "explanation", "code", "poem", "email", "advice", "list"})


def mix_prompts(count: int, long_share: float, *, seed: int = 0) -> list[ChatPrompt]:
    """Draw different prompts, in random order.

    Args:
        count: how many.
        long_share: share of prompts that ask for long answers, in [0, 1]; rounded to whole ones.
        seed: the same seed gives the same prompts.

    Raises:
        ConfigError: there are not that many different ones, or the numbers make no sense.
    """
    if count < 1 or not 0 <= long_share <= 1:
        raise ConfigError(
            f"there must be at least one prompt and a share in [0, 1], got {count} and {long_share}"
        )
    num_long = round(count * long_share)
    wanted = {True: num_long, False: count - num_long}
    # Half of the kinds are long. Those with few variants fall behind in a large draw.
    drawn = make_prompts(6 * max(wanted.values()), seed=seed)
    mixed = [
        prompt
        for is_long, number in wanted.items()
        for prompt in [p for p in drawn if (p.kind in LONG_KINDS) == is_long][:number]
    ]
    if len(mixed) < count:
        raise ConfigError(f"only {len(mixed)} different prompts in that mix, not {count}")
    random.Random(seed).shuffle(mixed)
    return mixed
