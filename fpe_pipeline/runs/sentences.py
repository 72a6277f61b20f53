"""What a schema refuses, said in a line: what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationError, WithJsonSchema

from ..texts import did_you_mean

__all__ = ["Text", "meant", "sentences"]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {value!r}")
    return value


#: Any string of Python's: names of files may hold bytes that are no UTF-8, which pydantic's own strings refuse.
Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]

#: By pydantic's name of an error, what was expected; {} are its own figures.
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "names with values",
    "tuple_type": "a list",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "too_long": "a list of {max_length}",
    "too_short": "a list of at least {min_length}",
    "missing": "a longer list",
}


def meant(name: str, names: Iterable[str]) -> str:
    """``; did you mean …?``, to end a sentence with, where one of ``names`` is close to ``name``; else nothing."""
    hint = did_you_mean([name], names)
    return f"; {hint.rstrip()}" if hint else ""


def sentences(error: ValidationError, names: Iterable[str], one: str = "the settings") -> str:
    """Everything that a schema of ``names`` found wrong, in one line; ``one`` is the name of a value without any."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for each in error.errors(include_url=False):
        # A place is a name and positions in it; the rest names alternatives of a type.
        first, *rest = each["loc"] or (one,)
        tail = "".join(f"[{part}]" for part in rest if isinstance(part, int) and each["type"] != "missing")
        places.setdefault(f"{first}{tail}", []).append(each)
    # What is wrong inside a list says enough of the list.
    inner = {place.partition("[")[0] for place in places if "[" in place}
    known = tuple(names)
    return "; ".join(_sentence(place, found, known) for place, found in places.items() if place not in inner)


def _sentence(place: str, found: list[Mapping[str, Any]], names: tuple[str, ...]) -> str:
    first = found[0]
    kind, got = first["type"], first["input"]
    if kind == "extra_forbidden":
        return f"there is no setting {place}{meant(place, names)}"
    if kind == "missing" and len(first["loc"]) == 1:
        return f"{place} is missing"
    if kind == "value_error":
        return f"{place} {first['ctx']['error']}"
    if kind == "literal_error":
        known = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return f"{place} must be one of {known}, got {got!r}{meant(str(got), known.split(', '))}"
    ways = dict.fromkeys(_expected(each) for each in found)
    return f"{place} must be {' or '.join(ways)}, got {got!r}"


def _expected(error: Mapping[str, Any]) -> str:
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in error.get("ctx", {}).items()}
    return _EXPECTED[error["type"]].format_map(limits) if error["type"] in _EXPECTED else error["msg"]
