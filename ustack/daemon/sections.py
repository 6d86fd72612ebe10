"""TOML files as pydantic models: how one is read, and how a mistake in it is told.

A file is a model whose fields are values, sections (`[memory]`) and arrays of sections (`[[nbd]]`); a section of an array may
be of several kinds, told apart by a key. Every mistake gets one line that names the file, the place, the value and what is
allowed; for a key that there is not, the one that was probably meant.
"""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ustack.daemon.size import EXAMPLES, parse_size

if TYPE_CHECKING:
    import os

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


class ConfigError(Exception):
    """A file cannot be used. `problems` has one line for each reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Section(BaseModel):
    """What all sections have in common: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


SectionT = TypeVar("SectionT", bound=Section)


def as_size(value: object) -> object:
    """A string such as "64M" as bytes; everything else as it is. For `BeforeValidator`."""
    return parse_size(value) if isinstance(value, str) else value


# -- reading -----------------------------------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str]) -> str:
    """The file at `path`. Raises ConfigError."""
    try:
        return Path(path).read_text("utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None


def parse_toml(text: str, origin: str, model: type[SectionT]) -> SectionT:
    """`text` as a `model`; `origin` names it in messages. Raises ConfigError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{origin}: not TOML: {error}"]) from None
    return validate(raw, origin, model)


def validate(raw: dict[str, Any], origin: str, model: type[SectionT]) -> SectionT:
    """What a TOML file says, as a `model`; `origin` names the file in messages. Raises ConfigError."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([f"{origin}: {_say(detail, model)}" for detail in error.errors()]) from None


# -- saying what is wrong ----------------------------------------------------------------------------------------------------


def place(section: tuple[int | str, ...], key: str = "") -> str:
    """How the file spells a place: `[memory] size`, `[[nbd]] number 2, uri`, `about`."""
    if not section:
        return key
    if isinstance(section[-1], int):
        return f"[[{section[0]}]] number {section[-1] + 1}" + (f", {key}" if key else "")
    return f"[{'.'.join(str(part) for part in section)}]" + (f" {key}" if key else "")


def toml_value(value: object) -> str:
    """A value as the file spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(toml_value(each) for each in value)}]"
    return repr(value)


class _Spot:
    """Where in the file pydantic's location is: the section, the key in it, and the model of the section."""

    def __init__(self, model: type[BaseModel], location: tuple[int | str, ...]) -> None:
        self.model: Any = model
        self.section: tuple[int | str, ...] = ()
        self.key = ""
        variants: dict[str, Any] = {}
        for part in location:
            if self.key:
                break  # inside of a value
            if isinstance(part, int):
                self.section += (part,)
            elif part in variants:
                self.model, variants = variants[part], {}
            else:
                field: FieldInfo | None = None if self.model is None else self.model.model_fields.get(part)
                if (self.model is not None and (field is None or not (models := _models_in(field)))) or self.model is None:
                    self.key = part
                else:
                    assert field is not None
                    self.section += (part,)
                    self.model = models[0] if len(models) == 1 else None
                    variants = {name: each for each in models for tag in _tags(field) for name in _names(each, tag)}


def _models_in(field: FieldInfo) -> list[Any]:
    found: list[Any] = []
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        waiting += get_args(kind)
    return found


def _tags(field: FieldInfo) -> list[str]:
    """The key by which the kinds of a section are told apart, if there is one."""
    found = [field.discriminator] if isinstance(field.discriminator, str) else []
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop()
        found += [each.discriminator for each in get_args(kind) if isinstance(getattr(each, "discriminator", None), str)]
        waiting += get_args(kind)
    return found


def _names(model: Any, tag: str) -> tuple[str, ...]:
    """What `tag` says in a section of this kind."""
    return get_args(model.model_fields[tag].annotation)


def _say(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One of pydantic's errors as a sentence about the file."""
    spot = _Spot(model, detail["loc"])
    kind = detail["type"]
    value = detail["input"]
    if kind == "extra_forbidden":
        in_root = not spot.section
        known = list(spot.model.model_fields)
        is_section = in_root and (isinstance(value, dict | list) or all(_models_in(f) for f in model.model_fields.values()))
        what = place((spot.key,)) if is_section else place(spot.section, spot.key)
        close = get_close_matches(spot.key, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(known)}"
        return f"{what}: unknown {'section' if is_section else 'key'}; {hint}"
    if kind == "missing":
        last = detail["loc"][-1]
        many = len(detail["loc"]) == 1 and "list" in str(model.model_fields[str(last)].annotation)
        return f"{f'[[{last}]]' if many else place(spot.section, spot.key)} is missing"
    if kind == "union_tag_not_found":
        return f"{place(spot.section, str(detail['ctx']['discriminator']).strip(chr(39)))} is missing"
    if kind == "union_tag_invalid":
        return _say_unknown_kind(detail, spot)
    where = place(spot.section, spot.key)
    if not spot.key:
        return f"{where}: allowed is {_SHAPES.get(kind, _allowed(detail))}"
    return f"{where} = {toml_value(value)}: allowed is {_allowed(detail)}"


def _say_unknown_kind(detail: ErrorDetails, spot: _Spot) -> str:
    context = detail["ctx"]
    key = str(context["discriminator"]).strip("'")
    known = [each.strip(" '") for each in str(context["expected_tags"]).split(",")]
    close = get_close_matches(str(context["tag"]), known, 1)
    hint = f"did you mean {toml_value(close[0])}?" if close else f"allowed is one of {', '.join(map(toml_value, known))}"
    return f"{place(spot.section, key)} = {toml_value(context['tag'])}: {hint}"


_SHAPES: Final = {
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "list_type": "an array of tables, each beginning with the name in double brackets",
    "too_short": "exactly one",
    "too_long": "exactly one",
}

_TYPES: Final = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "int_from_float": "an integer",
    "list_type": "an array",
    "dict_type": "a table",
    "finite_number": "a finite number",
}


def _plain(bound: object) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _allowed(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            return str(context["expected"]).replace("'", '"')
        case "greater_than":
            return f"more than {_plain(context['gt'])}"
        case "greater_than_equal":
            return f"at least {_plain(context['ge'])}"
        case "less_than_equal":
            return f"at most {_plain(context['le'])}"
        case "less_than":
            return f"less than {_plain(context['lt'])}"
        case "string_too_short":
            return "a string that is not empty"
        case "string_too_long":
            return f"a string of at most {context['max_length']} characters"
        case "too_short":
            return f"an array of at least {context['min_length']}"
        case "too_long":
            return f"an array of at most {context['max_length']}"
        case kind:
            if detail["loc"][-1] in ("size", "reserve") or "mem_" in str(detail["loc"][-1]):
                return EXAMPLES
            return _TYPES.get(kind, detail["msg"])
