"""How well answer lengths are predicted: by each way of learning, beside always the mean.

1. The engine answers varied prompts, greedily, as long as the model likes, up to a limit. A
   recorder in the predictor's place notes lengths and the hidden states it is shown.
2. Each predictor goes through the first of these answers in order of arrival, as in the server
   (predict, refine, learn), with as much training per answer as there.
3. It then predicts the rest, which it never learns from.

Figures, all of the answers kept out unless it says `online`:

* tau: Kendall's tau-b of predicted and true lengths. Answers that were cut off at the limit tie,
  which keeps tau-b below 1 for everything that has no ties.
* bucket accuracy: predicted within the right power of two.
* MAE: mean absolute error in tokens.
* while decoding: the same of remaining lengths at every probe of every answer; `kept` goes by
  the prediction made at arrival, `refined` by the latest hidden state, too.
* online: tau and MAE of the answers learned from, each predicted before it was learned from.
* us: median microseconds of `predict` and of `refine` per request, on the caller's thread.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from jaxserve.bench.prompts import make_prompts, tokenize_prompts
from jaxserve.bench.settings import PredictorSpec
from jaxserve.bench.sides import Sides
from jaxserve.bench.stepping import TimedRequest
from jaxserve.bench.tables import Result, format_table
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.request import FinishReason, Request
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.prediction.base import LengthPredictor, PredictorMetrics, bucket_of, kendall_tau

if TYPE_CHECKING:
    from jaxserve.prediction.predictor import LearnedPredictor

SMALLEST_PART = 2  # answers, learned from or kept out


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer as a predictor saw it come.

    Attributes:
        prompt_token_ids: its prompt.
        probes: answer tokens so far, and the hidden state float32 [hidden] the last came from.
        length: answer tokens in all.
        finish_reason: why it ended.
    """

    prompt_token_ids: list[int]
    probes: list[tuple[int, np.ndarray]] = dataclasses.field(default_factory=list)
    length: int = 0
    finish_reason: FinishReason | None = None


class Recorder:
    """Notes what the engine tells its predictor; implements `LengthPredictor`.

    Args:
        predictor: the one that makes the predictions meanwhile.

    Attributes:
        answers: by request id, in order of arrival.
    """

    def __init__(self, predictor: LengthPredictor) -> None:
        self.name = predictor.name
        self.probe_every = predictor.probe_every
        self.answers: dict[str, Answer] = {}
        self._predictor = predictor

    def predict(self, request: Request) -> float | None:
        """As the other predictor says."""
        self.answers[request.request_id] = Answer(request.prompt_token_ids)
        return self._predictor.predict(request)

    def refine(self, requests: Sequence[Request], hidden: np.ndarray) -> list[float]:
        """As the other predictor says."""
        for request, row in zip(requests, hidden, strict=True):
            probe = (len(request.output_token_ids), row.copy())
            self.answers[request.request_id].probes.append(probe)
        return self._predictor.refine(requests, hidden)

    def finished(self, request: Request) -> None:
        """Note the length. The other one learns nothing here, and takes no time."""
        answer = self.answers[request.request_id]
        answer.length = len(request.output_token_ids)
        answer.finish_reason = request.finish_reason

    def metrics(self) -> PredictorMetrics:
        """Those of the other predictor."""
        return self._predictor.metrics()

    def close(self) -> None:
        """Close the other predictor."""
        self._predictor.close()


@dataclasses.dataclass(frozen=True)
class Errors:
    """Predictions against what came out; see the module."""

    tau: float
    bucket_accuracy: float
    mae: float

    @classmethod
    def of(cls, predicted: Sequence[float], actual: Sequence[float]) -> "Errors":
        """The errors of two equally long sequences of lengths, not empty."""
        guess, truth = np.array(predicted, np.float64), np.array(actual, np.float64)
        same = bucket_of(guess) == bucket_of(truth)
        mae = float(np.abs(guess - truth).mean())
        return cls(kendall_tau(guess, truth), float(same.mean()), mae)


@dataclasses.dataclass(frozen=True)
class PredictorFigures:
    """One predictor's figures; see the module. What the mean has none of is None."""

    arrival: Errors
    kept: Errors
    refined: Errors | None = None
    online_tau: float | None = None
    online_mae: float | None = None
    predict_us: float | None = None
    refine_us: float | None = None


@dataclasses.dataclass(frozen=True)
class PredictorReport(Result):
    """All figures.

    Attributes:
        predictors: by name, `mean` first.
        train_lengths, test_lengths: answer tokens of those learned from and of those kept out.
        num_cut: answers cut off at the limit, of all.
        num_probes: hidden states of the answers kept out.
    """

    predictors: dict[str, PredictorFigures]
    train_lengths: list[int]
    test_lengths: list[int]
    num_cut: int
    num_probes: int

    def __str__(self) -> str:
        header = ("predictor", "tau", "bucket", "MAE", "decoding: kept tau", "MAE", "refined tau",
                  "MAE", "online tau", "MAE", "predict us", "refine us")  # fmt: skip
        rows = [(name, *_cells(figures)) for name, figures in self.predictors.items()]
        lengths = [*self.train_lengths, *self.test_lengths]
        low, middle, high = np.percentile(lengths, [10, 50, 90])
        return (
            f"answers of {min(lengths)} to {max(lengths)} tokens: mean {np.mean(lengths):.0f}, "
            f"deciles {low:.0f}, {middle:.0f} and {high:.0f}; {self.num_cut} of {len(lengths)} "
            f"were cut off\n{len(self.train_lengths)} learned from, {len(self.test_lengths)} kept "
            f"out, with {self.num_probes} hidden states\n{format_table(header, rows)}"
        )


def _cells(figures: PredictorFigures) -> list[str]:
    def pair(errors: Errors | None) -> list[str]:
        return ["-", "-"] if errors is None else [f"{errors.tau:.3f}", f"{errors.mae:.1f}"]

    tau, mae = pair(figures.arrival)
    rest = (
        (figures.online_tau, "{:.3f}"), (figures.online_mae, "{:.1f}"),
        (figures.predict_us, "{:.0f}"), (figures.refine_us, "{:.0f}"),
    )  # fmt: skip
    return [
        tau, f"{figures.arrival.bucket_accuracy:.0%}", mae,
        *pair(figures.kept), *pair(figures.refined),
        *("-" if value is None else form.format(value) for value, form in rest),
    ]  # fmt: skip


def measure_predictors(config: EngineConfig, spec: PredictorSpec, sides: Sides) -> PredictorReport:
    """Draw prompts, have them answered once, then train and test the predictors on the answers."""
    prompts = tokenize_prompts(config, make_prompts(spec.num_prompts, seed=spec.seed))
    features, answers = record_answers(config, spec, prompts, sides)
    return compare_predictors(features, answers, spec, progress=sides.progress)


def record_answers(
    config: EngineConfig, spec: PredictorSpec, prompts: Sequence[Sequence[int]], sides: Sides
) -> tuple[Any, list[Answer]]:
    """Let an engine that has a learned predictor answer.

    Args:
        config: the engine's options; what concerns prediction and context is set here.
        spec: what is asked.
        prompts: token ids, in order of arrival.
        sides: runs the engine.

    Returns:
        How its predictor sees prompts (`prediction.features.Features`), and the answers.

    Raises:
        ConfigError: too few prompts to learn from some and keep out others.
    """
    num_train = int(len(prompts) * spec.train_share)
    if num_train < SMALLEST_PART or len(prompts) - num_train < SMALLEST_PART:
        raise ConfigError(f"{len(prompts)} prompts are too few to learn from some of them")
    params = SamplingParams(temperature=0.0, max_tokens=spec.max_output_len)
    requests = [
        TimedRequest(request_id=str(i), prompt_token_ids=prompt, params=params)
        for i, prompt in enumerate(prompts)
    ]
    with tempfile.TemporaryDirectory(prefix="jaxserve-predictor-") as directory:
        config = dataclasses.replace(
            config,
            length_predictor=spec.predictors[0],
            predictor_dir=directory,
            max_model_len=max(map(len, prompts)) + spec.max_output_len,
            max_waiting=max(config.max_waiting, len(prompts)),
        )
        with sides.alone(config) as driver:
            engine = driver.engine
            predictor: Any = engine.predictor
            engine.predictor = recorder = Recorder(predictor)
            driver.run(requests, progress=sides.title("answers"))
            engine.predictor = predictor
    return predictor.features, list(recorder.answers.values())


def compare_predictors(
    features: Any, answers: Sequence[Answer], spec: PredictorSpec, *, progress: bool = False
) -> PredictorReport:
    """Train every predictor on the first answers, and test it on the others.

    Args:
        features: how predictors see prompts and hidden states (`prediction.features.Features`).
        answers: in order of arrival.
        spec: the predictors, and how many answers they learn from.
        progress: show progress bars.
    """
    from jaxserve.prediction.predictor import LearnedPredictor

    num_train = int(len(answers) * spec.train_share)
    train, test = answers[:num_train], answers[num_train:]
    figures = {"mean": _mean_figures(train, test)}
    for name in spec.predictors:
        predictor = LearnedPredictor(
            name, features, spec.max_output_len, None,
            lambda name, lower: lower().compile(), background=False, seed=spec.seed,
        )  # fmt: skip
        for i, answer in enumerate(tqdm(train, desc=name, disable=not progress)):
            _learn(predictor, f"train{i}", answer, spec.max_output_len)
        figures[name] = _test(predictor, test, spec.max_output_len)
        predictor.close()
    return PredictorReport(
        figures,
        [answer.length for answer in train],
        [answer.length for answer in test],
        sum(answer.finish_reason is FinishReason.LENGTH for answer in answers),
        sum(len(answer.probes) for answer in test),
    )


def _request(request_id: str, answer: Answer, max_tokens: int) -> Request:
    return Request(
        request_id=request_id, prompt_token_ids=answer.prompt_token_ids,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens), max_tokens=max_tokens,
    )  # fmt: skip


def _grow(request: Request, length: int) -> None:
    """Let an answer have so many tokens; predictors look at their number only."""
    request.output_token_ids = [0] * length
    request.num_tokens = len(request.prompt_token_ids) + length


def _learn(predictor: "LearnedPredictor", request_id: str, answer: Answer, max_tokens: int) -> None:
    request = _request(request_id, answer, max_tokens)
    predictor.predict(request)
    for position, hidden in answer.probes:
        _grow(request, position)
        predictor.refine([request], hidden[None])
    _grow(request, answer.length)
    request.finish_reason = answer.finish_reason
    predictor.finished(request)
    predictor.catch_up()


def _test(
    predictor: "LearnedPredictor", answers: Sequence[Answer], max_tokens: int
) -> PredictorFigures:
    online = predictor.metrics()
    arrival: list[float] = []
    kept: list[float] = []
    refined: list[float] = []
    predict_seconds: list[float] = []
    refine_seconds: list[float] = []
    for i, answer in enumerate(answers):
        request = _request(f"test{i}", answer, max_tokens)
        length, seconds = _timed(lambda r=request: predictor.predict(r))
        predict_seconds.append(seconds)
        arrival.append(length)
        for position, hidden in answer.probes:
            _grow(request, position)
            new, seconds = _timed(lambda r=request, h=hidden: predictor.refine([r], h[None]))
            refine_seconds.append(seconds)
            kept.append(max(length - position, 1))
            refined.append(new[0] - position)
        request.finish_reason = FinishReason.ABORT  # teaches nothing
        predictor.finished(request)
    lengths, rests = _lengths(answers), _rests(answers)
    return PredictorFigures(
        Errors.of(arrival, lengths),
        Errors.of(kept, rests),
        Errors.of(refined, rests),
        online.kendall_tau,
        online.mae,
        1e6 * float(np.median(predict_seconds)),
        1e6 * float(np.median(refine_seconds)),
    )


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _mean_figures(train: Sequence[Answer], test: Sequence[Answer]) -> PredictorFigures:
    mean = float(np.mean(_lengths(train)))
    positions = [position for answer in test for position, _ in answer.probes]
    return PredictorFigures(
        Errors.of([mean] * len(test), _lengths(test)),
        Errors.of([max(mean - position, 1) for position in positions], _rests(test)),
    )


def _lengths(answers: Sequence[Answer]) -> list[float]:
    return [float(answer.length) for answer in answers]


def _rests(answers: Sequence[Answer]) -> list[float]:
    """What remained at every probe."""
    return [float(a.length - position) for a in answers for position, _ in a.probes]
