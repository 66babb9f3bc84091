"""The front end's benchmark: a short run over both transports, and its HTTP/2 reader."""

import json
from pathlib import Path

from click.testing import CliRunner

from jaxserve.bench.frontend.http2 import GrpcStreams
from jaxserve.cli.bench_engine import frontend
from jaxserve.server.v1 import jaxserve_pb2 as pb


def test_a_short_run(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    result = CliRunner().invoke(
        frontend,
        ["--streams", "12", "--tokens-per-second", "600", "--seconds", "0.8", "--connections", "2",
         "--warmup-seconds", "1", "--disable-tqdm", "--output-json", str(path)],
    )  # fmt: skip
    assert not result.exit_code, result.output
    data = json.loads(path.read_text())
    assert [cost["transport"] for cost in data["costs"]] == ["grpc", "sse"]
    for cost in data["costs"]:
        client = cost["client"]
        assert client["num_open"] == 12, "a stream ended early"
        assert 0.5 < cost["delivered"] < 1.5
        assert client["num_emitted"] and client["num_timed_tokens"] >= client["num_messages"] > 0
    assert "12 streams, 600 tokens/s, 50.0 steps/s" in result.output


def test_messages_are_counted_however_they_are_cut() -> None:
    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
        return head + stream.to_bytes(4, "big") + payload

    def message(num_tokens: int) -> bytes:
        data = pb.GenerateResponse(token_ids=[300] * num_tokens).SerializeToString()
        return bytes([0]) + len(data).to_bytes(4, "big") + data

    one, two = message(5), message(200)
    sent = (
        frame(0, 0, 1, one + two[:9])
        + frame(0, 0, 3, one)
        + frame(0, 0, 1, two[9:])
        + frame(1, 5, 1, b"trailers")
        + frame(3, 0, 3, b"\0\0\0\1")
    )
    for size in (1, 7, len(sent)):
        counts: list[int] = []
        streams = GrpcStreams([pb.GenerateRequest()] * 2, counts.append)
        streams.transport = _Nowhere()  # type: ignore[assignment]
        for at in range(0, len(sent), size):
            streams.data_received(sent[at : at + size])
        assert counts == [5, 5, 200]
        assert not streams.num_open


class _Nowhere:
    """Takes what is written."""

    def write(self, data: bytes) -> None:
        pass
