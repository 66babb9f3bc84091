"""The committed gRPC code is what protoc makes of the proto."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve.server.v1

REPOSITORY = Path(__file__).parents[2]
COMMITTED = Path(jaxserve.server.v1.__path__[0])


def test_generated_code_is_current(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    made_with = re.search(
        r"GRPC_GENERATED_VERSION = '(.*)'", (COMMITTED / "jaxserve_pb2_grpc.py").read_text()
    )
    installed = importlib.metadata.version("grpcio-tools")
    if made_with is None or made_with[1] != installed:
        pytest.skip(f"another grpcio-tools ({installed}) made the committed code")
    script = REPOSITORY / "scripts" / "generate_protos.sh"
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([script, tmp_path], check=True, env=env, timeout=60)
    fresh = tmp_path / "jaxserve" / "server" / "v1"
    names = ["jaxserve_pb2.py", "jaxserve_pb2.pyi", "jaxserve_pb2_grpc.py"]
    assert sorted(path.name for path in fresh.iterdir()) == sorted(names)
    for name in names:
        assert (fresh / name).read_text() == (COMMITTED / name).read_text(), (
            f"{name} is stale: run scripts/generate_protos.sh"
        )
