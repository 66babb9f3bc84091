"""Reads what compressed-tensors says in a configuration: groups of modules, and their schemes."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.checkpoints.quantised.blocks import CHANNEL, TENSOR, Blocks
from jaxserve.checkpoints.quantised.compressed_tensors import Compressed
from jaxserve.checkpoints.quantised.fp8 import Fp8
from jaxserve.checkpoints.quantised.rules import Matcher, Rule, matching, read_names
from jaxserve.checkpoints.quantised.scheme import Activations, Scheme
from jaxserve.core.errors import ConfigError
from jaxserve.models.config_keys import KnownKeys, check_keys
from jaxserve.models.config_values import ConfigValues, shortened

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_INTEGERS = (_PACKED, "int-quantized", "naive-quantized")
_FLOATS = ("float-quantized", "naive-quantized")
_FORMATS = tuple(sorted({*_INTEGERS, *_FLOATS}))
_CONFIG = KnownKeys(
    read=frozenset({"quant_method", "format", "config_groups", "ignore", "sparsity_config"}),
    # The KV cache is quantised as the server is told to, or not at all, which is more exact.
    harmless=frozenset({"kv_cache_scheme", "global_compression_ratio", "version"}),
    fixed={
        "quantization_status": ("compressed", "frozen"),
        "transform_config": ({}, {"config_groups": {}}),
        "moe_sparsity_config": ({},),
    },
)
_GROUP = KnownKeys(
    read=frozenset({"targets", "weights", "input_activations", "format"}),
    fixed={"output_activations": ({},)},
)
_WEIGHTS = KnownKeys(
    read=frozenset({
        "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure",
    }),
    # `actorder` shows in the files: where it matters there is a `weight_g_idx`.
    harmless=frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder"}),
    fixed={"dynamic": (False,)},
)  # fmt: skip


def compressed_rules(values: Mapping[str, Any], where: str, allow_unknown: bool) -> Iterator[Rule]:
    """The rules of a configuration; a name decides before an expression, and that before a class.

    Raises:
        ConfigError: it has keys or values that are not supported.
    """
    check_keys(values, _CONFIG, where, allow_unknown=allow_unknown)
    taken = ConfigValues(values, where)
    format = taken.text("format", "")
    if format not in (*_FORMATS, _MIXED):
        raise _not_supported(where, "format", format, (*_FORMATS, _MIXED))
    sparsity = taken.mapping("sparsity_config")
    if (found := sparsity.text("format", "dense")) != "dense":
        raise _not_supported(sparsity.where, "format", found, ("dense",))
    for name in read_names(taken, "ignore"):
        yield Rule(_target(name, where), None)
    groups = taken.mapping("config_groups")
    ranked: list[tuple[int, Rule]] = []
    for name in groups.values:
        group = groups.mapping(name)
        check_keys(group.values, _GROUP, group.where, allow_unknown=allow_unknown)
        scheme = _scheme(group, format, allow_unknown)
        for target in read_names(group, "targets"):
            ranked.append((_rank(target), Rule(_target(target, group.where), scheme)))
    if not ranked:
        raise ConfigError(f"{where}: config_groups has no targets")
    yield from (rule for _, rule in sorted(ranked, key=lambda pair: pair[0]))


def _rank(target: str) -> int:
    """Names first, then expressions, then classes, which have neither dots nor lower cases."""
    return 1 if target.startswith("re:") else 2 if target[:1].isupper() else 0


def _target(target: str, where: str) -> Matcher:
    """Matches a module's class or name, or, after `re:`, the beginning of its name."""
    if target.startswith("re:"):
        return matching(target.removeprefix("re:"), where)
    return lambda module, kind: target in (module, kind)


def _scheme(group: ConfigValues, format: str, allow_unknown: bool) -> Scheme | None:
    format = group.text("format", format)
    if format not in _FORMATS:
        raise _not_supported(group.where, "format", format, _FORMATS)
    weights = group.mapping("weights")
    if not weights.values:
        return None
    check_keys(weights.values, _WEIGHTS, weights.where, allow_unknown=allow_unknown)
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    symmetric, blocks = weights.flag("symmetric", True), _blocks(weights)
    activations = _activations(group.mapping("input_activations"))
    if kind == "float" and bits == 8 and symmetric and format in _FLOATS:
        return Fp8(blocks=blocks, activations=activations)
    if kind != "int" or bits not in (2, 4, 8) or format not in _INTEGERS:
        raise ConfigError(
            f"{weights.where}: type = {kind}, num_bits = {bits}, symmetric = {symmetric} is not "
            f"supported in the format {format}"
        )
    return Compressed(
        bits=bits,
        blocks=blocks,
        symmetric=symmetric,
        packed=format == _PACKED,
        activations=activations,
    )


def _blocks(weights: ConfigValues) -> Blocks:
    """What shares a scale."""
    group = weights.integer("group_size", None, least=-1)
    strategy = weights.text("strategy", "")
    if not strategy:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    match strategy:
        case "tensor":
            return TENSOR
        case "channel":
            return CHANNEL
        case "group" if group is not None and group > 0:
            return Blocks(1, group)
        case "block":
            sizes = weights.sequence("block_structure")
            if len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
                return Blocks(*sizes)
    raise ConfigError(
        f"{weights.where}: strategy = {strategy} with group_size = {group}, "
        f"block_structure = {shortened(weights.get('block_structure'))} is not supported"
    )


def _activations(taken: ConfigValues) -> Activations | None:
    if not taken.values:
        return None
    kind, bits = taken.text("type", "int"), taken.integer("num_bits", 8)
    if bits != 8 or kind not in ("int", "float"):
        raise ConfigError(f"{taken.where}: type = {kind}, num_bits = {bits} is not supported")
    return "int8" if kind == "int" else "fp8"


def _not_supported(where: str, key: str, value: Any, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        f"{where}: {key} = {shortened(value)} is not supported; supported: {', '.join(known)}"
    )
