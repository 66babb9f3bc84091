"""Draws JSON schemas, each of which some JSON fits, from the keywords that grammars support."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = (
    "name", "id", "tags", "size", "is open", "größe", "價格", "a\"b", "back\\slash", "x-1", "notes",
    "unit", "from", "to", "price", "status",
)  # fmt: skip
_PATTERNS = (
    r"^[A-Z]{2}[0-9]{3}$", r"^(red|green|blue)(-[a-z]+)?$", r"^\d{4}-\d{2}$", r"[0-9]+",
    r"^[^@]{1,8}@[a-z]{2,6}\.(org|net)$",
)  # fmt: skip
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


class SchemaSource:
    """Draws schemas: objects most of all, with what else JSON Schema knows inside of them.

    Args:
        seed: of the draws; equal seeds give equal schemas.
        max_depth: how deep objects and arrays may be nested.
    """

    def __init__(self, seed: int, max_depth: int = 3) -> None:
        self._random = random.Random(seed)
        self._max_depth = max_depth

    def draw(self) -> Schema:
        """The next schema."""
        schema = self._object(self._max_depth)
        if self._random.random() < 0.15:  # a list that ends with null
            link = self._object(0)
            link["properties"]["next"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/link"}]}
            link["required"] = sorted({*link["required"], "next"})
            schema["properties"]["link"] = {"$ref": "#/$defs/link"}
            schema["$defs"] = {"link": link}
        return schema

    def _any(self, depth: int) -> Schema:
        kinds: list[Callable[[int], Schema]] = [
            self._string, self._string, self._integer, self._number, self._plain, self._enum,
        ]  # fmt: skip
        if depth > 0:
            kinds += [self._object, self._object, self._array, self._array, self._either]
        return self._random.choice(kinds)(depth)

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_WORDS, self._random.randint(1, 4))
        properties = {name: self._any(depth - 1) for name in names}
        required = sorted(name for name in names if self._random.random() < 0.7)
        schema: Schema = {"type": "object", "properties": properties, "required": required}
        extra = self._random.random()
        if extra < 0.8:
            schema["additionalProperties"] = False
        elif extra < 0.9:
            schema["additionalProperties"] = {"type": "integer"}
        return schema

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        schema: Schema = {"type": "array", "items": self._any(depth - 1), "minItems": least}
        schema["maxItems"] = least + self._random.randint(0, 3)
        if self._random.random() < 0.2:
            schema["prefixItems"] = [self._any(depth - 1)]
            schema["minItems"] = max(least, 1)
            schema["maxItems"] = schema["minItems"] + 1
        return schema

    def _either(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth - 1), self._any(depth - 1)]}

    def _string(self, depth: int) -> Schema:
        kind = self._random.random()
        if kind < 0.25:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        if kind < 0.4:
            return {"type": "string", "format": self._random.choice(_FORMATS)}
        least = self._random.choice((0, 0, 1, 5))
        return {"type": "string", "minLength": least, "maxLength": least + 12}

    def _integer(self, depth: int) -> Schema:
        schema: Schema = {"type": "integer"}
        low = self._random.randint(-1000, 1000)
        if self._random.random() < 0.7:
            schema[self._random.choice(("minimum", "exclusiveMinimum"))] = low
        if self._random.random() < 0.7:
            schema[self._random.choice(("maximum", "exclusiveMaximum"))] = low + 30
        if self._random.random() < 0.2:
            schema["multipleOf"] = self._random.choice((2, 5, 10))
        return schema

    def _number(self, depth: int) -> Schema:
        low = self._random.choice((0, -1.5, 2.25, 100))
        if self._random.random() < 0.5:
            return {"type": "number"}
        return {"type": "number", "minimum": low, "maximum": low + self._random.choice((1, 0.5))}

    def _plain(self, depth: int) -> Schema:
        kind = self._random.choice(("boolean", "null", "const", "nullable"))
        if kind == "const":
            return {"const": self._random.choice((1, "fixed", None, True, {"a": [1, 2]}))}
        if kind == "nullable":
            return {"type": ["integer", "null"]}
        return {"type": kind}

    def _enum(self, depth: int) -> Schema:
        options = ["low", "high", "né\u00e9", 7, 2.5, None, True, "with space"]
        return {"enum": self._random.sample(options, self._random.randint(1, 4))}
