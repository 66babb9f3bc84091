"""`jaxserve bench predictor`: how well the lengths of real answers are predicted."""

from pathlib import Path

import click

from jaxserve.cli.bench_options import disable_tqdm_option, number, output_json_option, write_json
from jaxserve.cli.bench_prefix_cache import quiet_engines
from jaxserve.cli.bench_prompts import tokenize_prompts
from jaxserve.cli.options import Command, engine_options
from jaxserve.core.config import EngineConfig

PREDICTORS = "exact,range,rank"


@click.command(cls=Command)
@click.option("--predictors", default=PREDICTORS, show_default=True, help="With commas between.")
@number("--num-prompts", 400, "Different chat prompts that are answered.")
@number("--max-output-len", 256, "Longest answer, in tokens.")
@number("--train-share", 0.7, "Share of the answers that is learned from.", float)
@output_json_option
@disable_tqdm_option
@engine_options(
    include=("model", "tokenizer", "random_weights", "dtype", "seed", "compilation_cache_dir",
             "page_size", "max_num_seqs", "max_num_batched_tokens", "overlap"),
    defaults={"max_num_seqs": 16, "max_num_batched_tokens": 128},
)  # fmt: skip
def predictor(
    config: EngineConfig,
    predictors: str,
    num_prompts: int,
    max_output_len: int,
    train_share: float,
    output_json: Path | None,
    disable_tqdm: bool,
) -> None:
    """Kendall's tau, bucket accuracy and error of each predictor, on answers kept out.

    MODEL answers varied chat prompts once; every predictor then learns from the first answers,
    in order, and predicts the others, beside always predicting the mean.
    """
    from jaxserve.bench.predictor import PredictorSpec, measure_predictors
    from jaxserve.bench.prompts import make_prompts

    spec = PredictorSpec(
        predictors=tuple(predictors.split(",")),
        max_output_len=max_output_len,
        train_share=train_share,
        seed=config.seed,
    )
    prompts = tokenize_prompts(config, make_prompts(num_prompts, seed=config.seed))
    report = measure_predictors(
        config, spec, prompts, build=quiet_engines(), progress=not disable_tqdm
    )
    click.echo(str(report))
    write_json(output_json, report.to_dict())
