"""Measures this machine: memory read bandwidth and float32 matmul speed, with N threads.

Run as `python machine.py THREADS`; prints one JSON object. In a process of its own because
the thread count of NumPy's BLAS is fixed when it is loaded. NumPy only, no jaxserve.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from harness import limit_threads

ARRAY_BYTES = 2**30  # many times larger than any cache
MATMUL_SIZE = 4096
REPEATS = 7


def best_seconds(function: Callable[[], object]) -> float:
    """The fastest of several runs: what is not the fastest was disturbed."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Measure and print."""
    threads = int(sys.argv[1])
    limit_threads(threads)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import numpy as np

    # Reading as a decode step does: a matrix times a vector, every weight used once.
    weights = np.ones((ARRAY_BYTES // 4 // 4096, 4096), np.float32)
    vector = np.ones(4096, np.float32)
    slices = np.array_split(weights, threads)
    with ThreadPoolExecutor(threads) as pool:
        product = best_seconds(lambda: list(pool.map(lambda part: part @ vector, slices)))
        total = best_seconds(lambda: list(pool.map(np.sum, slices)))
    a = np.ones((MATMUL_SIZE, MATMUL_SIZE), np.float32)
    b, out = a.copy(), np.empty_like(a)
    matmul = best_seconds(lambda: np.matmul(a, b, out=out))
    bandwidth = weights.nbytes / min(product, total)
    print(json.dumps({"bandwidth": bandwidth, "matmul": 2 * MATMUL_SIZE**3 / matmul}))


if __name__ == "__main__":
    main()
