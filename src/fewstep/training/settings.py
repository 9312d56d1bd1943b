"""What a setting may be, said once: values are checked by it, and the options of the command are made from it."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fewstep.errors import InvalidInputError, unknown_name

GROUPS = ("Images", "Network", "Objective", "Weights", "Speed", "Run")


@dataclass(frozen=True)
class Whole:
    """A whole number of at least ``least``.

    >>> Whole(1).check("steps", 5)
    """

    least: int

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.least:
            raise InvalidInputError(
                f"{name} = {value!r} is not allowed; give a whole number of at least {self.least}"
            )


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``; the ends belong to it where they are not open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        number = (
            value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        )
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        if above and below and math.isfinite(number):
            return
        interval = f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        raise InvalidInputError(f"{name} = {value!r} is not allowed; give a number in {interval}")


@dataclass(frozen=True)
class OneOf:
    """One of some names."""

    names: tuple[str, ...]

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if value not in self.names:
            raise unknown_name(name, value, self.names)


@dataclass(frozen=True)
class Numbers:
    """A fixed count of numbers, each of one range."""

    count: int
    each: Number

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, list | tuple) or len(value) != self.count:
            raise InvalidInputError(
                f"{name} = {value!r} is not allowed; give {self.count} numbers"
            )
        for number in value:
            self.each.check(name, number)


@dataclass(frozen=True)
class Each:
    """Any count of different numbers, none too, each of one range."""

    each: Number

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, list | tuple) or len(set(value)) < len(value):
            raise InvalidInputError(
                f"{name} = {value!r} is not allowed; give a list of different numbers"
            )
        for number in value:
            self.each.check(name, number)


@dataclass(frozen=True)
class Text:
    """A piece of text, or a path."""

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, str | os.PathLike):
            raise InvalidInputError(f"{name} = {value!r} is not allowed; give text or a path")


@dataclass(frozen=True)
class Options:
    """Names and values.

    Args:
        example: What the message gives as an example; if it has a ``name``, so must every value.
    """

    example: Mapping[str, Any]

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, Mapping) or ("name" in self.example and "name" not in value):
            raise InvalidInputError(
                f"{name} = {value!r} is not allowed; give names and values, such as {dict(self.example)}"
            )


@dataclass(frozen=True)
class Switch:
    """True or False."""

    def check(self, name: str, value: object) -> None:
        """Refuse other values, by the name of the setting."""
        if not isinstance(value, bool):
            raise InvalidInputError(f"{name} = {value!r} is not allowed; give True or False")


@dataclass(frozen=True)
class Setting:
    """What a field of the settings means.

    Args:
        help: A sentence for the help of the command and the table of the docs.
        allowed: What values may be; None: checked elsewhere, and a switch where the default is True or False.
        group: One of `GROUPS`.
        decides: Whether the trained weights depend on it; a run goes on under other values of the rest.
        advice: Sensible values, as markdown for the table of the docs.
    """

    help: str
    allowed: Whole | Number | OneOf | Numbers | Each | Text | Options | Switch | None = None
    group: str = "Run"
    decides: bool = True
    advice: str = ""


@functools.cache
def settings_of(config: type) -> dict[str, Setting]:
    """Return what each field of a dataclass means that is annotated with a `Setting`, by name, in order.

    >>> @dataclass
    ... class Config:
    ...     steps: Annotated[int, Setting("Updates.", Whole(1))] = 5
    >>> settings_of(Config)["steps"].help
    'Updates.'
    """
    hints = get_type_hints(config, include_extras=True)
    return {
        field.name: get_args(hints[field.name])[1]
        for field in dataclasses.fields(config)
        if get_origin(hints[field.name]) is Annotated
    }


def check_settings(config: Any) -> None:
    """Refuse values that are not allowed; None is, where it is the default.

    Args:
        config: A dataclass whose fields are annotated with `Setting`.

    Raises:
        InvalidInputError: The message names the setting, its value and what is allowed.
    """
    settings = settings_of(type(config))
    for field in dataclasses.fields(config):
        value, setting = getattr(config, field.name), settings.get(field.name)
        if setting is None or (value is None and field.default is None):
            continue
        allowed = setting.allowed or (Switch() if isinstance(field.default, bool) else None)
        if allowed is not None:
            allowed.check(field.name, value)
