"""`jaxserve convert`: rewrite any checkpoint as an Orbax directory."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxserve.cli.options import Command
from jaxserve.core.errors import CheckpointError

if TYPE_CHECKING:
    from jaxserve.checkpoints.base import Checkpoint


EXAMPLES = """\b
Examples:
  jaxserve convert smollm2-135m ./smollm2-orbax
  jaxserve convert ./Llama-3.1-8B-Instruct ./llama-orbax --dtype bfloat16
  jaxserve convert ./Llama-3.1-8B-Instruct ./llama-int8 --quantization int8
"""  # \b keeps click from wrapping these lines


@click.command(name="convert", cls=Command, epilog=EXAMPLES)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["source", "float32", "bfloat16"]),
    default="source",
    show_default=True,
    help="Type to store matrices in that are not quantised; source keeps theirs. Norm scales are "
    "never narrowed.",
)
@click.option(
    "--quantization",
    type=click.Choice(["source", "none", "int8", "int4", "fp8"]),
    default="source",
    show_default=True,
    help="How to store weights: as SRC has them, as numbers of --dtype, or in the formats that "
    "serve's --quantization names.",
)
@click.option("--allow-unknown-config", is_flag=True,
              help="Go on with keys of its configuration that jaxserve does not know.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace DST if it is a converted checkpoint.")
def convert(
    source: str,
    destination: Path,
    dtype: str,
    quantization: str,
    allow_unknown_config: bool,
    force: bool,
) -> None:
    """Convert the checkpoint SRC to an Orbax checkpoint directory DST.

    SRC is a Hugging Face directory (safetensors), a GGUF file, an Orbax checkpoint, or a name
    that `jaxserve pull` takes. DST will hold weights, configuration, tokenizer and chat
    template together; serving it restores every device's shard straight from disk.
    """
    convert_checkpoint(
        source,
        destination,
        dtype=dtype,
        quantization=quantization,
        force=force,
        allow_unknown=allow_unknown_config,
    )
    click.echo(destination)


def convert_checkpoint(
    source: str,
    destination: Path,
    *,
    dtype: str,
    quantization: str,
    force: bool,
    allow_unknown: bool,
) -> None:
    """Read `source` and write it to `destination` (see the command's help).

    Raises:
        CheckpointError: `source` cannot be read, or `destination` is in the way.
        ModelNotFound: there is no `source`.
        ConfigError: its architecture is not supported.
    """
    from jaxserve.checkpoints.base import MARKER
    from jaxserve.checkpoints.load import open_checkpoint
    from jaxserve.checkpoints.orbax import write_orbax
    from jaxserve.checkpoints.pull import resolve_model
    from jaxserve.tokenizers import load_tokenizer

    replace = destination.exists() and force
    if destination.exists() and not force:
        raise CheckpointError(f"{destination} exists already; --force replaces it")
    if replace and not (destination / MARKER).exists():
        raise CheckpointError(f"{destination} is not a converted checkpoint; not replacing it")
    checkpoint = open_checkpoint(resolve_model(source), allow_unknown=allow_unknown)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    written = destination.with_name(f".{destination.name}.new") if replace else destination
    if replace:
        shutil.rmtree(written, ignore_errors=True)  # left by a conversion that was killed
    params = _read_all(checkpoint, dtype, quantization)
    write_orbax(written, checkpoint.config, params, tokenizer.save, checkpoint.sampling_defaults)
    if replace:
        shutil.rmtree(destination)
        written.rename(destination)


def _read_all(
    checkpoint: "Checkpoint", dtype: str, quantization: str
) -> "Iterator[tuple[str, Any]]":
    """Every parameter as it is to be stored."""
    import ml_dtypes
    import numpy as np
    from tqdm import tqdm

    from jaxserve.checkpoints.load import held_as
    from jaxserve.checkpoints.storage import named, stored
    from jaxserve.models.weights import weight_shapes

    types = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

    def in_type(value: np.ndarray) -> np.ndarray:
        wanted = types.get(dtype, value.dtype)
        if value.ndim > 1 or wanted.itemsize > value.dtype.itemsize:
            return value.astype(wanted, copy=False)
        return value

    parameters = checkpoint.parameters
    storage = {}
    if quantization == "source":
        storage = stored(checkpoint, parameters)
    elif quantization != "none":
        storage = named(quantization, parameters)
    for name in tqdm(sorted(parameters), "reading", disable=None):
        if name in storage:
            shapes = weight_shapes(parameters[name], storage[name])
            yield name, held_as(shapes, parameters[name], checkpoint.read_parts(name), in_type)
        else:
            yield name, in_type(checkpoint.read(name))
