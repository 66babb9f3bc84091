"""Which buckets to compile, given how large steps really are: dynamic programming, no JAX.

A step runs in the smallest bucket that holds it, so k buckets cut the sizes into k runs, each of
which costs what its largest size costs. Cutting a sorted list into runs of least total cost is
the textbook case for dynamic programming (as optimal one-dimensional quantisation; Bruce, 1965).
"""

import bisect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

MAX_CANDIDATES = 2048  # under 10 ms per program

Cost = Callable[[int], float]


def choose_buckets(
    counts: Mapping[int, int], *, limit: int, num_programs: int, cost: Cost = float
) -> tuple[int, ...]:
    """The buckets that minimise the expected cost of a step; O(n^2 k) on n distinct sizes.

    Args:
        counts: how often a step had each size; sizes of 0 (nothing to run) do not matter.
        limit: the largest size there can be; it is always a bucket.
        num_programs: buckets at most. Fewer come back where more would not help.
        cost: of a step in a bucket of that size, finite and not negative, such as measured seconds;
            its size by default.

    Returns:
        Ascending sizes, the last of them `limit`.

    Raises:
        ValueError: no program is allowed, or a size exceeds the limit.
    """
    if num_programs < 1:
        raise ValueError(f"there must be at least one program, got {num_programs}")
    sizes = sorted(size for size, count in counts.items() if size > 0 and count > 0)
    if sizes and sizes[-1] > limit:
        raise ValueError(f"a step of {sizes[-1]} exceeds the limit of {limit}")
    candidates = _candidates(sizes, counts, limit)
    cumulative = np.cumsum([counts[size] for size in sizes])
    upto = [bisect.bisect_right(sizes, size) for size in candidates]
    steps = np.array([0, *(cumulative[n - 1] if n else 0 for n in upto)], float)  # up to each
    costs = np.array([cost(size) for size in candidates], float)
    return tuple(candidates[i] for i in _cuts(steps, costs, num_programs))


def _candidates(sizes: Sequence[int], counts: Mapping[int, int], limit: int) -> list[int]:
    """Observed sizes, thinned so that the same amount of work lies between any two, and `limit`."""
    if len(sizes) > MAX_CANDIDATES:
        work = np.cumsum([size * counts[size] for size in sizes])
        levels = np.linspace(0, work[-1], MAX_CANDIDATES)
        sizes = sorted({sizes[i] for i in np.searchsorted(work, levels)})
    return [*(size for size in sizes if size < limit), limit]


def _cuts(steps: np.ndarray, costs: np.ndarray, num_programs: int) -> list[int]:
    """Indices of the chosen candidates, ascending, the last candidate included.

    Args:
        steps: float64 [n + 1], steps no larger than candidate i - 1; 0 first.
        costs: float64 [n], of one step in each candidate's bucket.
        num_programs: at most so many.
    """
    count = len(costs)
    best = np.full(count + 1, np.inf)  # of steps up to candidate i - 1, with the programs so far
    best[0] = 0.0
    totals, choices = [], []
    for _ in range(min(num_programs, count)):
        new, previous = np.full(count + 1, np.inf), np.zeros(count + 1, int)
        for i in range(1, count + 1):
            options = best[:i] + costs[i - 1] * (steps[i] - steps[:i])
            previous[i] = options.argmin()
            new[i] = options[previous[i]]
        best = new
        totals.append(best[count])
        choices.append(previous)
    cuts, end = [], count
    for previous in reversed(choices[: int(np.argmin(totals)) + 1]):
        cuts.append(end - 1)
        end = int(previous[end])
    return cuts[::-1]


def expected_cost(counts: Mapping[int, int], buckets: Sequence[int], cost: Cost = float) -> float:
    """Mean cost of a step that has anything to run; 0 if there was none.

    Raises:
        ValueError: a size exceeds the largest bucket.
    """
    steps = sum(count for size, count in counts.items() if size > 0)
    total = sum(count * cost(bucket) for bucket, count in steps_per_bucket(counts, buckets).items())
    return total / steps if steps else 0.0


def padding_fraction(counts: Mapping[int, int], buckets: Sequence[int]) -> float:
    """The part of all tokens (or rows) run that is padding, in [0, 1).

    Raises:
        ValueError: a size exceeds the largest bucket.
    """
    used = sum(size * count for size, count in counts.items())
    run = sum(bucket * count for bucket, count in steps_per_bucket(counts, buckets).items())
    return 1 - used / run if run else 0.0


def steps_per_bucket(counts: Mapping[int, int], buckets: Sequence[int]) -> dict[int, int]:
    """How many steps run in each bucket; steps of size 0 run in none.

    Raises:
        ValueError: a size exceeds the largest bucket.
    """
    per_bucket = dict.fromkeys(buckets, 0)
    for size, count in counts.items():
        if size > buckets[-1]:
            raise ValueError(f"{size} exceeds the largest bucket, {buckets[-1]}")
        if size > 0:
            per_bucket[buckets[bisect.bisect_left(buckets, size)]] += count
    return per_bucket
