"""Fetches models from the Hugging Face Hub, by its own package and into its own cache."""

from pathlib import Path

from tqdm.asyncio import tqdm_asyncio

from jaxserve.checkpoints.gguf_file import whole_files
from jaxserve.core.errors import CheckpointError, ModelNotFound

PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "additional_chat_templates/*.jinja", "*.safetensors", "*.safetensors.index.json",
)  # fmt: skip
# The same weights under other names, and what is not a model by itself: nothing reads them.
IGNORED = ("consolidated*.safetensors", "adapter_model*.safetensors", "*/*.safetensors")


def pull_from_hub(
    name: str, cache_dir: Path | None, progress: bool, *, demos: str, hint: str
) -> Path:
    """Fetch a repository, or one GGUF file of it, unless it is here already.

    Args:
        name: `owner/name`, or `owner/name:WHICH` for the GGUF file that has WHICH in its name,
            such as Q4_K_M, or is called so.
        cache_dir: where to keep it (default: the hub's own cache).
        progress: show a bar on stderr.
        demos: names of the demo models, for messages.
        hint: what to add to messages about names that do not exist.

    Returns:
        The snapshot's directory, or the GGUF file (of a split one, the first part).

    Raises:
        ModelNotFound: there is no such repository.
        CheckpointError: it could not be fetched, or has not exactly one such GGUF file.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is neither a file here nor a demo model ({demos}); to fetch it from the "
            f"Hugging Face Hub, install huggingface_hub{hint}"
        ) from error
    repository, _, which = name.partition(":")
    patterns = [f"*{one}*" for one in {which, which.lower(), which.upper()}] if which else PATTERNS
    try:
        # The hub's own switch for its bars is process-wide, so they are silenced per call.
        snapshot = huggingface_hub.snapshot_download(
            repository,
            cache_dir=cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED),
            tqdm_class=None if progress else _SilentBar,
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"{name!r} is neither a file here, nor a demo model ({demos}), nor a repository of "
            f"the Hugging Face Hub that you may read{hint}"
        ) from error
    except Exception as error:  # httpx, requests and OS errors, depending on the hub's version
        raise CheckpointError(
            f"cannot fetch {name!r} from the Hugging Face Hub: {error}\nCheck the network "
            f"(HF_ENDPOINT, proxies), give a checkpoint's path, or use a demo model ({demos})."
            f"{hint}"
        ) from error
    return _gguf_of(Path(snapshot), repository, which) if which else _whole(Path(snapshot), name)


def _gguf_of(snapshot: Path, repository: str, which: str) -> Path:
    """The one GGUF file of a snapshot with that in its name."""
    files = whole_files(snapshot.rglob("*.gguf"))
    exact = [file for file in files if file.name == which]
    found = exact or [file for file in files if which.lower() in file.name.lower()]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"{repository} must have one GGUF file with {which!r} in its name, and has {names}"
        )
    return found[0]


def _whole(snapshot: Path, name: str) -> Path:
    if not any(snapshot.glob("*.safetensors")) and not any(snapshot.glob("*.gguf")):
        raise CheckpointError(
            f"{name} has no *.safetensors; of GGUF files say which one, as in {name}:Q4_K_M"
        )
    return snapshot


class _SilentBar(tqdm_asyncio):
    """A progress bar that shows nothing."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
