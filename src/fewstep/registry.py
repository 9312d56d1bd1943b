"""Named entries with metadata: what the command line, the docs and the error messages know of samplers and schedulers.

Options stand once, in the signature of the function, as `name: Annotated[type, Option(...)] = default`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Generic, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from fewstep.errors import InvalidInputError, unknown_name


@dataclass(frozen=True)
class Option:
    """What an option means and which values it takes; name, default and kind are read from the signature.

    The kinds are numbers, truth values, choices (`Literal`), lists of numbers (`tuple[float, ...]`, where one number
    stands for a list of one), functions (`Callable`), and classes that `load` an object from a file. The last two may
    be left out with None.

    Attributes:
        description: One line, with the unit.
        low: Smallest legal value, of each number where it is a list.
        high: Largest legal value.
    """

    description: str
    low: float = -math.inf
    high: float = math.inf
    name: str = ""
    default: Any = None
    kind: Any = float
    choices: tuple[Any, ...] = ()

    @property
    def allowed(self) -> str:
        """The legal values in words."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.kind not in _NOUNS:
            return f"a {self.kind.__name__} or the file of one"
        noun = _NOUNS[self.kind]
        if math.isinf(self.low) and math.isinf(self.high):
            return noun
        if math.isinf(self.high):
            return f"{noun} >= {self.low:g}"
        return f"{noun} in {self.low:g}..{self.high:g}"

    def checked(self, value: Any, owner: str) -> Any:
        """Return the value in the option's type, from text too.

        Raises:
            InvalidInputError: If it is not legal.
        """
        if self.default is None and str(value) == "None":
            return None
        try:
            result = self._converted(value)
        except (TypeError, ValueError, OverflowError):
            result = None
        if result is None or not self._allows(result):
            raise InvalidInputError(
                f"{owner}: {self.name}={value!r} is not {self.allowed} (default {self.default})"
            )
        return result

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if self.kind not in (int, float, list):
            return True
        numbers = value if self.kind is list else [value]
        return bool(numbers) and all(self.low <= number <= self.high for number in numbers)

    def _converted(self, value: Any) -> Any:
        if self.kind is bool:
            names = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
            return names.get(str(value).lower())
        if self.kind is int and not isinstance(value, str) and int(value) != value:
            return None
        if self.kind is list:
            parts = value.strip("[]").split(",") if isinstance(value, str) else value
            return [float(part) for part in (parts if isinstance(parts, Iterable) else [parts])]
        if self.kind is Callable:
            return value if callable(value) else None
        load = getattr(self.kind, "load", None)
        if load is None:
            return self.kind(value)
        return value if isinstance(value, self.kind) else load(value)


_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "any text",
    list: "a list of numbers",
    Callable: "a function",
}


@dataclass(frozen=True)
class Entry:
    """A registered function and its metadata.

    Attributes:
        name: The name in code and on the command line.
        title: The name as papers and menus write it.
        paper: Where it comes from.
        aliases: Other names that find it.
        presets: Names that find it with other defaults: for each the options that differ.
        function: What it does.
        summary: First line of its docstring.
        options: Its options.
    """

    name: str
    title: str
    paper: str
    function: Callable[..., Any]
    aliases: tuple[str, ...] = ()
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    summary: str = ""
    options: tuple[Option, ...] = ()

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with the given values checked and the defaults filled in.

        Raises:
            UnknownNameError: If an option does not exist.
            InvalidInputError: If a value is not legal.
        """
        known = {option.name: option for option in self.options}
        for name in given:
            if name not in known:
                raise unknown_name(f"option of {self.name}", name, known)
        return {
            name: option.checked(given[name], self.name) if name in given else option.default
            for name, option in known.items()
        }

    def preset(self, given: Mapping[str, Any]) -> Self:
        """The entry with other defaults.

        Raises:
            UnknownNameError: If an option does not exist.
            InvalidInputError: If a value is not legal.
        """
        defaults = self.resolve(given)
        options = [dataclasses.replace(o, default=defaults[o.name]) for o in self.options]
        return dataclasses.replace(self, options=tuple(options))


EntryT = TypeVar("EntryT", bound=Entry)


class Registry(Generic[EntryT]):
    """Entries by name and alias; names are compared without case, blanks, dashes and underscores."""

    def __init__(self, kind: str, entry_type: type[EntryT]) -> None:
        self.kind = kind
        self._type = entry_type
        self._entries: dict[str, EntryT] = {}
        self._by_key: dict[str, EntryT] = {}

    def add(self, name: str, function: Callable[..., Any], **metadata: Any) -> EntryT:
        """Register a function; its summary and options are read from docstring and signature."""
        entry = self._type(
            name=name,
            function=function,
            summary=(inspect.getdoc(function) or "").split("\n", 1)[0],
            options=tuple(_options(function)),
            **metadata,
        )
        meanings = [(spelling, entry) for spelling in (name, entry.title, *entry.aliases)]
        meanings += [(preset, entry.preset(given)) for preset, given in entry.presets.items()]
        by_key: dict[str, EntryT] = {}
        for spelling, meaning in meanings:
            taken = self._by_key.get(_key(spelling)) or by_key.get(_key(spelling))
            if taken is not None and taken is not meaning:
                raise InvalidInputError(
                    f"{self.kind} name {spelling!r} of {name} is taken by {taken.name}; choose another"
                )
            by_key[_key(spelling)] = meaning
        self._entries[name] = entry
        self._by_key.update(by_key)
        return entry

    def find(self, name: str) -> EntryT:
        """The entry of that name or alias; of a preset's name, the entry with the preset's defaults.

        Raises:
            UnknownNameError: With the nearest names.
        """
        entry = self._by_key.get(_key(str(name)))
        if entry is None:
            raise unknown_name(
                self.kind, name, self._entries, f"List them with: fewstep {self.kind}s"
            )
        return entry

    def __iter__(self) -> Iterator[EntryT]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c == "+").replace("++", "pp")


def _options(function: Callable[..., Any]) -> Iterator[Option]:
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        for extra in getattr(hints.get(parameter.name), "__metadata__", ()):
            if isinstance(extra, Option):
                base = _without_none(get_args(hints[parameter.name])[0])
                choices = get_args(base) if get_origin(base) is Literal else ()
                kind = type(choices[0]) if choices else get_origin(base) or base
                given = parameter.default
                yield dataclasses.replace(
                    extra,
                    name=parameter.name,
                    # Plans keep their options as JSON does: with lists.
                    default=list(given) if kind is tuple else given,
                    kind=list if kind is tuple else kind,
                    choices=choices,
                )


def _without_none(hint: Any) -> Any:
    """The type in `type | None`."""
    others = [part for part in get_args(hint) if part is not type(None)]
    return others[0] if isinstance(hint, UnionType) and len(others) == 1 else hint
