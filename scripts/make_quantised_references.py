"""Make a reference of quantised weights by the compressed-tensors package.

The test-suite compares what jaxserve reads with the file made here. It holds small weights as that
package compresses them, what it makes of them again, and the configuration it writes. In an
environment with `compressed-tensors`:

    python scripts/make_quantised_references.py --out tests/references/compressed-tensors.npz
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.utils import (  # pyright: ignore[reportMissingImports]
    calculate_qparams,
)

SHAPE = (24, 96)  # 96: two blocks of 64, the second cut off
PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
GROUP = {"strategy": "group", "group_size": 32}
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], dict[str, Any] | None]] = {
    "w4-group": (PACKED, torch.float16, {"num_bits": 4, **GROUP}, None),
    "w4-group-zeros": (PACKED, torch.bfloat16, {"num_bits": 4, "symmetric": False, **GROUP}, None),
    "w4-channel-zeros": (
        PACKED, torch.float16, {"num_bits": 4, "symmetric": False, "strategy": "channel"}, None,
    ),
    "w8-channel": (PACKED, torch.bfloat16, {"num_bits": 8, "strategy": "channel"}, None),
    "w8-group-zeros": (PACKED, torch.float16, {"num_bits": 8, "symmetric": False, **GROUP}, None),
    "w8a8": (
        INTEGER, torch.bfloat16, {"num_bits": 8, "strategy": "channel"},
        {"num_bits": 8, "strategy": "token", "dynamic": True},
    ),
    "w8a8-tensor-zeros": (
        INTEGER, torch.float32, {"num_bits": 8, "symmetric": False, "strategy": "tensor"},
        {"num_bits": 8, "strategy": "tensor"},
    ),
    "fp8-channel": (
        FLOAT, torch.bfloat16, {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "fp8-tensor": (
        FLOAT, torch.float32, {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "fp8-block": (
        FLOAT, torch.float32,
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    ),
}  # fmt: skip


def range_of(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest number of what shares a scale, in the scales' shape."""
    rows, columns = weight.shape
    down, across = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -columns % across, 0, -rows % down))
    blocks = padded.reshape(padded.shape[0] // down, down, padded.shape[1] // across, across)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (low.reshape(1), high.reshape(1)) if args.strategy == "tensor" else (low, high)


def stored(tensor: torch.Tensor) -> tuple[np.ndarray, str]:
    """An array that NumPy can save, and the name of its type."""
    name = str(tensor.dtype).removeprefix("torch.")
    as_bits = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8}.get(name)
    return (tensor if as_bits is None else tensor.view(as_bits)).numpy(), name


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    types: dict[str, str] = {}
    configs: dict[str, Any] = {}
    for case, (format, scale_type, weights, inputs) in CASES.items():
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=args,
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
            format=format,
        )
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            quant_method="compressed-tensors",
            format=format,
            quantization_status="compressed",
            ignore=["lm_head"],
        )
        configs[case] = config.model_dump(mode="json")
        weight = torch.randn(SHAPE) * torch.logspace(-3, 0, SHAPE[0])[:, None]
        scales, zeros = calculate_qparams(*range_of(weight, args), args)
        state = {"weight": weight, "weight_scale": scales.to(scale_type)}
        if not args.symmetric:
            state["weight_zero_point"] = zeros.to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(format)
        tensors = compressor.compress(state, scheme)
        exact = {**tensors, "weight_scale": tensors["weight_scale"].float()}
        expected = compressor.decompress(exact, scheme)["weight"]
        for suffix, tensor in {**tensors, "expected": expected}.items():
            name = f"{case}/{suffix}"
            arrays[name], types[name] = stored(tensor.contiguous())
    for name, texts in {"types": types, "configs": configs}.items():
        arrays[name] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez_compressed(arguments.out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
