"""What a predictor of answer lengths is, those that need no learning, and how errors are counted.

Predictions only order requests and estimate memory: an answer that turns out longer than
predicted simply goes on.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxserve.core.request import FinishReason, Request

ERROR_WINDOW = 512  # finished requests that errors are computed over


@dataclasses.dataclass(frozen=True)
class PredictorMetrics:
    """How good the predictions made at arrival were, over the requests that finished last.

    Attributes:
        samples: finished requests whose prediction was compared, since the start.
        mae: mean absolute error in tokens, over the last `ERROR_WINDOW` of them.
        mean_mae: that of always predicting the mean of all answers before, for comparison.
        bucket_accuracy: share predicted within the right power of two (see `bucket_of`).
        kendall_tau: rank correlation of predictions and lengths, 1 for the right order; see
            `kendall_tau`.
    """

    samples: int = 0
    mae: float = 0.0
    mean_mae: float = 0.0
    bucket_accuracy: float = 0.0
    kendall_tau: float = 0.0


class LengthPredictor(Protocol):
    """Foretells how many tokens an answer will have.

    Called on the engine's thread, each call well under 100 us per request.

    Attributes:
        name: as in `--length-predictor`.
        probe_every: n > 0 asks for the last hidden state of every n-th answer token; 0: never.
    """

    name: str
    probe_every: int

    def predict(self, request: Request) -> float | None:
        """Answer tokens in all, at arrival, between 1 and `max_tokens`; None: no idea."""
        ...

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        """New estimates of answer tokens in all, for requests that are being answered.

        Args:
            requests: each with the token sampled from `hidden` in its `output_token_ids`.
            hidden: float32 [requests, hidden], as `StepResult.hidden`.

        Returns:
            One estimate per request: at most `max_tokens`, and above what it has already
            unless that is `max_tokens`.
        """
        ...

    def finished(self, request: Request) -> None:
        """A request ended, in any way; learn from it, later and elsewhere."""
        ...

    def metrics(self) -> PredictorMetrics:
        """Errors so far; safe to call from another thread."""
        ...

    def close(self) -> None:
        """Stop learning and keep what was learned. Idempotent."""
        ...


class NoPredictor:
    """Has no idea, ever; implements `LengthPredictor`."""

    name = "none"
    probe_every = 0

    def predict(self, request: Request) -> float | None:
        """None."""
        return None

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        """Never asked for, since nothing is probed.

        Raises:
            ValueError: always.
        """
        raise ValueError("nothing is refined without probes")

    def finished(self, request: Request) -> None:
        """Nothing is learned."""

    def metrics(self) -> PredictorMetrics:
        """No samples."""
        return PredictorMetrics()

    def close(self) -> None:
        """There is nothing to close."""


class OraclePredictor:
    """Knows the lengths, for experiments; implements `LengthPredictor`.

    Args:
        lengths: answer tokens by request id. Without an entry `max_tokens` is taken for the
            truth, as it is for requests that ignore EOS.
    """

    name = "oracle"
    probe_every = 0

    def __init__(self, lengths: Mapping[str, int] | None = None) -> None:
        self._lengths = lengths or {}
        self._errors = PredictionErrors()

    def predict(self, request: Request) -> float | None:
        """The length from the table, or `max_tokens`."""
        length = self._lengths.get(request.request_id, request.max_tokens)
        return float(min(max(length, 1), request.max_tokens))

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        """Never asked for, since nothing is probed.

        Raises:
            ValueError: always.
        """
        raise ValueError("an oracle has nothing to refine")

    def finished(self, request: Request) -> None:
        """Count the error: a table can be wrong, and so can `max_tokens`."""
        predicted = self.predict(request)
        if predicted is not None and request.finish_reason in ANSWERED:
            self._errors.add(predicted, len(request.output_token_ids))

    def metrics(self) -> PredictorMetrics:
        """Errors of the table or of `max_tokens`."""
        return self._errors.metrics()

    def close(self) -> None:
        """There is nothing to close."""


ANSWERED = (FinishReason.STOP, FinishReason.LENGTH)  # ends that say how long an answer was


class PredictionErrors:
    """Compares predictions with the lengths that came out, over a rolling window.

    Args:
        window: pairs kept.
    """

    def __init__(self, window: int = ERROR_WINDOW) -> None:
        self._lock = threading.Lock()
        # predicted, actual, mean of the actual ones before
        self._window: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._samples = 0
        self._total = 0.0

    def add(self, predicted: float, actual: float) -> None:
        """Note a prediction that was made before `actual` was known."""
        with self._lock:
            mean = self._total / self._samples if self._samples else predicted
            self._window.append((predicted, actual, mean))
            self._samples += 1
            self._total += actual

    def metrics(self) -> PredictorMetrics:
        """The errors as of now; all zeros without any."""
        with self._lock:
            pairs, samples = list(self._window), self._samples
        if not pairs:
            return PredictorMetrics()
        predicted, actual, mean = np.array(pairs, np.float64).T
        return PredictorMetrics(
            samples=samples,
            mae=float(np.abs(predicted - actual).mean()),
            mean_mae=float(np.abs(mean - actual).mean()),
            bucket_accuracy=float((bucket_of(predicted) == bucket_of(actual)).mean()),
            kendall_tau=kendall_tau(predicted, actual),
        )


def bucket_of(lengths: np.ndarray) -> np.ndarray:
    """The power of two that lengths fall into: 0 for 1, 1 for 2..3, 2 for 4..7, ...

    Args:
        lengths: tokens, any shape; fractions are rounded.

    Returns:
        int64, the same shape.
    """
    return np.floor(np.log2(np.maximum(np.rint(lengths), 1))).astype(np.int64)


def kendall_tau(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Kendall's tau-b, which corrects for ties; 0 if either side is all ties.

    Args:
        predicted, actual: float [n]; takes O(n^2) time and memory.
    """
    signs = [
        np.sign(values[:, None] - values[None, :]).astype(np.int8)
        for values in (np.asarray(predicted), np.asarray(actual))
    ]
    untied = [int(np.count_nonzero(sign)) for sign in signs]
    if 0 in untied:
        return 0.0
    agreement = int(np.sum(signs[0] * signs[1], dtype=np.int64))
    return float(agreement / np.sqrt(float(untied[0]) * untied[1]))
