"""Tensors in both representations, and those that do not hold together."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.core.errors import InvalidRequest
from jaxserve.server.kserve import open_inference_pb2 as pb
from jaxserve.server.kserve.tensors import Tensor, read_inputs, write_outputs

DATATYPES = {"text": "BYTES", "flag": "BOOL"}


def packed(elements: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(e)) + e for e in elements)


def tensor(name: str = "text", datatype: str = "BYTES", shape: Any = (1,), **fields: Any) -> Any:
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, **fields
    )


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=9), st.booleans())
def test_what_is_written_can_be_read(elements: list[bytes], raw: bool) -> None:
    response = pb.ModelInferResponse()
    wanted = [
        Tensor("text", "BYTES", (len(elements), 1), elements),
        Tensor("counts", "UINT32", (2,), [0, 2**32 - 1]),
    ]
    write_outputs(response, wanted, raw=raw)
    assert len(response.raw_output_contents) == 2 * raw
    counts = list(response.outputs[1].contents.uint_contents)
    if raw:
        assert not counts
        counts = list(struct.unpack("<2I", response.raw_output_contents[1]))
    assert counts == [0, 2**32 - 1]
    text = response.outputs[0]
    request = pb.ModelInferRequest(
        inputs=[tensor(shape=text.shape, contents=None if raw else text.contents)],
        raw_input_contents=response.raw_output_contents[:1],
    )
    got = read_inputs(request, DATATYPES)["text"]
    assert (got.shape, list(got.values)) == ((len(elements), 1), elements)


def test_raw_flags() -> None:
    request = pb.ModelInferRequest(
        inputs=[tensor("flag", "BOOL", [2])], raw_input_contents=[b"\x00\x01"]
    )
    assert list(read_inputs(request, DATATYPES)["flag"].values) == [False, True]


def size(count: int) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": pb.InferParameter(int64_param=count)}}


def test_raw_bytes_may_be_counted_as_by_kserve() -> None:
    raw = [packed([b"abc"])]
    request = pb.ModelInferRequest(inputs=[tensor(**size(7))], raw_input_contents=raw)
    assert list(read_inputs(request, DATATYPES)["text"].values) == [b"abc"]


ONE = pb.InferTensorContents(bytes_contents=[b"a"])


@pytest.mark.parametrize(
    ("inputs", "raw", "says"),
    [
        ([tensor("other")], [], "no input 'other'"),
        ([tensor(contents=ONE)] * 2, [], "twice"),
        ([tensor(datatype="INT32", contents=ONE)], [], "must be BYTES, not 'INT32'"),
        ([tensor(contents=pb.InferTensorContents(int_contents=[1]))], [], "not int_contents"),
        ([tensor()], [], "0 elements"),
        ([tensor(shape=[], contents=ONE)], [], "shape"),
        ([tensor(shape=[0], contents=ONE)], [], "shape"),
        ([tensor(shape=[-1], contents=ONE)], [], "shape"),
        ([tensor(shape=[-1, -1], contents=ONE)], [], "shape"),
        ([tensor(shape=[2**62, 2**62], contents=ONE)], [], "1 elements"),
        ([tensor(shape=[1] * 1000, contents=ONE)], [], "shape"),
        ([tensor(contents=ONE, parameters={"p": pb.InferParameter()})], [], "parameter 'p'"),
        ([tensor(contents=ONE, **size(1))], [], "binary_data_size"),
        ([tensor(**size(4))], [packed([b"a"])], "not the 4 raw bytes"),
        ([tensor(contents=ONE)], [packed([b"a"])], "contents beside"),
        ([tensor()], [packed([b"a"])] * 2, "2 raw_input_contents for 1 inputs"),
        ([tensor()], [packed([b"a"]) + b"\x01"], "end within"),
        ([tensor()], [b"\xff\xff\xff\xff"], "end within"),
        ([tensor()], [packed([b"a", b"b"])], "2 elements"),
        ([tensor("flag", "BOOL", [3])], [b"\x00\x01"], "2 elements"),
    ],
)
def test_tensors_that_do_not_hold_together(inputs: Any, raw: list[bytes], says: str) -> None:
    request = pb.ModelInferRequest(inputs=inputs, raw_input_contents=raw)
    with pytest.raises(InvalidRequest, match=says):
        read_inputs(request, DATATYPES)
