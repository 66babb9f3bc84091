"""What surrounds a vocabulary: beginning and end tokens, chat template, and their files."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.core.errors import CheckpointError

# A chat model ends its turn with one of these, but many checkpoints name only the token that
# ends a document as EOS; without them such a model would talk on into the user's next turn.
CHAT_END_TOKENS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Which tokens frame a text, and the chat template.

    Attributes:
        bos_token_id: begins a text, None where the model has none.
        eos_token_ids: any of them ends a generation; the first is the model's main one.
        prefix_ids: put before an encoded text (usually nothing, or BOS).
        suffix_ids: put after an encoded text (nearly always nothing).
        chat_template: Jinja source, None for a model that does not chat.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat_template: str | None = None


def with_chat_ends(
    eos_token_ids: list[int], chat_template: str | None, token_to_id: Callable[[str], int | None]
) -> tuple[int, ...]:
    """The EOS tokens, with those that end a turn if this is a chat model; no duplicates."""
    ids = list(eos_token_ids)
    if chat_template is not None:
        ends = (token_to_id(token) for token in CHAT_END_TOKENS)
        ids += [i for i in ends if i is not None]
    return tuple(dict.fromkeys(ids))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no such file.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object")
    return content


def read_settings(
    directory: Path,
    token_to_id: Callable[[str], int | None],
    prefix_ids: tuple[int, ...] = (),
    suffix_ids: tuple[int, ...] = (),
) -> TokenizerSettings:
    """Settings from the Hugging Face files of a directory, as far as they are there.

    Args:
        directory: may hold tokenizer_config.json, generation_config.json, config.json and
            chat_template.jinja.
        token_to_id: looks a token's name up in the vocabulary.
        prefix_ids, suffix_ids: what the vocabulary file itself adds around a text; an
            `add_bos_token` or `add_eos_token` in tokenizer_config.json overrules it.
    """
    config = read_json(directory / "tokenizer_config.json")
    generation = read_json(directory / "generation_config.json")
    model = read_json(directory / "config.json")
    template = _read_template(directory, config)
    bos = _named_token(config.get("bos_token"), token_to_id)
    if bos is None:
        bos = next(iter(_as_ids(generation.get("bos_token_id", model.get("bos_token_id")))), None)
    main_eos = _named_token(config.get("eos_token"), token_to_id)
    eos = _as_ids(generation.get("eos_token_id", model.get("eos_token_id")))
    if main_eos is not None:
        eos = [main_eos, *eos]
    if bos is not None and config.get("add_bos_token") is not None:
        rest = prefix_ids[1:] if prefix_ids[:1] == (bos,) else prefix_ids
        prefix_ids = (bos, *rest) if config["add_bos_token"] else rest
    if main_eos is not None and config.get("add_eos_token") is not None:
        rest = suffix_ids[:-1] if suffix_ids[-1:] == (main_eos,) else suffix_ids
        suffix_ids = (*rest, main_eos) if config["add_eos_token"] else rest
    return TokenizerSettings(
        bos_token_id=bos,
        eos_token_ids=with_chat_ends(eos, template, token_to_id),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        chat_template=template,
    )


def write_settings(
    directory: Path,
    settings: TokenizerSettings,
    id_to_token: Callable[[int], str],
    extra: Mapping[str, object],
) -> None:
    """Write what `read_settings` reads, beside a vocabulary file that is already there."""
    config: dict[str, object] = dict(extra)
    bos, eos = settings.bos_token_id, settings.eos_token_ids
    if bos is not None:
        config["bos_token"] = id_to_token(bos)
        config["add_bos_token"] = settings.prefix_ids[:1] == (bos,)
    if eos:
        config["eos_token"] = id_to_token(eos[0])
        config["add_eos_token"] = settings.suffix_ids[-1:] == (eos[0],)
    if settings.chat_template is not None:
        config["chat_template"] = settings.chat_template
    # tokenizer_config.json has room for one EOS only; generation_config.json takes a list.
    generation = read_json(directory / "generation_config.json")
    generation |= {"bos_token_id": bos, "eos_token_id": list(eos)}
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "generation_config.json", generation)
    # A template left here by another model would win over the one just written.
    (directory / "chat_template.jinja").unlink(missing_ok=True)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: for tools, for retrieval, ...
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _named_token(entry: Any, token_to_id: Callable[[str], int | None]) -> int | None:
    """The id of a token given by name, or by an object with a "content"."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return token_to_id(name) if isinstance(name, str) else None


def _as_ids(entry: Any) -> list[int]:
    """Ids from a field that holds one, a list of them, or null."""
    if entry is None:
        return []
    return [int(i) for i in entry] if isinstance(entry, list) else [int(entry)]
