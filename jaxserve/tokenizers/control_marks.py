"""Marks in a caller's texts, by which the name of a control token in them stays text."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxserve.core.errors import InvalidRequest
from jaxserve.templates.marks import MARK_ALPHABET
from jaxserve.tokenizers.special_splitter import SpecialTokenSplitter

_KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "model"})
_INSTRUCTIONS = frozenset({"system", "developer", "assistant"})


class ControlMarks:
    """Puts other characters for those without which no control token's name is one.

    A chat template mixes its own text with its caller's, and may strip, cut, join or dump it as
    JSON on the way. So the mark is in the text itself: `<` becomes a character that occurs in no
    name, wherever the caller's text has it, and comes back once the template is done. One
    character stands for one (only the marks themselves, in a caller's text, become two), so that
    what a template measures or cuts is as long as before.

    Args:
        control: names of the tokens that a caller's text must not become.
        others: what stays as it is: names of the other tokens that are found in a text, and what
            the template looks for in a message.
        tags_of_answers: control tokens that the assistant's text and the system's instructions
            may have all the same: such as `<think>`.

    Attributes:
        control: as given.
    """

    def __init__(
        self,
        control: Collection[str],
        others: Collection[str] = (),
        tags_of_answers: Collection[str] = (),
    ) -> None:
        self.control = frozenset(control)
        self._tags_of_answers = frozenset(tags_of_answers)
        anchors = list(dict.fromkeys(_anchor(name) for name in control))
        self._escape, *marks = MARK_ALPHABET[: len(anchors) + 1]
        self._mark_of = dict(zip(anchors, marks, strict=True))
        # Letters are too common to be replaced outside of the names that they begin.
        self._table = str.maketrans({c: m for c, m in self._mark_of.items() if not c.isalnum()})
        self._any_anchor = re.compile(f"[{re.escape(''.join(anchors))}]" if anchors else "(?!)")
        self._any_mark = re.compile(f"([{self._escape}{''.join(marks)}])")
        self._names = [*control, *(n for n in others if self._any_anchor.search(n))]
        self._tokens = SpecialTokenSplitter({name: i for i, name in enumerate(self._names)})
        self._words = frozenset(_word(name) for name in control) - {""}

    def mark(self, value: Any, *, is_answer: bool = False) -> Any:
        """A JSON-like value of the caller's with all strings in it marked, keys too.

        Args:
            value: nested no deeper than Python's stack allows.
            is_answer: leave the `tags_of_answers` as they are.
        """
        if isinstance(value, str):
            pieces = self._any_mark.split(value)  # every second one is a mark
            for i, piece in enumerate(pieces):
                pieces[i] = self._spelled(piece) if i % 2 else self._marked(piece, is_answer)
            return "".join(pieces)
        if isinstance(value, Mapping):
            return {self.mark(k): self.mark(v, is_answer=is_answer) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(inner, is_answer=is_answer) for inner in value]
        return value

    def mark_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A chat's messages with all that is the caller's marked, which is all but known roles.

        Args:
            messages: as `template_messages` makes them.

        Raises:
            InvalidRequest: a role could become a control token by what a template puts around
                it, as `end` would in `<|end|>`.
        """
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def restored(self, text: str) -> str:
        """A rendered text as it reads, without marks."""
        if self._any_mark.search(text):
            for marked, plain in self.replacements():
                text = text.replace(marked, plain)
        return text

    def control_in(self, text: str) -> list[str]:
        """The names of the control tokens that a rendered text has, in order, but marked ones."""
        parts = (self._names[i] for i in self._tokens.split(text) if isinstance(i, int))
        return [name for name in parts if name in self.control]

    def replacements(self) -> list[tuple[str, str]]:
        """What takes the marks out of a text, one after another: (marked, plain)."""
        plain = [(mark, char) for char, mark in self._mark_of.items()]
        marks = [*self._mark_of.values(), self._escape]  # the escape last, or it would make others
        return plain + [(self._spelled(mark), mark) for mark in marks]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        role = message["role"]
        if role in _KNOWN_ROLES:
            return {**self.mark(message, is_answer=role in _INSTRUCTIONS), "role": role}
        if role.strip() in self._words:
            raise InvalidRequest(
                f"{where}.role: {role!r} is the name of a control token", param=f"{where}.role"
            )
        return self.mark(message)

    def _marked(self, text: str, is_answer: bool) -> str:
        if not self._any_anchor.search(text):
            return text
        return "".join(
            part.translate(self._table)
            if isinstance(part, str)
            else self._marked_name(self._names[part], is_answer)
            for part in self._tokens.split(text)
        )

    def _marked_name(self, name: str, is_answer: bool) -> str:
        if name not in self.control or (is_answer and name in self._tags_of_answers):
            return name
        anchor = _anchor(name)
        return name.translate(self._table).replace(anchor, self._mark_of[anchor])

    def _spelled(self, mark: str) -> str:
        """How a mark that is in the caller's own text is written."""
        return self._escape + chr(0x30 + MARK_ALPHABET.index(mark))


def _anchor(name: str) -> str:
    """The character that is replaced: the first sign, else the first letter."""
    signs = (c for c in name if not c.isalnum() and not c.isspace())
    return next(signs, name.strip()[:1])


def _word(name: str) -> str:
    """What is between the signs around a control token's name."""
    return re.sub(r"^\W+|\W+$", "", name)
