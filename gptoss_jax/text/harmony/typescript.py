"""Renders JSON schemas as the TypeScript-like types in which harmony describes a function's arguments."""

import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


def render_type(schema: Any, indent: str = "") -> str:
    """The type that a JSON schema describes, byte for byte as openai-harmony writes it.

    Schemas that the format cannot express are rendered as `any`.
    """
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return _one_of(schema["oneOf"], indent)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        if names:
            return " | ".join(names)
    match kind:
        case "object":
            return _object(schema, indent)
        case "string":
            values = schema.get("enum")
            names = (
                [f'"{value}"' for value in values if isinstance(value, str)] if isinstance(values, list) else []
            )
            return " | ".join(names) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case "array":
            return f"{render_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return "any"


def _object(schema: Mapping[str, Any], indent: str) -> str:
    lines = []
    description = _text(schema, "description")
    if description is not None:
        lines.append(f"{indent}// {description}")
    lines.append("{")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    properties = schema.get("properties")
    for name, value in properties.items() if isinstance(properties, Mapping) else ():
        lines += _property(f"{name}{'' if name in required else '?'}", value, indent)
    return "\n".join([*lines, f"{indent}}}"])


def _property(name: str, schema: Any, indent: str) -> list[str]:
    value: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
    lines = []
    title = _text(value, "title")
    if title is not None:
        lines += [f"{indent}// {title}", f"{indent}//"]
    description = _text(value, "description")
    if description is not None and "oneOf" not in value:
        lines.append(f"{indent}// {description}")
    examples = value.get("examples")
    if isinstance(examples, list) and examples:
        lines.append(f"{indent}// Examples:")
        lines += [f'{indent}// - "{example}"' for example in examples if isinstance(example, str)]
    if isinstance(value.get("oneOf"), list):
        return lines + _one_of_property(name, value, indent)
    line = f"{indent}{name}: {_nullable(schema, f'{indent}    ')},"
    if "default" in value and "oneOf" not in value:
        line += f" // {_default(value)}"
    return [*lines, line]


def _one_of_property(name: str, value: Mapping[str, Any], indent: str) -> list[str]:
    variants = value["oneOf"]
    lines = []
    description = _text(value, "description")
    first = variants[0] if variants and isinstance(variants[0], Mapping) else {}
    above = description is not None and description != _text(first, "description")
    if above:
        lines.append(f"{indent}// {description}")
    if "default" in value:
        lines.append(f"{indent}// {_default(value)}")
    lines.append(f"{indent}{name}:")
    for index, variant in enumerate(variants):
        comments = []
        own = _text(variant, "description")
        if own is not None and own != description and not (index == 0 and above):
            comments.append(own)
        if isinstance(variant, Mapping) and "default" in variant:
            comments.append(_default(variant))
        line = f"{indent} | {_nullable(variant, f'{indent}   ')}"
        lines.append(f"{line} // {' '.join(comments)}" if comments else line)
    return [*lines, f"{indent},"]


def _one_of(variants: list[Any], indent: str) -> str:
    written = []
    for variant in variants:
        comments = []
        description = _text(variant, "description")
        if description is not None:
            comments.append(description)
        if isinstance(variant, Mapping) and "default" in variant:
            comments.append(_default(variant, quote_enums=True))
        line = f"\n{indent} | {_nullable(variant, f'{indent}   ')}"
        written.append(f"{line} // {' '.join(comments)}" if comments else line)
    return "".join(written)


def _nullable(schema: Any, indent: str) -> str:
    written = render_type(schema, indent)
    if isinstance(schema, Mapping) and schema.get("nullable") is True and "null" not in written:
        return f"{written} | null"
    return written


def _default(schema: Mapping[str, Any], quote_enums: bool = False) -> str:
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {to_json(_in_64_bits(value))}"
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return f"default: {to_json(value) if quote_enums else value}"
    return f'default: "{value}"'


def _in_64_bits(value: Any) -> Any:
    """A value with integers beyond 64 bits converted to floats, as serde_json reads them."""
    if isinstance(value, Mapping):
        return {key: _in_64_bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_64_bits(item) for item in value]
    beyond = isinstance(value, int) and not -(2**63) <= value < 2**64
    return float(value) if beyond and abs(value) <= sys.float_info.max else value


def _text(schema: Any, key: str) -> str | None:
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, str) else None


def to_json(value: Any) -> str:
    """Compact JSON as serde_json writes it; openai-harmony uses it for default values."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{to_json(str(key))}:{to_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_json, value)) + "]"
    if isinstance(value, float):
        return _float(value)
    return json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    if not math.isfinite(value):
        return "null"
    written = repr(value)
    if 1e-5 <= abs(value) < 1e-4:
        return format(Decimal(written), "f")
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), written)
