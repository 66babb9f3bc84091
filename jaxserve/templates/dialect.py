"""The dialect of Jinja2 in which chat templates are written, in a sandbox."""

import datetime
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxserve.templates.marks import with_marks_as_they_are

MAX_RENDERED_CHARS = 16 * 2**20
MAX_POWER_BITS = 4096


class CompiledTemplate:
    """A template as transformers compiles it.

    The rules of the dialect (trimmed blocks, `tojson` without HTML escapes, `raise_exception`,
    `strftime_now`, break and continue, `generation` blocks) are those of
    https://huggingface.co/docs/transformers/chat_templating.

    Compiling and rendering may take any time and memory: see `workers` for how that is bounded.

    Args:
        source: the Jinja source.

    Attributes:
        variables: names that the template reads and does not set.

    Raises:
        jinja2.TemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))

    def render(self, variables: Mapping[str, Any], max_chars: int) -> str | None:
        """What the template makes of its variables; None if that is longer than `max_chars`.

        Raises:
            Exception: of any kind, as a program may.
        """
        chunks, size = [], 0
        for chunk in self._template.generate(variables):
            size += len(chunk)
            if size > max_chars:
                return None
            chunks.append(chunk)
        return "".join(chunks)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with a limit on the operators that make huge values of small ones."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply and raise to powers, within reason."""
        if operator == "**":
            is_int = isinstance(left, int) and isinstance(right, int)
            too_large = is_int and left.bit_length() * right > MAX_POWER_BITS
        else:
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
            repeats = any(hasattr(v, "__len__") for v in (left, right))
            too_large = repeats and sizes[0] * sizes[1] > MAX_RENDERED_CHARS
        if too_large:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Replace the block with what is in it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return with_marks_as_they_are(text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
