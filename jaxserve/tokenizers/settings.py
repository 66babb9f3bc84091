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

# Special tokens as the files call them, beside those that begin and end a text.
_TOKENS = (
    "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """Which tokens frame a text, and the chat template.

    Attributes:
        bos_token_id: begins a text, None where the model has none.
        eos_token_ids: any of them ends a generation; the first is the model's main one.
        prefix_ids: put before an encoded text (usually nothing, or BOS).
        suffix_ids: put after an encoded text (nearly always nothing).
        chat_template: Jinja source, None for a model that does not chat.
        named_templates: other ones by name, such as `tool_use`.
        special_tokens: more of the tokens' names that templates may write, by what they are
            called there: `pad_token`, `unk_token`, a model's own such as `image_token`, and the
            list `additional_special_tokens`.

    Raises:
        CheckpointError: a token is no id, or a template no text.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    named_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    special_tokens: Mapping[str, str | list[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for token in (*bos, *self.eos_token_ids, *self.prefix_ids, *self.suffix_ids):
            if not isinstance(token, int) or token < 0:
                raise CheckpointError(f"a beginning or end token is {token!r}, no token id")
        templates = () if self.chat_template is None else (self.chat_template,)
        for template in (*templates, *self.named_templates.values()):
            if not isinstance(template, str):
                raise CheckpointError(f"a chat template is {template!r:.60}, which is no text")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens beyond the vocabulary that would be put into a text.

        End tokens may lie there: models have room for more tokens than their tokenizers.

        Raises:
            CheckpointError: there is one.
        """
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for token in (*bos, *self.prefix_ids, *self.suffix_ids):
            if token >= vocab_size:
                raise CheckpointError(
                    f"the beginning or end token {token} is beyond the vocabulary of {vocab_size}"
                )


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
    except (OSError, ValueError, RecursionError) as error:
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
    templates = read_templates(directory, config)
    template = templates.pop("default", None)
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
        eos_token_ids=with_chat_ends(eos, template or templates.get("tool_use"), token_to_id),
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        chat_template=template,
        named_templates=templates,
        special_tokens=_special_tokens(read_json(directory / "special_tokens_map.json") | config),
    )


def settings_config(
    settings: TokenizerSettings,
    id_to_token: Callable[[int], str],
    extra: Mapping[str, object],
) -> dict[str, object]:
    """The content of a tokenizer_config.json that says the settings, and `extra`."""
    config: dict[str, object] = dict(extra)
    bos, eos = settings.bos_token_id, settings.eos_token_ids
    if bos is not None:
        config["bos_token"] = id_to_token(bos)
        config["add_bos_token"] = settings.prefix_ids[:1] == (bos,)
    if eos:
        config["eos_token"] = id_to_token(eos[0])
        config["add_eos_token"] = settings.suffix_ids[-1:] == (eos[0],)
    if settings.named_templates:
        default = {} if settings.chat_template is None else {"default": settings.chat_template}
        config["chat_template"] = [
            {"name": name, "template": template}
            for name, template in (default | dict(settings.named_templates)).items()
        ]
    elif settings.chat_template is not None:
        config["chat_template"] = settings.chat_template
    known = settings.special_tokens.keys() & _TOKENS
    config |= {name: settings.special_tokens[name] for name in sorted(known)}
    own = {name: t for name, t in settings.special_tokens.items() if name not in _TOKENS}
    if own:
        config["extra_special_tokens"] = own
    return config


def write_settings(
    directory: Path,
    settings: TokenizerSettings,
    id_to_token: Callable[[int], str],
    extra: Mapping[str, object],
) -> None:
    """Write what `read_settings` reads, beside a vocabulary file that is already there."""
    bos, eos = settings.bos_token_id, settings.eos_token_ids
    # tokenizer_config.json has room for one EOS only; generation_config.json takes a list.
    generation = read_json(directory / "generation_config.json")
    generation |= {"bos_token_id": bos, "eos_token_id": list(eos)}
    config = settings_config(settings, id_to_token, extra)
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "generation_config.json", generation)
    # Templates left here by another model would win over those just written.
    for file in _template_files(directory):
        file.unlink()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a checkpoint by name; the main one is `default`.

    As in transformers: files win over what is in tokenizer_config.json.

    Args:
        directory: may hold chat_template.jinja (or .json, of older processors) and
            additional_chat_templates.
        config: of tokenizer_config.json; its `chat_template` is one, or a list of named ones.

    Raises:
        CheckpointError: a file is no text, or an entry has no name or template.
    """
    try:
        found = {
            "default" if file.parent == directory else file.stem: file.read_text(encoding="utf-8")
            for file in _template_files(directory)
        }
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read a chat template of {directory}: {error}") from error
    if found:
        return found
    given = config.get("chat_template")
    if given is None:
        given = read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, Mapping):
        given = [{"name": name, "template": template} for name, template in given.items()]
    if not isinstance(given, list | None):
        raise CheckpointError(f"{directory}: chat_template is neither a text nor a list of them")
    for entry in given or ():
        name = entry.get("name") if isinstance(entry, Mapping) else None
        template = entry.get("template") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(f"{directory}: a chat template without a name or a text")
        found[name] = template
    return found


def _template_files(directory: Path) -> list[Path]:
    """The files that are chat templates, the main one last."""
    main = directory / "chat_template.jinja"
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    return [*others, *([main] if main.is_file() else [])]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The special tokens that a configuration names, beside beginning and end."""
    extra = config.get("extra_special_tokens")
    own = extra if isinstance(extra, Mapping) else {}
    found: dict[str, str | list[str]] = {}
    for name, entry in {**own, **{name: config.get(name) for name in _TOKENS}}.items():
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(token, str):
            found[str(name)] = token
    more = config.get("additional_special_tokens", extra)
    if isinstance(more, list):
        tokens = [e.get("content") if isinstance(e, Mapping) else e for e in more]
        found["additional_special_tokens"] = [t for t in tokens if isinstance(t, str)]
    return found


def _named_token(entry: Any, token_to_id: Callable[[str], int | None]) -> int | None:
    """The id of a token given by name, or by an object with a "content"."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return token_to_id(name) if isinstance(name, str) else None


def _as_ids(entry: Any) -> list[int]:
    """Ids from a field that holds one, a list of them, or null."""
    if entry is None:
        return []
    ids = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{str(entry)[:60]!r} is not a token id or a list of them")
    return [i for i in ids if i >= 0]  # -1: none
