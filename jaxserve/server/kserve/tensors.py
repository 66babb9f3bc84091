"""Tensors of the Open Inference Protocol: text, flags and counts, in both representations."""

import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.kserve import open_inference_pb2 as pb

Input = pb.ModelInferRequest.InferInputTensor

# Datatypes that are used here -> the field of InferTensorContents that holds their elements.
_CONTENTS = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "UINT32": "uint_contents"}

_RAW_SIZE = "binary_data_size"


class Tensor(NamedTuple):
    """A tensor's name, datatype, shape and flat elements (bytes, bool or int)."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def read_inputs(request: pb.ModelInferRequest, datatypes: dict[str, str]) -> dict[str, Tensor]:
    """A request's input tensors by name.

    Args:
        request: with contents in the tensors, or raw ones beside them.
        datatypes: of the inputs that there are, by name.

    Raises:
        InvalidRequest: an input is not among them, comes twice, has another datatype, parameters,
            or contents that do not fit its shape.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs",
            param="raw_input_contents",
        )
    tensors: dict[str, Tensor] = {}
    for i, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in datatypes:
            raise InvalidRequest(f"there is no input {name!r}", param=name)
        if name in tensors:
            raise InvalidRequest(f"input {name} comes twice", param=name)
        if tensor.datatype != datatypes[name]:
            raise InvalidRequest(
                f"input {name} must be {datatypes[name]}, not {tensor.datatype!r}", param=name
            )
        _check_parameters(tensor, raw[i] if raw else None)
        values = _from_raw(tensor, raw[i]) if raw else _from_contents(tensor)
        tensors[name] = Tensor(name, tensor.datatype, tuple(tensor.shape), values)
    return tensors


def refuse_parameters(of: str, names: Iterable[str]) -> None:
    """Refuse parameters of something that has none.

    Raises:
        InvalidRequest: there are some.
    """
    for name in names:
        raise InvalidRequest(f"parameter {name!r} of {of} cannot be applied", param=name)


def _check_parameters(tensor: Input, raw: bytes | None) -> None:
    """Of parameters only KServe's count of raw bytes makes sense, and must be right."""
    others = [name for name in tensor.parameters if name != _RAW_SIZE]
    refuse_parameters(f"input {tensor.name}", others)
    if _RAW_SIZE not in tensor.parameters:
        return
    size = tensor.parameters[_RAW_SIZE].int64_param
    if raw is None or size != len(raw):
        raise InvalidRequest(
            f"input {tensor.name} has not the {size} raw bytes that its {_RAW_SIZE} says",
            param=_RAW_SIZE,
        )


def _from_contents(tensor: Input) -> Sequence[Any]:
    field = _CONTENTS[tensor.datatype]
    others = [f.name for f, _ in tensor.contents.ListFields() if f.name != field]
    if others:
        raise InvalidRequest(
            f"input {tensor.name} is {tensor.datatype}: its contents are not {others[0]}",
            param=tensor.name,
        )
    values = getattr(tensor.contents, field)
    _check_count(tensor, len(values))
    return values


def _from_raw(tensor: Input, raw: bytes) -> Sequence[Any]:
    if tensor.HasField("contents"):
        raise InvalidRequest(
            f"input {tensor.name} has contents beside raw_input_contents", param=tensor.name
        )
    values = _split_raw_bytes(tensor, raw) if tensor.datatype == "BYTES" else [b != 0 for b in raw]
    _check_count(tensor, len(values))
    return values


def _split_raw_bytes(tensor: Input, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    place = 0
    while place < len(raw):
        start = place + 4
        end = start + int.from_bytes(raw[place:start], "little")
        if end > len(raw) or start > len(raw):
            raise InvalidRequest(
                f"the raw contents of input {tensor.name} end within an element", param=tensor.name
            )
        elements.append(raw[start:end])
        place = end
    return elements


def _check_count(tensor: Input, count: int) -> None:
    shape = list(tensor.shape)
    if not shape or min(shape) < 1 or len(shape) > 8:
        raise InvalidRequest(f"input {tensor.name} has the shape {shape[:8]}", param=tensor.name)
    if math.prod(shape) != count:
        raise InvalidRequest(
            f"input {tensor.name} has the shape {shape}, but {count} elements", param=tensor.name
        )


def write_outputs(response: pb.ModelInferResponse, tensors: Sequence[Tensor], *, raw: bool) -> None:
    """Add output tensors to a response.

    Args:
        response: without outputs so far.
        tensors: them.
        raw: as raw_output_contents, not in the tensors.
    """
    for tensor in tensors:
        output = response.outputs.add(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
        )
        if raw:
            response.raw_output_contents.append(_to_raw(tensor))
        else:
            getattr(output.contents, _CONTENTS[tensor.datatype]).extend(tensor.values)


def _to_raw(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in tensor.values)
    return struct.pack(f"<{len(tensor.values)}I", *tensor.values)
