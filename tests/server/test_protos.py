"""The committed gRPC code is what protoc makes of the proto."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve

REPOSITORY = Path(__file__).parents[2]
SERVER = Path(jaxserve.__path__[0]) / "server"
GENERATED = {"v1": "jaxserve", "kserve": "open_inference"}  # folder: name of its proto


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What protoc makes now of the protos of `jaxserve/server`."""
    pytest.importorskip("grpc_tools")
    made_with = re.search(
        r"GRPC_GENERATED_VERSION = '(.*)'", (SERVER / "v1" / "jaxserve_pb2_grpc.py").read_text()
    )
    installed = importlib.metadata.version("grpcio-tools")
    if made_with is None or made_with[1] != installed:
        pytest.skip(f"another grpcio-tools ({installed}) made the committed code")
    folder = tmp_path_factory.mktemp("protos")
    script = REPOSITORY / "scripts" / "generate_protos.sh"
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([script, folder], check=True, env=env, timeout=60)
    return folder / "jaxserve" / "server"


@pytest.mark.parametrize("folder", GENERATED)
def test_generated_code_is_current(fresh: Path, folder: str) -> None:
    name = GENERATED[folder]
    names = [f"{name}_pb2.py", f"{name}_pb2.pyi", f"{name}_pb2_grpc.py"]
    assert sorted(path.name for path in (fresh / folder).iterdir()) == sorted(names)
    for name in names:
        assert (fresh / folder / name).read_text() == (SERVER / folder / name).read_text(), (
            f"{name} is stale: run scripts/generate_protos.sh"
        )
