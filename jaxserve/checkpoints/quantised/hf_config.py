"""Reads `quantization_config` of a Hugging Face config.json: which weight is stored how."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxserve.checkpoints.quantised.awq import Awq
from jaxserve.checkpoints.quantised.blocks import CHANNEL, TENSOR, Blocks
from jaxserve.checkpoints.quantised.compressed_tensors_config import compressed_rules
from jaxserve.checkpoints.quantised.fp8 import Fp8
from jaxserve.checkpoints.quantised.gptq import Gptq
from jaxserve.checkpoints.quantised.rules import (
    Rule,
    is_linear,
    matching,
    named,
    read_names,
)
from jaxserve.checkpoints.quantised.scheme import Scheme
from jaxserve.core.errors import ConfigError
from jaxserve.models.config_keys import KnownKeys, check_keys
from jaxserve.models.config_values import ConfigValues, shortened

WHERE = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: its `quant_method`.
        rules: the first that matches a module decides.
    """

    method: str
    rules: tuple[Rule, ...]

    def scheme(self, module: str, stored: Collection[str], kind: str = "Linear") -> Scheme | None:
        """How one module's weight is stored.

        Args:
            module: its name in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
            stored: suffixes of its tensors in the files. They have the last word: many
                configurations do not list the modules that were left as they were.
            kind: transformers' class of module: "Linear", or "Embedding".

        Returns:
            None: as one tensor `weight`, not quantised.
        """
        for rule in self.rules:
            if rule.matches(module, kind):
                scheme = rule.scheme
                return scheme if scheme is not None and scheme.mark in stored else None
        return None


def read_quantisation(values: Mapping[str, Any], *, allow_unknown: bool = False) -> Quantisation:
    """Read a `quantization_config`.

    Args:
        values: the mapping under that key.
        allow_unknown: go on with keys that are not known.

    Raises:
        ConfigError: a method, or a key's value, is not supported, or a key is not known.
    """
    method = str(values.get("quant_method", "")).lower()
    reader = _READERS.get(method)
    if reader is None:
        raise ConfigError(
            f"{WHERE}: quant_method = {shortened(values.get('quant_method'))} is not supported; "
            f"supported: {', '.join(_READERS)}"
        )
    return Quantisation(method, tuple(reader(values, WHERE, allow_unknown)))


# ---------------------------------------------------------------- AWQ

_AWQ = KnownKeys(
    read=frozenset({
        "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version",
        "format", "checkpoint_format", "modules_to_not_convert", "backend",
    }),
    harmless=frozenset({
        "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "lm_head", "meta",
        "sym", "ignore",
    }),
    fixed={"pack_dtype": ("int32",), "desc_act": (False,), "dynamic": ({},)},
)  # fmt: skip


def _awq(values: Mapping[str, Any], where: str, allow_unknown: bool) -> Iterator[Rule]:
    check_keys(values, _AWQ, where, allow_unknown=allow_unknown)
    taken = ConfigValues(values, where)
    _one_of(taken, ("version", "format", "checkpoint_format"), ("gemm",))
    _one_of(taken, ("backend",), ("autoawq", "auto"))
    bits = taken.integer("w_bit" if "w_bit" in values else "bits", 4)
    if bits != 4 or not taken.flag("zero_point", True):
        raise ConfigError(
            f"{where}: AWQ with bits = {bits}, zero_point = {values.get('zero_point')} is not "
            "supported, only 4 bits with zero points"
        )
    group = _group(taken, "q_group_size" if "q_group_size" in values else "group_size")
    yield Rule(named(read_names(taken, "modules_to_not_convert")), None)
    yield Rule(is_linear, Awq(group=group))


# ---------------------------------------------------------------- GPTQ

_GPTQ = KnownKeys(
    read=frozenset({
        "quant_method", "bits", "group_size", "sym", "checkpoint_format", "format", "dynamic",
    }),
    # What the files show (the order of inputs is in `g_idx`, and modules without a `qweight` are
    # not quantised), what made them, and what runs them elsewhere.
    harmless=frozenset({
        "desc_act", "lm_head", "modules_in_block_to_quantize", "static_groups", "meta",
        "act_group_aware", "damp_percent", "damp_auto_increment", "true_sequential", "mse",
        "dataset", "tokenizer",
        "model_name_or_path", "model_file_base_name", "model_seqlen", "batch_size",
        "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id",
        "max_input_length", "cache_block_outputs", "cache_examples_on_gpu", "use_cuda_fp16",
        "use_exllama", "disable_exllama", "exllama_config", "backend", "quantizer",
        "parallel_packing", "hyb_act", "offload_to_disk", "offload_to_disk_path",
        "awq_gemm_checkpoint", "autoround_version", "quant_path",
    }),
    fixed={"pack_dtype": ("int32",), "is_marlin_format": (False,), "rotation": (),
           "adapter": ({},)},
)  # fmt: skip
_GPTQ_DYNAMIC = KnownKeys(
    read=frozenset({"bits", "group_size", "sym"}), harmless=frozenset({"desc_act"})
)


def _gptq(values: Mapping[str, Any], where: str, allow_unknown: bool) -> Iterator[Rule]:
    check_keys(values, _GPTQ, where, allow_unknown=allow_unknown)
    taken = ConfigValues(values, where)
    version = _one_of(taken, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    dynamic = taken.mapping("dynamic")
    for pattern in dynamic.values:
        changes, scheme = dynamic.mapping(pattern), None
        if not pattern.startswith("-:"):
            check_keys(changes.values, _GPTQ_DYNAMIC, changes.where, allow_unknown=allow_unknown)
            both = ConfigValues({**values, **changes.values}, changes.where)
            scheme = _gptq_scheme(both, version)
        expression = pattern.removeprefix("+:").removeprefix("-:")
        yield Rule(matching(expression, dynamic.where), scheme)
    yield Rule(is_linear, _gptq_scheme(taken, version))


def _gptq_scheme(taken: ConfigValues, version: str) -> Gptq:
    bits = taken.integer("bits")
    if bits not in (2, 4, 8):
        raise ConfigError(f"{taken.where}: bits = {bits} is not supported, only 2, 4 and 8")
    return Gptq(
        bits=bits,
        group=_group(taken, "group_size"),
        symmetric=taken.flag("sym", True),
        version=2 if version == "gptq_v2" else 1,
    )


# ---------------------------------------------------------------- FP8

_FP8 = KnownKeys(
    read=frozenset({
        "quant_method", "activation_scheme", "weight_block_size", "ignored_layers",
        "modules_to_not_convert",
    }),
    # `scale_fmt` says that scales are powers of two; they are stored as numbers all the same.
    harmless=frozenset({"scale_fmt", "kv_cache_scheme", "kv_cache_quant_method"}),
    fixed={"fmt": ("e4m3",), "dequantize": (False,), "weight_per_tensor": (True,),
           "act_per_tensor": (True, False)},
)  # fmt: skip


def _fp8(values: Mapping[str, Any], where: str, allow_unknown: bool) -> Iterator[Rule]:
    check_keys(values, _FP8, where, allow_unknown=allow_unknown)
    taken = ConfigValues(values, where)
    _one_of(taken, ("activation_scheme",), ("dynamic", "static"))
    ignored = (
        *read_names(taken, "ignored_layers"),
        *read_names(taken, "modules_to_not_convert"),
    )
    yield Rule(named(ignored), None)
    size = taken.sequence("weight_block_size")
    if not size:
        yield Rule(is_linear, Fp8(blocks=TENSOR, activations="fp8"))
        return
    if len(size) != 2 or not all(type(step) is int and step > 0 for step in size):
        raise ConfigError(
            f"{where}: weight_block_size = {shortened(size)} is not two positive numbers"
        )
    blocks = Blocks(*size)
    yield Rule(is_linear, Fp8(blocks=blocks, scale="weight_scale_inv", activations="fp8"))


_FBGEMM = KnownKeys(
    read=frozenset({"quant_method", "modules_to_not_convert"}),
    harmless=frozenset({"activation_scale_ub"}),  # of activations, which are not rounded
)


def _fbgemm(values: Mapping[str, Any], where: str, allow_unknown: bool) -> Iterator[Rule]:
    check_keys(values, _FBGEMM, where, allow_unknown=allow_unknown)
    yield Rule(named(read_names(ConfigValues(values, where), "modules_to_not_convert")), None)
    yield Rule(is_linear, Fp8(blocks=CHANNEL, activations="fp8"))


_READERS: Mapping[str, Callable[[Mapping[str, Any], str, bool], Iterator[Rule]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": compressed_rules,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
}


def _group(taken: ConfigValues, name: str) -> int | None:
    """Inputs that share a scale; None, which is written as -1, for all."""
    size = taken.integer(name, 128, least=-1)
    if size == 0:
        raise ConfigError(f"{taken.where}: {name} = 0 is not supported")
    return None if size == -1 else size


def _one_of(taken: ConfigValues, names: tuple[str, ...], known: tuple[str, ...]) -> str:
    """The one value that all of these keys have which are there, the first known one if none.

    Raises:
        ConfigError: another value.
    """
    found = known[0]
    for name in names:
        value = taken.get(name)
        if value is None:
            continue
        found = str(value).lower()
        if found not in known:
            raise ConfigError(
                f"{taken.where}: {name} = {shortened(value)} is not supported, only "
                f"{', '.join(known)}"
            )
    return found
