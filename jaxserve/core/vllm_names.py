"""vLLM's names for options: taken where one means the same here, else refused with what to use."""

from collections.abc import Collection, Mapping
from typing import Any

from jaxserve.core.errors import ConfigError

# vLLM's flag -> ours, with the same values.
SAME = {
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
AXES = {
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip
# What cannot be said in the same words, and how to say it.
INSTEAD = {
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
    "-q": "use --quantization; a quantised checkpoint says by itself how",
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


def engine_options(options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Keyword arguments with vLLM's names replaced by ours.

    Args:
        options: as a caller gave them; `tensor_parallel_size` is `--tensor-parallel-size`.
        known: names of our own options.

    Raises:
        ConfigError: an option is neither ours nor has an equivalent; the message says what to use.
    """
    result: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        ours = SAME.get(flag, "")[2:].replace("-", "_")
        if name in known:
            result[name] = value
        elif flag in AXES:
            axes[AXES[flag]] = value
        elif ours in known:
            result[ours] = value
        elif ours.removeprefix("no_") in known:
            result[ours.removeprefix("no_")] = not value
        elif flag in INSTEAD:
            if value not in (None, False):  # off: nothing is asked for
                raise ConfigError(f"{name} is an option of vLLM's: {INSTEAD[flag]}")
        else:
            raise ConfigError(f"there is no option {name!r}; the options are those of EngineConfig")
    if axes:
        if "mesh" in result:
            raise ConfigError("mesh says already how the model is split")
        result["mesh"] = ",".join(f"{axis}={size}" for axis, size in axes.items())
    return result
