"""What grammars keep and what they cost: answers under random JSON schemas, judged and timed."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxserve.bench.random_schemas import Schema, SchemaSource
from jaxserve.bench.settings import GrammarSpec
from jaxserve.bench.tables import Result, tabulate
from jaxserve.core.errors import ConfigError, InvalidRequest
from jaxserve.core.grammar import Grammar
from jaxserve.core.request import FinishReason
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.engine.sampling_rules import SamplingRules

if TYPE_CHECKING:
    from jaxserve.engine.engine import Engine

Judge = Callable[[Schema, Any], bool]

_PROMPT = "Here is a JSON schema:\n{schema}\nHere is a JSON text that fits it:\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrammarFigures:
    """One side's time, tokens and speed over all rounds."""

    seconds: float
    output_tokens: int
    output_tokens_per_second: float
    seconds_per_step: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrammarResult(Result):
    """What became of the schemas and their answers, and what both sides took.

    Attributes:
        finished, parsed, valid: answers that came to their end; of these, those that are JSON,
            and that fit their schema.
        cut: answers that `max_tokens` ended.
        refused: schemas that no grammar was made of.
        compile_ms_mean, compile_ms_p99: milliseconds per compilation.
        invalid: `schema` and `text` of every finished answer that does not fit.
    """

    num_schemas: int
    finished: int
    parsed: int
    valid: int
    cut: int
    refused: int
    compile_ms_mean: float
    compile_ms_p99: float
    with_grammars: GrammarFigures
    without: GrammarFigures
    invalid: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether a finished answer does not fit its schema."""
        return self.valid < self.finished

    def __str__(self) -> str:
        share = 100 * self.valid / self.finished if self.finished else 0.0
        sides = {"with grammars": self.with_grammars, "without": self.without}
        table = tabulate("", sides, {
            "tokens": lambda side: side.output_tokens,
            "seconds": lambda side: f"{side.seconds:.2f}",
            "tokens/s": lambda side: f"{side.output_tokens_per_second:.1f}",
            "ms/step": lambda side: f"{side.seconds_per_step * 1000:.2f}",
        })  # fmt: skip
        ratio = self.with_grammars.output_tokens_per_second / self.without.output_tokens_per_second
        return (
            f"{self.num_schemas} schemas, {self.refused} refused; {self.cut} answers cut by "
            f"max_tokens\nof {self.finished} finished answers {self.parsed} parse and "
            f"{self.valid} fit their schema: {share:.2f} %\n"
            f"compiling a schema: {self.compile_ms_mean:.2f} ms in the mean, "
            f"{self.compile_ms_p99:.2f} ms at p99\n\n"
            f"{table}\n"
            f"throughput with grammars: {100 * ratio:.1f} % of that without"
        )


class _Request(NamedTuple):
    schema: Schema
    prompt: list[int]
    params: SamplingParams
    rules: SamplingRules | None


@dataclasses.dataclass
class _Answer:
    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclasses.dataclass
class _Side:
    """The time and the tokens of all rounds of one side."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0

    def figures(self) -> GrammarFigures:
        return GrammarFigures(
            seconds=self.seconds,
            output_tokens=self.num_tokens,
            output_tokens_per_second=self.num_tokens / self.seconds,
            seconds_per_step=self.seconds / self.num_steps,
        )


def schema_judge() -> Judge:
    """Whether an instance fits a schema, by the `jsonschema` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ConfigError(
            "judging answers takes the jsonschema package: pip install jsonschema"
        ) from error

    def fits(schema: Schema, instance: Any) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid(instance)

    return fits


def measure_grammars(
    engine: "Engine", spec: GrammarSpec, judge: Judge, *, progress: bool = True
) -> GrammarResult:
    """Answer under random schemas, then as many tokens without grammars.

    Grammars are compiled before the clock starts, since a server compiles them on other threads.

    Args:
        engine: takes all requests of a round at once; without a prefix cache, or the side that
            runs second finds its prompts computed.
        spec: what to run.
        judge: whether an instance fits a schema.
        progress: show a bar.
    """
    source = SchemaSource(spec.seed, spec.max_depth)
    schemas = [source.draw() for _ in range(spec.num_schemas)]
    counts: dict[str, int] = dict.fromkeys(("finished", "parsed", "valid", "cut", "refused"), 0)
    sides = {"with_grammars": _Side(), "without": _Side()}
    compile_ms: list[float] = []
    invalid: list[dict[str, Any]] = []
    parts = np.array_split(np.arange(spec.num_schemas), spec.rounds)
    with tqdm(total=spec.num_schemas, desc="schemas", disable=not progress) as bar:
        for part in parts:
            asked = []
            for i in part.tolist():
                begun = time.perf_counter()
                try:
                    asked.append(_ask(engine, schemas[i], spec, i))
                except InvalidRequest:
                    counts["refused"] += 1
                else:
                    compile_ms.append((time.perf_counter() - begun) * 1000)
            answers = _serve(engine, asked, sides["with_grammars"])
            for request, answer in zip(asked, answers, strict=True):
                if not _count(request.schema, answer, judge, counts):
                    invalid.append({"schema": request.schema, "text": answer.text})
            free = [_freed(*pair) for pair in zip(asked, answers, strict=True)]
            _serve(engine, free, sides["without"])
            bar.update(len(part))
    return GrammarResult(
        num_schemas=spec.num_schemas,
        **counts,
        compile_ms_mean=float(np.mean(compile_ms)),
        compile_ms_p99=float(np.percentile(compile_ms, 99)),
        with_grammars=sides["with_grammars"].figures(),
        without=sides["without"].figures(),
        invalid=invalid,
    )


def _ask(engine: "Engine", schema: Schema, spec: GrammarSpec, index: int) -> _Request:
    """A request for JSON of a schema, its grammar compiled."""
    text = json.dumps(schema)
    params = SamplingParams(
        temperature=spec.temperature,
        seed=spec.seed + index,
        max_tokens=spec.max_tokens,
        grammar=Grammar("json_schema", text),
    )
    rules = engine.rule_maker.make(params)
    return _Request(schema, engine.tokenizer.encode(_PROMPT.format(schema=text)), params, rules)


def _freed(request: _Request, answer: _Answer) -> _Request:
    """The request without its grammar: as many tokens as it got with one."""
    params = dataclasses.replace(
        request.params, grammar=None, ignore_eos=True, max_tokens=max(answer.num_tokens, 1)
    )
    return request._replace(params=params, rules=None)


def _serve(engine: "Engine", requests: Sequence[_Request], side: _Side) -> list[_Answer]:
    """Run requests to their end, all at once, on a side's clock."""
    answers = [_Answer() for _ in requests]
    begun, steps = time.perf_counter(), engine.load().num_steps
    for i, (_, prompt, params, rules) in enumerate(requests):
        engine.add(str(i), prompt, params, now=time.monotonic(), rules=rules)
    while engine.has_work:
        for delta in engine.step(time.monotonic()):
            answer = answers[int(delta.request_id)]
            answer.text += delta.text
            answer.num_tokens += len(delta.token_ids)
            answer.finish_reason = delta.finish_reason
    side.seconds += time.perf_counter() - begun
    side.num_steps += engine.load().num_steps - steps
    side.num_tokens += sum(answer.num_tokens for answer in answers)
    return answers


def _count(schema: Schema, answer: _Answer, judge: Judge, counts: dict[str, int]) -> bool:
    """Count an answer; False if it is finished and does not fit its schema."""
    if answer.finish_reason is FinishReason.LENGTH:
        counts["cut"] += 1
        return True
    counts["finished"] += 1
    try:
        instance = json.loads(answer.text)
    except ValueError:
        return False
    counts["parsed"] += 1
    is_valid = judge(schema, instance)
    counts["valid"] += is_valid
    return is_valid
