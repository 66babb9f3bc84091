"""The ways to install: the wheel is complete, and the scripts pass on what they are told."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.scripts.wheel import ROOT, clean_environ, make_environment, package_files, pip


def run_in(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=clean_environ(), capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_is_all_that_a_user_needs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package_files()
    python = make_environment(tmp_path / "venv")
    pip(python, "install", "--no-deps", str(wheel))
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run_in(empty, python, "-c", "import jaxserve; print(jaxserve.__file__)")
    assert where.stdout.startswith(str(tmp_path)), where
    for command in (["serve", "--help"], ["generate", "--help"], ["--version"]):
        for start in ([python.parent / "jaxserve"], [python, "-m", "jaxserve"]):
            done = run_in(empty, *start, *command)
            assert done.returncode == 0 and "jaxserve" in done.stdout, done
    # A preset is data of the package, and so is each that the message lists.
    done = run_in(empty, python, "-m", "jaxserve", "generate", "nothing", "--random-weights",
                  "--prompt", "x")  # fmt: skip
    assert done.returncode and "llama-3.1-8b" in done.stderr, done
    assert not list(empty.iterdir())


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script where the environment is never made, but what is asked for is noted."""
    scripts = folder / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", scripts)
    stand_in = scripts / "make_venv.sh"
    stand_in.write_text('#!/usr/bin/env bash\necho "extras: [$1]"\nexit 7\n')
    stand_in.chmod(0o755)
    return run_in(folder, scripts / "quickstart.sh", *arguments)


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_quickstart_installs_for_the_hardware_it_is_told(tmp_path: Path, extra: str) -> None:
    done = quickstart(tmp_path, "--extra", extra)
    assert (done.returncode, done.stdout) == (7, f"extras: [{extra}]\n")


def test_quickstart_installs_for_the_cpu_by_default(tmp_path: Path) -> None:
    assert quickstart(tmp_path).stdout == "extras: []\n"


@pytest.mark.parametrize("arguments", [["--extra", "rocm"], ["--extra"], ["--extras", "tpu"]])
def test_quickstart_refuses_what_it_does_not_know(tmp_path: Path, arguments: list[str]) -> None:
    done = quickstart(tmp_path, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert "--extra EXTRA" in done.stderr and "--exit " in done.stderr
