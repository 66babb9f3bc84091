"""JSON schemas as a grammar can enforce them, and what of them it cannot."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxserve.core.errors import InvalidRequest

# Formats that llguidance enforces; by the standard all others are annotations, with no effect.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
MAX_UNIQUE = 6  # different items of which all selections are spelled out

# Where schemas are inside of a schema: as a value, in a list, under names.
_ONE = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if",
    "then", "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# What llguidance has no grammar for.
_UNENFORCED = (
    "uniqueItems", "propertyNames", "not", "if", "then", "else", "contains", "minContains",
    "maxContains", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_COMBINATORS = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_LOOK_AROUND = re.compile(r"\(\?<?[=!]|\\[1-9bB]|\(\?P=")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# Up to here every integer is a double, in which llguidance keeps bounds; integers end at 2^63.
_EXACT, _INT64 = 2**53, 2**63 - 1
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_MOST = 2**31 - 1  # of anything in an answer


def enforceable_schema(schema: Mapping[str, Any], *, is_strict: bool) -> dict[str, Any]:
    """An equal schema, as far as there is one, in the words that llguidance has a grammar for.

    Everything that fits the result fits the given schema, but for keywords that only a look at
    the finished text could enforce (`uniqueItems` of numbers, `not`, `if`, `contains`, ...): they
    are refused if it is strict, and left out if not, as OpenAI's API has it: see `left_out`.

    Args:
        schema: a JSON schema of any draft.
        is_strict: leave nothing out.

    Raises:
        InvalidRequest: a number's bounds are beyond what can be enforced, the schema is nested
            too deep, or it is strict and has a keyword that cannot be enforced; it is named.
    """
    try:
        result = _Rewriter(schema, is_strict).rewritten(schema, "")
    except RecursionError:
        raise InvalidRequest("the schema is nested too deep", param="grammar") from None
    if not is_strict:
        settings = result.get("x-guidance")
        own = settings if isinstance(settings, Mapping) else {}
        result["x-guidance"] = {"coerce_one_of": True, **own}
    return result


def left_out(schema: Mapping[str, Any]) -> list[str]:
    """The keywords that `enforceable_schema` leaves out of a schema that is not strict.

    A `oneOf` is among them, as more than one of its schemas may fit.

    Args:
        schema: one that `enforceable_schema` takes.

    Returns:
        Each with its place, as `properties.x.not`.
    """
    rewriter = _Rewriter(schema, is_strict=False)
    rewriter.rewritten(schema, "")
    return rewriter.left_out


class _Rewriter:
    def __init__(self, root: Mapping[str, Any], is_strict: bool) -> None:
        self._root = root
        self._is_strict = is_strict
        self.left_out: list[str] = []

    def rewritten(self, schema: Any, where: str, *, is_joined: bool = False) -> Any:
        """A schema and all inside it.

        Args:
            schema: a schema, or what stands in its place.
            where: its place, for messages.
            is_joined: it holds beside others that name properties.
        """
        if not isinstance(schema, Mapping):
            return schema
        node = dict(schema)
        if isinstance(node.get("format"), str) and node["format"] not in FORMATS:
            del node["format"]
        _check_numbers(node, where)
        _settle_counts(node)
        self._bound(node, where)
        self._name_properties(node)
        self._bound_properties(node, where, is_joined=is_joined)
        self._spell_unique(node)
        if node.get("unevaluatedProperties") is False and not any(k in node for k in _COMBINATORS):
            node.setdefault("additionalProperties", False)
            del node["unevaluatedProperties"]
        if isinstance(node.get("pattern"), str) and _LOOK_AROUND.search(node["pattern"]):
            self._leave_out(node, "pattern", where, " with look-around or back references")
        for key in _UNENFORCED:
            if key in node and not _says_nothing(key, node[key], node):
                self._leave_out(node, key, where)
            node.pop(key, None)
        if "oneOf" in node and not self._is_strict:
            self.left_out.append(f"{where}oneOf")
        return self._inside(node, where)

    def _inside(self, node: dict[str, Any], where: str) -> dict[str, Any]:
        for key in _ONE:
            if isinstance(node.get(key), Mapping):
                node[key] = self.rewritten(node[key], f"{where}{key}.")
        is_joined = self._names_properties(node)
        for key in _LISTS:
            if isinstance(node.get(key), list):
                node[key] = [
                    self.rewritten(
                        inner, f"{where}{key}[{i}].", is_joined=is_joined and key in _COMBINATORS
                    )
                    for i, inner in enumerate(node[key])
                ]
        for key in _NAMED:
            if isinstance(node.get(key), Mapping):
                node[key] = {
                    name: self.rewritten(inner, f"{where}{key}.{name}.")
                    for name, inner in node[key].items()
                }
        return node

    def _leave_out(self, node: dict[str, Any], key: str, where: str, why: str = "") -> None:
        if self._is_strict:
            raise _refusal(f"{where}{key}{why}", "is not supported where strict is true")
        self.left_out.append(f"{where}{key}{why}")
        del node[key]

    def _bound(self, node: dict[str, Any], where: str) -> None:
        """Make the bounds of a number such that llguidance is exact."""
        given = {k: node[k] for k in _BOUNDS if k in node and node[k] is not None}
        if not given or any(isinstance(v, bool) or not _is_finite(v) for v in given.values()):
            return  # draft 4's exclusive bounds are known to llguidance, nonsense is named by it
        kinds = node.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "integer" in kinds and "number" not in kinds:
            self._bound_integer(node, given, where)
            return
        for key, value in given.items():
            if abs(value) <= _EXACT:
                continue
            if (value > 0) == key.lower().endswith("maximum"):
                node[key] = _EXACT if value > 0 else -_EXACT  # as far as it can be enforced
            else:
                raise _refusal(f"{where}{key} {value}", f"is beyond {_EXACT}")

    def _bound_integer(self, node: dict[str, Any], given: dict[str, Any], where: str) -> None:
        low, high = _interval(given)
        for key in _BOUNDS:
            node.pop(key, None)
        least = None if low is None else _rounded(low, math.inf)
        most = None if high is None else _rounded(high, -math.inf)
        is_lost = low is not None and high is not None and low <= high and (least > most)  # type: ignore[operator]
        if is_lost or (least or 0) > _INT64 or (most or 0) < -_INT64:
            verb = "is" if len(given) == 1 else "are"
            raise _refusal(f"{where}{' and '.join(given)}", f"{verb} beyond what can be enforced")
        if least is not None:
            node["minimum"] = least
        if most is not None:
            node["maximum"] = most

    def _name_properties(self, node: dict[str, Any]) -> None:
        """Put into `properties` and `patternProperties` what `propertyNames` says."""
        names = self._resolved(node.get("propertyNames"))
        if not isinstance(names, Mapping):
            return
        values = node.get("additionalProperties", True)
        options = [names["const"]] if "const" in names else names.get("enum")
        if isinstance(options, list):
            known = node.get("properties")
            known = known if isinstance(known, Mapping) else {}
            keys = dict.fromkeys(name for name in options if isinstance(name, str))
            node["properties"] = {name: known.get(name, values) for name in keys}
        elif "patternProperties" not in node and not node.get("properties"):
            pattern = _name_pattern(names)
            if pattern is None:
                return
            node["patternProperties"] = {pattern: values}
        else:
            return
        node["additionalProperties"] = False
        del node["propertyNames"]

    def _bound_properties(self, node: dict[str, Any], where: str, *, is_joined: bool) -> None:
        """Say the number of properties by their names, where llguidance cannot count them.

        It counts if all that have a name are required, or up to one of those that are not.
        """
        least, most = (node.get(key) for key in ("minProperties", "maxProperties"))
        counts = [count for count in (least, most) if count is not None]
        if not counts or any(type(count) is not int or count < 0 for count in counts):
            return  # nonsense is named by llguidance
        known = node.get("properties")
        known = dict(known) if isinstance(known, Mapping) else {}
        required = node.get("required")
        required = [n for n in required if isinstance(n, str)] if isinstance(required, list) else []
        names = [name for name, value in known.items() if value is not False]
        is_own = not is_joined and not any(key in node for key in _COMBINATORS)
        is_closed = is_own and node.get("additionalProperties") is False
        is_closed = is_closed and not node.get("patternProperties")
        if least is not None and least <= len(set(required)):
            least = None
        if is_closed and (least or 0) >= len(names) and not set(required) - set(names):
            if least is not None and least > len(names):
                raise _refusal(f"{where}minProperties {least}", "is more than its properties")
            required, least = names, None
            node["required"] = names
        if is_closed and most is not None and most >= len(names):
            most = None
        elif is_own and most == len(set(required)) and not set(required) - set(names):
            known, most = {name: known[name] for name in required}, None
            node |= {"properties": known, "additionalProperties": False}
            node.pop("patternProperties", None)
        is_named = bool(set(known) - set(required)) if is_own else self._names_properties(node)
        is_counted = is_closed and not required and (least or 0) <= 1 and most in (None, 1)
        for key, count in (("minProperties", least), ("maxProperties", most)):
            if count is None:
                node.pop(key, None)
            elif (is_joined or is_named) and not is_counted:
                self._leave_out(node, key, where)

    def _names_properties(self, node: Mapping[str, Any]) -> bool:
        """Whether a schema, or one that holds beside it, names properties."""
        branches = [node, self._resolved({"$ref": node.get("$ref")})]
        for key in ("allOf", "anyOf", "oneOf"):
            if isinstance(node.get(key), list):
                branches += map(self._resolved, node[key])
        return any(isinstance(some, Mapping) and some.get("properties") for some in branches)

    def _spell_unique(self, node: dict[str, Any]) -> None:
        """Spell out all lists of different items, in the order of the items, if these are few."""
        if node.get("uniqueItems") is not True or "prefixItems" in node:
            return
        values = _values(self._resolved(node.get("items")))
        if values is None or not 0 < len(values) <= MAX_UNIQUE:
            return
        least, most = node.get("minItems", 0), node.get("maxItems", len(values))
        if not isinstance(least, int) or not isinstance(most, int):
            return
        sizes = range(max(least, 0), min(most, len(values)) + 1)
        lists = [list(some) for n in sizes for some in itertools.combinations(values, n)]
        for key in ("items", "minItems", "maxItems", "uniqueItems"):
            node.pop(key, None)
        node["enum"] = lists

    def _resolved(self, schema: Any) -> Any:
        """What a reference within the document points to."""
        for _ in range(16):
            reference = schema.get("$ref") if isinstance(schema, Mapping) else None
            if not isinstance(reference, str) or not reference.startswith("#"):
                return schema
            schema = self._root
            for part in filter(None, reference[1:].split("/")):
                part = part.replace("~1", "/").replace("~0", "~")
                schema = schema.get(part) if isinstance(schema, Mapping) else None
        return None


def _check_numbers(node: dict[str, Any], where: str) -> None:
    values = node.get("enum")
    for value in [node.get("const"), *(values if isinstance(values, list) else ())]:
        if not isinstance(value, int) or abs(value) <= _EXACT:
            continue
        if abs(value) > _INT64 or int(float(value)) != value:
            raise _refusal(f"{where}{value}", "has more digits than can be enforced")


def _settle_counts(node: dict[str, Any]) -> None:
    """Make whole numbers integers, and leave out what no answer is long enough to exceed."""
    for key in _COUNTS:
        value = node.get(key)
        if isinstance(value, float) and value.is_integer():
            node[key] = value = int(value)
        if isinstance(value, int) and value > _MOST and key.startswith("max"):
            del node[key]


def _says_nothing(key: str, value: Any, node: Mapping[str, Any]) -> bool:
    """Whether a keyword allows everything as it stands."""
    if key == "uniqueItems":
        return value is False or node.get("maxItems", 2) in (0, 1)
    if key == "propertyNames":
        return value is True or (
            isinstance(value, Mapping) and not set(value) - {"type", "title", "description"}
        )
    if key in ("unevaluatedItems", "unevaluatedProperties"):
        return value is True or value == {}
    if key in ("if", "then", "else"):
        return "if" not in node or not {"then", "else"} & node.keys()
    if key in ("minContains", "maxContains"):
        return "contains" not in node
    return value in ({}, []) and key.startswith("depend")


def _name_pattern(names: Mapping[str, Any]) -> str | None:
    """A regular expression for names of that schema, if one keyword says it all."""
    said = set(names) - {"type", "title", "description"}
    if said == {"pattern"} and isinstance(names["pattern"], str):
        return None if _LOOK_AROUND.search(names["pattern"]) else names["pattern"]
    lengths = [names.get("minLength", 0), names.get("maxLength", "")]
    are_counts = all(isinstance(n, int) and n >= 0 for n in lengths if n != "")
    if said and said <= {"minLength", "maxLength"} and are_counts:
        return f"^[\\s\\S]{{{lengths[0]},{lengths[1]}}}$"
    return None


def _values(items: Any) -> list[Any] | None:
    """All that fit a schema, if it lists them."""
    if not isinstance(items, Mapping):
        return None
    if "const" in items:
        return [items["const"]]
    values = [False, True] if items.get("type") == "boolean" else items.get("enum")
    if not isinstance(values, list):
        return None
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _interval(given: Mapping[str, float]) -> tuple[int | None, int | None]:
    """The least and the greatest integer within bounds; None where there is no bound."""
    low = [math.ceil(given["minimum"])] if "minimum" in given else []
    low += [math.floor(given["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in given else []
    high = [math.floor(given["maximum"])] if "maximum" in given else []
    high += [math.ceil(given["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in given else []
    return max(low, default=None), min(high, default=None)


def _rounded(bound: int, towards: float) -> int:
    """The next integer in that direction that is a double, and not beyond 64 bits if it can be."""
    if abs(bound) <= _EXACT:
        return bound
    if bound >= _INT64 and towards < 0:
        return _INT64
    bound = max(bound, -_INT64) if towards > 0 else bound
    if abs(bound) > 2**1000:
        return bound
    value = float(bound)
    inside = value >= bound if towards > 0 else value <= bound
    return int(value if inside else math.nextafter(value, towards))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _refusal(what: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"the schema's {what} {problem}"[:500], param="grammar")
