"""Foretells the lengths of answers, and learns from those that have ended."""

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxserve.core.at_exit import close_at_exit
from jaxserve.core.request import FinishReason, Request
from jaxserve.prediction.base import ANSWERED, PredictionErrors, PredictorMetrics
from jaxserve.prediction.bins import LengthBins
from jaxserve.prediction.features import Features
from jaxserve.prediction.files import load_state, save_state
from jaxserve.prediction.learner import Learner
from jaxserve.prediction.network import Compile

log = logging.getLogger(__name__)

PROBE_EVERY = 8  # answer tokens between two looks at the hidden state
FIRST_GUESS = 128.0  # tokens, before any answer has ended
PROMPT_WINDOW = 1024  # requests
PROBE_WINDOW = 4096  # hidden states
PROBES_KEPT = 12  # of one request, for learning
PROMPT_STEPS, PROBE_STEPS = 4, 6  # of training, per finished request
NEW_SHARE = 0.3  # of the latest hidden state in an estimate
DUTY = 0.05  # share of the time that the training thread may be busy, at most
SLICE = 8  # steps between two rests
CLOSE_SECONDS = 2.0  # to finish training before it is kept
SAVE_EVERY = 256  # finished requests
MAX_VARIANCE, MAX_MEAN = 1e4, 1e9  # of what is restored
MAX_OPEN = 16384  # requests remembered; more only lose what the oldest could have taught


@dataclasses.dataclass
class _Open:
    """What is remembered of a request until it ends.

    Attributes:
        features: float16 [prompt features].
        predicted: answer tokens in all, at arrival.
        remaining: the distribution of what remains after `position` tokens, float64 [bins];
            None until the first probe, if it then follows from `predicted`.
        position: answer tokens when it was refined last.
        probes: hidden-state features and the positions they were seen at, for learning.
        num_probes: those seen, kept or not.
    """

    features: np.ndarray
    predicted: float
    remaining: np.ndarray | None
    position: int = 0
    probes: list[tuple[np.ndarray, int]] = dataclasses.field(default_factory=list)
    num_probes: int = 0


@dataclasses.dataclass(frozen=True)
class _Example:
    """A finished request on its way to the learners."""

    features: np.ndarray
    probes: list[tuple[np.ndarray, int]]
    predicted: float
    length: int
    censored: bool


class LearnedPredictor:
    """Learns from finished requests while serving; implements `LengthPredictor`.

    At arrival a small network over the prompt's embeddings predicts the length: by regression
    (`exact`), as the median of a distribution over ranges (`range`, S3), or by a ranking score
    that isotonic regression maps to tokens (`rank`, Fu et al. 2024). Before MIN_EXAMPLES
    requests have ended the prediction is the mean of those that have, and `FIRST_GUESS` before
    the first one.

    While an answer grows its hidden states refine the estimate, as in TRAIL (Shahout et al.,
    2024), whichever way the first one was made: a distribution over the remaining length is
    moved on by the tokens generated since, and mixed with what a second network says about the
    newest state. TRAIL multiplies the two as if they were independent, and neighbouring states
    are not: on 700 answers of SmolLM2 the mean error was 21.8 tokens with the product (43 at the
    first token), 20.0 with the mixture (34), and 23.1 without hidden states (34).

    Requests that were cut off at `max_tokens` teach a lower bound, aborted ones nothing, and
    those that ignore EOS are as long as they say. The engine's thread does arithmetic in numpy
    with weights that a thread of its own trains and swaps in, at a small duty cycle.

    Args:
        objective: `exact`, `range` or `rank`; also the name.
        features: of prompts and hidden states.
        max_tokens: the longest possible answer.
        path: where what was learned is kept; None keeps nothing.
        compile: see `TrainingStep`; it is called here, and no program is compiled later.
        background: train on a thread. Otherwise only `catch_up` does.
        seed: of all that is random in training.
    """

    def __init__(
        self,
        objective: str,
        features: Features,
        max_tokens: int,
        path: Path | None,
        compile: Compile,
        *,
        background: bool = True,
        seed: int = 0,
    ) -> None:
        self.name = objective
        self.probe_every = PROBE_EVERY
        self.features = features
        self._bins = LengthBins(max_tokens)
        self._path = path
        self._prompts = Learner(
            objective, f"predict-{objective}-prompt", self._bins, features.prompt_size,
            PROMPT_WINDOW, compile, seed,
        )  # fmt: skip
        self._probes = Learner(
            "range", f"predict-{objective}-probe", self._bins, features.hidden_size,
            PROBE_WINDOW, compile, seed + 1,
        )  # fmt: skip
        self._open: dict[int, _Open] = {}
        self._random = np.random.default_rng(seed)
        self._errors = PredictionErrors()
        self._mean = FIRST_GUESS
        self._variance = 1.0  # of the logarithm of what came out over what was predicted
        self._unsaved = 0
        self._finished: queue.SimpleQueue[_Example | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._failed = False
        self._restore()
        self._thread = threading.Thread(target=self._run, name="length-predictor", daemon=True)
        if background:
            self._thread.start()
            close_at_exit(self)

    # -- the engine's thread --------------------------------------------------------------

    def predict(self, request: Request) -> float:
        """Answer tokens in all, at arrival, between 1 and `max_tokens`."""
        if _runs_to_its_limit(request):
            return float(request.max_tokens)
        features = self.features.prompt(request.prompt_token_ids)
        length, shares = self._mean, None
        model = self._prompts.model
        if model is not None:
            outputs = model.outputs(features[None])
            length = float(model.lengths(outputs)[0])
            if model.objective == "range":
                shares = model.shares(outputs)[0].astype(np.float64)
        length = min(max(length, 1.0), float(request.max_tokens))
        if len(self._open) >= MAX_OPEN:
            del self._open[next(iter(self._open))]
        self._open[request.key] = _Open(features.astype(np.float16), length, shares)
        return length

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        """New estimates of answer tokens in all; see `LengthPredictor`."""
        positions = [len(request.output_token_ids) for request in requests]
        features = self.features.hidden(hidden, np.maximum(positions, 1))
        model = self._probes.model
        says = None if model is None else model.shares(model.outputs(features))
        remaining = np.empty((len(requests), len(self._bins)))
        for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
            known = self._open.get(request.key)
            if known is None:  # forgotten, or one that runs to its limit
                known = _Open(features[row], float(request.max_tokens), None)
            else:
                self._keep_probe(known, features[row], position)
            shares = self._moved_on(known, position)
            if says is not None:
                shares = (1 - NEW_SHARE) * shares + NEW_SHARE * says[row]
            known.remaining, known.position = shares, position
            remaining[row] = shares
        more = self._bins.quantile(remaining).tolist()
        return [
            _total(request, position, rest)
            for request, position, rest in zip(requests, positions, more, strict=True)
        ]

    def finished(self, request: Request) -> None:
        """A request ended: hand it to the training thread, if it can teach anything."""
        known = self._open.pop(request.key, None)
        length = len(request.output_token_ids)
        if known is None or request.finish_reason not in ANSWERED or not length:
            return
        self._errors.add(known.predicted, length)
        if self._failed:  # nobody would take it
            return
        censored = request.finish_reason is FinishReason.LENGTH
        self._finished.put(
            _Example(known.features, known.probes, known.predicted, length, censored)
        )

    def metrics(self) -> PredictorMetrics:
        """Errors of the predictions at arrival; safe to call from another thread."""
        return self._errors.metrics()

    def _keep_probe(self, known: _Open, features: np.ndarray, position: int) -> None:
        """Keep a fair sample of a request's probes, however many there are."""
        known.num_probes += 1
        probe = (features.astype(np.float16), position)
        if len(known.probes) < PROBES_KEPT:
            known.probes.append(probe)
        elif (at := int(self._random.integers(known.num_probes))) < PROBES_KEPT:
            known.probes[at] = probe

    def _moved_on(self, known: _Open, position: int) -> np.ndarray:
        """The distribution of what remains, given that it is not over yet: float64 [bins]."""
        before = known.remaining
        if before is None:
            before = self._bins.lognormal(known.predicted, math.sqrt(self._variance))
        shares = self._bins.advance(position - known.position) @ before
        total = shares.sum()
        if total > 1e-9:
            return shares / total
        # It outlived all that was thought possible: as likely to go on as it is old.
        return self._bins.lognormal(max(position, 1), 1.0)

    # -- the training thread --------------------------------------------------------------

    def catch_up(self) -> None:
        """Train on all that has finished, here and now; only without a thread of its own.

        Raises:
            RuntimeError: there is one.
        """
        if self._thread.is_alive():
            raise RuntimeError("the predictor trains in the background")
        self._take_in(block=False)
        while self._train():
            pass

    def close(self) -> None:
        """Stop training and keep what was learned. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._finished.put(None)
        if self._thread.is_alive():
            self._thread.join()
        if self._path is not None and not self._failed:
            self._take_in(block=False)
            until = time.monotonic() + CLOSE_SECONDS
            while time.monotonic() < until and self._train():
                pass
            self._save()

    def close_at_exit(self) -> None:
        """Close, if the engine was dropped without doing so: its thread computes with JAX."""
        self.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._take_in(block=True)
                while not self._closing.is_set():
                    started = time.perf_counter()
                    if not self._train():
                        break
                    # Serving has the rest of the time.
                    self._closing.wait((time.perf_counter() - started) * (1 / DUTY - 1))
                    self._take_in(block=False)
                if self._unsaved >= SAVE_EVERY:
                    self._save()
        except Exception:  # serving goes on with what was learned so far
            self._failed = True
            log.exception("the length predictor stopped learning")

    def _take_in(self, *, block: bool) -> None:
        while True:
            try:
                example = self._finished.get(block=block)
            except queue.Empty:
                return
            block = False
            if example is not None:
                self._learn_from(example)

    def _learn_from(self, example: _Example) -> None:
        prompts, probes = self._prompts, self._probes
        prompts.add(example.features, example.length, example.censored)
        prompts.owe(PROMPT_STEPS)
        for features, position in example.probes:
            if position < example.length:
                probes.add(features, example.length - position, example.censored)
        if example.probes:
            probes.owe(PROBE_STEPS)
        self._mean = float(prompts.window.lengths[: len(prompts.window)].mean())
        error = math.log(example.length / example.predicted)
        self._variance += 0.02 * (error * error - self._variance)
        self._unsaved += 1

    def _train(self) -> bool:
        """A slice of training; whether there was anything to do."""
        learners = [learner for learner in (self._prompts, self._probes) if learner.owed]
        for learner in learners:
            learner.train(SLICE)
        return bool(learners)

    # -- over a restart -------------------------------------------------------------------

    def _save(self) -> None:
        self._unsaved = 0
        if self._path is None:
            return
        arrays = {"variance": np.array(self._variance), "mean": np.array(self._mean)}
        for part, learner in (("prompts", self._prompts), ("probes", self._probes)):
            arrays |= {f"{part}.{name}": value for name, value in learner.arrays().items()}
        save_state(self._path, arrays)

    def _restore(self) -> None:
        if self._path is None:
            return
        try:
            arrays = load_state(self._path)
            if arrays is None:
                return
            variance, mean = float(arrays["variance"]), float(arrays["mean"])
            if not (0 < variance <= MAX_VARIANCE and 1 <= mean <= MAX_MEAN):
                raise ValueError(f"a variance of {variance} around a mean of {mean}")
            learned = [
                (learner, learner.checked(_of_part(part, arrays)))
                for part, learner in (("prompts", self._prompts), ("probes", self._probes))
            ]
            for learner, what in learned:
                learner.restore(what)
            self._variance, self._mean = variance, mean
        except Exception as error:  # a bad file must not keep the server from starting
            log.warning("ignoring what a length predictor learned (%s): %s", self._path, error)


def _of_part(part: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one learner, by its own names."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _runs_to_its_limit(request: Request) -> bool:
    params = request.params
    return params.ignore_eos and not params.stop and not params.stop_token_ids


def _total(request: Request, position: int, remaining: float) -> float:
    if _runs_to_its_limit(request):
        return float(request.max_tokens)
    least = max(position, request.num_output_tokens) + 1
    return float(min(max(position + remaining, least), request.max_tokens))
