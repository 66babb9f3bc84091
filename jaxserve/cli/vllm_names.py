"""vLLM's command-line names: taken where one means the same here, else refused with what to use."""

import difflib
from collections.abc import Collection, Iterator, Sequence

import click

# vLLM's flag -> ours, with the same values.
_SAME = {
    "--block-size": "--page-size",
    "--num-gpu-blocks-override": "--num-pages",
    "--enable-prefix-caching": "--prefix-cache",
    "--no-enable-prefix-caching": "--no-prefix-cache",
    "--enable-chunked-prefill": "--no-prefill-first",
    "--scheduling-policy": "--policy",
    "--async-scheduling": "--overlap",
    "--no-async-scheduling": "--no-overlap",
    "--ssl-keyfile": "--tls-key",
    "--ssl-certfile": "--tls-cert",
}
# Axes of --mesh.
_AXES = {
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip
# What cannot be said in the same words, and how to say it.
_INSTEAD = {
    "--gpu-memory-utilization": "the KV cache takes 90 % of what the weights leave free; "
    "--kv-cache-memory GIB or --num-pages N sets its size",
    "--kv-cache-memory-bytes": "use --kv-cache-memory, in GiB",
    "--enforce-eager": "every step is a program that is compiled before READY; there is no other "
    "mode. To compile fewer, use --token-buckets and --row-buckets",
    "--compilation-config": "use --token-buckets and --row-buckets",
    "--cudagraph-capture-sizes": "use --token-buckets and --row-buckets",
    "--cuda-graph-sizes": "use --token-buckets and --row-buckets",
    "--max-seq-len-to-capture": "every length is compiled; see --max-model-len",
    "--swap-space": "use --host-cache-memory GIB, which preempted requests and shared prefixes use",
    "--kv-offloading-size": "use --host-cache-memory GIB",
    "--cpu-offload-gb": "weights stay on the device; split them with --mesh tensor=N",
    "--no-enable-chunked-prefill": "use --prefill-first, where decoding waits for prompts",
    "--pipeline-parallel-size": "split a model with --mesh tensor=N",
    "-pp": "split a model with --mesh tensor=N",
    "--quantization": "quantised checkpoints load as GGUF, which says by itself how",
    "-q": "quantised checkpoints load as GGUF, which says by itself how",
    "--load-format": "the format is told by the files; --random-weights stands for dummy",
    "--trust-remote-code": "a checkpoint's own code is never run; leave the option out",
    "--revision": "give the directory of a snapshot",
    "--override-generation-config": "use --generation-config with a file's path",
    "--api-key": "use --api-keys FILE, which names tenants and their keys",
    "--ssl-ca-certs": "use --tls-client-ca, which asks clients for certificates",
    "--allowed-origins": "use --cors-origins, with commas between",
    "--enable-auto-tool-choice": "tools are always offered; leave the option out",
    "--attention-backend": "use --attention-implementation",
    "--runner": "one server generates and embeds; leave the option out",
    "--task": "one server generates and embeds; leave the option out",
    "--disable-log-requests": "requests are logged only with --log-requests; leave the option out",
    "--speculative-config": "speculative decoding is not supported",
    "--enable-lora": "adapters are not supported; merge them into the checkpoint",
    "--lora-modules": "adapters are not supported; merge them into the checkpoint",
}
_COMMON_WORDS = {"size", "max", "num", "len", "dir", "no", "enable", "disable", "file", "model"}


def translated(arguments: Sequence[str], command: click.Command, ctx: click.Context) -> list[str]:
    """A command's arguments with vLLM's names replaced by ours.

    Args:
        arguments: as they were typed.
        command: which options it has decides what is replaced.
        ctx: for messages.

    Raises:
        UsageError: an option of vLLM's has no equivalent; the message says what to use.
    """
    flags, takes_value = _options_of(command, ctx)
    result: list[str] = []
    axes: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            result += ["--", *rest]
            break
        name, equals, value = argument.partition("=")
        if name in flags or not argument.startswith("-"):
            result.append(argument)
            if name in takes_value and not equals:
                result += _next(rest)  # whatever it looks like
            continue
        name = name.replace("_", "-")
        if name in _AXES and "--mesh" in flags:
            axis, size = _AXES[name], value if equals else "".join(_next(rest))
            if axes.setdefault(axis, size) != size:
                raise click.UsageError(f"{name} is given twice", ctx)
        elif name == "--model" and "model" in (p.name for p in command.params):
            result += [value] if equals else _next(rest)
        elif name in _INSTEAD and _is_engines(flags):
            raise click.UsageError(f"{name} is an option of vLLM's: {_INSTEAD[name]}", ctx)
        else:
            ours = name if name in flags else _SAME.get(name, "")
            result.append(f"{ours}{equals}{value}" if ours in flags else argument)
            if ours in takes_value and not equals:
                result += _next(rest)
    if axes:
        if any(argument.partition("=")[0] == "--mesh" for argument in result):
            raise click.UsageError("--mesh says already how the model is split", ctx)
        result = ["--mesh", ",".join(f"{axis}={size}" for axis, size in axes.items()), *result]
    return result


def likely_meant(unknown: str, command: click.Command, ctx: click.Context) -> list[str]:
    """The options that an unknown one may stand for: spelled nearly so, or with a telling word.

    Args:
        unknown: what was typed.
        command: whose options it may be.
        ctx: the command's.
    """
    flags = sorted(flag for flag in _options_of(command, ctx)[0] if flag.startswith("--"))
    words = _words(unknown)
    sharing = [flag for flag in flags if words & _words(flag)]
    sharing.sort(key=lambda flag: -len(words & _words(flag)))
    alike = difflib.get_close_matches(unknown, flags, cutoff=0.8)
    return list(dict.fromkeys([*alike, *sharing]))[:3]


def _words(flag: str) -> set[str]:
    return set(flag.strip("-").replace("_", "-").split("-")) - _COMMON_WORDS


def _options_of(command: click.Command, ctx: click.Context) -> tuple[set[str], set[str]]:
    """All flags of a command, and those that take a value."""
    flags: set[str] = set()
    takes_value: set[str] = set()
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option):
            names = {*parameter.opts, *parameter.secondary_opts}
            flags |= names
            if not parameter.is_flag and not parameter.count:
                takes_value |= names
    return flags, takes_value


def _is_engines(flags: Collection[str]) -> bool:
    """Whether a command has an engine's options, of which some are vLLM's by another name."""
    return "--page-size" in flags


def _next(rest: Iterator[str]) -> list[str]:
    return [argument for argument in (next(rest, None),) if argument is not None]
