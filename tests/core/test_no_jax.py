"""The host-side packages must run where no JAX is: in the simulator, the router, a client."""

import subprocess
import sys

import pytest

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(sum(name.startswith(package.__name__) for name in sys.modules))
heavy = sorted({"jax", "jaxlib", "flax"} & set(sys.modules))
sys.exit(f"{package.__name__} imports {heavy}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "package", ["core", "files", "scheduling", "cache", "templates", "tokenizers"]
)
def test_package_does_not_import_jax(package: str) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, f"jaxserve.{package}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1, "found no modules to import"


def test_the_fake_executor_does_not_import_jax() -> None:
    code = "import sys, jaxserve.testing.fake_executor; sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
