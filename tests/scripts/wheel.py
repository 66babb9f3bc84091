"""The package as users get it: a wheel, and environments that have its dependencies only."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("jaxserve", "pallas_kernels", "model_configs")


def package_files() -> set[str]:
    """What the wheel is to hold: the files of the packages, as they lie in the checkout."""
    files = (file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy: setuptools would take leftovers of earlier builds along."""
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder / "dist"), str(source))
    (wheel,) = (folder / "dist").glob("jaxserve-*.whl")
    return wheel


def make_environment(folder: Path) -> Path:
    """An environment with all that this one has, but without jaxserve; returns its Python.

    Dependencies are links, so nothing is downloaded, and pip finds each where it wants it.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    linked = folder / "linked"
    linked.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(("jaxserve", "__editable__", "_virtualenv")):
            (linked / entry.name).symlink_to(entry)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "linked.pth").write_text(f"{linked}\n")
    return folder / "bin" / "python"


def clean_environ() -> dict[str, str]:
    """The environment's variables without those that lead to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(python: str | Path, *arguments: str) -> None:
    """Run an environment's pip.

    Raises:
        AssertionError: it failed; with what it said.
    """
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def make_kernel(folder: Path, python: Path) -> str:
    """Describe a kernel of that Python under `folder`, for JUPYTER_PATH; returns its name."""
    spec = folder / "kernels" / "wheel"
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = json.dumps({"argv": argv, "display_name": "wheel", "language": "python"})
    (spec / "kernel.json").write_text(text)
    return spec.name
