"""JSON data into frozen dataclasses, checked by their annotations."""

from __future__ import annotations

import dataclasses
import types
from enum import StrEnum
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from memopt.errors import BadInput

T = TypeVar("T")


def decode(kind: type[T], value: object, where: str) -> T:
    """`value` as a `kind` (a dataclass). Unknown keys are ignored, missing ones take the field's default.

    Raises BadInput that names the path of the field within `where`.
    """
    return cast(T, _decode(kind, value, where))


def _decode(hint: Any, value: object, where: str) -> object:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _dataclass(cast(type, hint), value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise BadInput(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
    if origin in (list, tuple) and isinstance(value, list):
        items = [_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict and isinstance(value, dict):
        return {str(key): _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _member(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise BadInput(f"{where}: {value!r} should be {getattr(hint, '__name__', hint)}; the file is damaged or not ours")


def _member(hint: type[StrEnum], value: object, where: str) -> object:
    if isinstance(value, str) and value in set(hint):
        return hint(value)
    raise BadInput(f"{where}: {value!r} is none of {', '.join(hint)}")


def _union(arguments: tuple[Any, ...], value: object, where: str) -> object:
    if value is None and type(None) in arguments:
        return None
    return _decode(next(argument for argument in arguments if argument is not type(None)), value, where)


def _dataclass(kind: type, value: object, where: str) -> object:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: should be an object with fields, not {type(value).__name__}")
    hints = get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            given[field.name] = _decode(hints[field.name], value[field.name], f"{where}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadInput(f"{where}: the field {field.name!r} is missing; the file is cut short or not ours")
    return kind(**given)
