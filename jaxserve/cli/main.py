"""The `jaxserve` command. Sub-commands are imported when run, so that `--help` is instant."""

import difflib
import importlib
import logging
import sys

import click

COMMANDS = {
    "serve": "Serve a model over gRPC and HTTP.",
    "generate": "Generate text offline, or chat in the terminal.",
    "bench": "Measure throughput, latency, serving and start-up.",
    "convert": "Convert a checkpoint to Orbax.",
    "pull": "Download a model.",
}
STAGES = "jaxserve.engine.stages"  # the logger


class LazyGroup(click.Group):
    """A group whose sub-command NAME is the object NAME of the module `jaxserve.cli.NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all sub-commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a sub-command, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"jaxserve.cli.{cmd_name}"), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a sub-command; one that does not exist may be a slip of the keyboard."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            alike = difflib.get_close_matches(args[0].lower(), COMMANDS)
            if not alike:
                raise
            hint = f"{error.message} Did you mean {' or '.join(alike)}?"
            raise click.UsageError(hint, ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of sub-commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxserve", prog_name="jaxserve")
@click.option("-v", "--verbose", count=True, help="Log more: -v progress, -vv every detail.")
def main(verbose: int) -> None:
    """A large-language-model server on XLA: one code path for CPU, GPU and TPU."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("jaxserve").setLevel(level)
    if not verbose and not sys.stderr.isatty():  # where no bar shows how far a start is
        logging.getLogger(STAGES).setLevel(logging.INFO)
