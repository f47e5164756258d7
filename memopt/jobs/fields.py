"""Fields of a settings dataclass that also describe themselves to a command line, and turn text into values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from memopt.errors import BadInput

T = TypeVar("T")


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Raises BadInput for a field whose value cannot be used, unless `holds`."""
    if not holds:
        raise BadInput(f"{name} = {value!r}: {remedy}")


def setting(
    help: str,
    group: str,
    default: Any = dataclasses.MISSING,
    *,
    metavar: str | None = None,
    shown: str | None = None,
    fixed: bool = False,
    synonyms: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field with its description.

    `group` is the panel it stands in, `shown` the words for a default that is decided later, `fixed` that it may not
    change when a run is resumed, `synonyms` other spellings of its choices.
    """
    metadata = {
        "help": help,
        "group": group,
        "metavar": metavar,
        "shown": shown,
        "fixed": fixed,
        "synonyms": dict(synonyms or {}),
    }
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def members(cls: type, name: str) -> tuple[Any, ...]:
    """The plain types and literal values field `name` may hold: `int | Literal["auto"] | None` -> (int, "auto")."""

    def flat(hint: Any) -> Iterable[Any]:
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            for part in typing.get_args(hint):
                yield from flat(part)
        elif typing.get_origin(hint) is typing.Literal:
            yield from typing.get_args(hint)
        elif hint is not type(None):
            yield typing.get_origin(hint) or hint

    return tuple(flat(_hints(cls)[name]))


def choices(cls: type, name: str) -> tuple[str, ...]:
    """The closed list of values of field `name`, or () when it is open."""
    found = members(cls, name)
    return found if all(isinstance(each, str) for each in found) else ()


def is_optional(cls: type, name: str) -> bool:
    """Whether field `name` may be None."""
    return type(None) in typing.get_args(_hints(cls)[name])


def coerce(cls: type, field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as field's type: text and ints become numbers, lists and comma-separated text tuples, paths text.

    Raises BadInput that names the field, the value and what it takes.
    """
    name = field.name
    if value is None and is_optional(cls, name):
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    allowed = members(cls, name)
    if isinstance(value, str):
        value = field.metadata["synonyms"].get(value, value)
    for kind in allowed:
        if isinstance(kind, str):
            if value == kind:
                return value
            continue
        fits, converted = _CONVERT[kind](value)
        if fits:
            return converted
    raise BadInput(f"{name} = {value!r}: {_takes(allowed, is_optional(cls, name))}")


def _takes(allowed: tuple[Any, ...], optional: bool) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of names"}
    parts = [each if isinstance(each, str) else words[each] for each in allowed]
    return f"give {' or '.join(parts)}" + (", or leave it out" if optional else "")


def _to_bool(value: Any) -> tuple[bool, Any]:
    return isinstance(value, bool), value


def _to_int(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, None
    if isinstance(value, int):
        return True, value
    if isinstance(value, str) and value.strip().removeprefix("-").isdigit():
        return True, int(value)
    return isinstance(value, float) and value.is_integer(), int(value) if isinstance(value, float) else None


def _to_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, None
    try:
        number = float(value)
    except ValueError:
        return False, None
    return math.isfinite(number), number


def _to_str(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _to_tuple(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    fits = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, str) for each in value)
    return fits, tuple(value) if fits else None


_CONVERT: Mapping[Any, Callable[[Any], tuple[bool, Any]]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    tuple: _to_tuple,
}


def unknown_name(given: str, known: Iterable[str]) -> str:
    """A sentence for a setting nobody knows, with the nearest names."""
    near = difflib.get_close_matches(given.replace("-", "_"), sorted(known), n=3, cutoff=0.6)
    return f"unknown setting {given!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def accepts_aliases(aliases: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """Class decorator: the constructor also takes the names in `aliases` (alias -> field name).

    BadInput on an unknown name, and when one setting is given under two names.
    """

    def decorate(cls: type[T]) -> type[T]:
        generated = cls.__init__
        fields = {each.name: each for each in dataclasses.fields(cls)}  # type: ignore[arg-type]

        @functools.wraps(generated)
        def __init__(self: T, **settings: Any) -> None:
            translated: dict[str, Any] = {}
            for given, value in settings.items():
                name = aliases.get(given, given)
                if name not in fields:
                    raise BadInput(f"{cls.__name__}: {unknown_name(given, [*fields, *aliases])}")
                if name in translated:
                    raise BadInput(f"{cls.__name__}: {name} is given twice (once as {given}); keep one")
                translated[name] = value
            for name, each in fields.items():
                if each.default is dataclasses.MISSING and name not in translated:
                    raise BadInput(f"{cls.__name__}: {name} is missing ({each.metadata['help']})")
            generated(self, **translated)

        cls.__init__ = __init__  # type: ignore[method-assign,assignment]
        return cls

    return decorate
