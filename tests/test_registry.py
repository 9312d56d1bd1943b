"""Names, titles and aliases find their entry; options are read from the signature and checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Literal

import pytest

from fewstep import errors
from fewstep.errors import InvalidInputError, UnknownNameError, unknown_name
from fewstep.registry import Entry, Option, Registry
from fewstep.samplers.registry import SAMPLERS
from fewstep.schedulers import SCHEDULERS


def method(
    x: object,
    eta: Annotated[float, Option("share of fresh noise", 0.0, 1.0)] = 0.5,
    order: Annotated[int, Option("order of the method", 1, 3)] = 2,
    clip: Annotated[bool, Option("whether to clip")] = False,
    kind: Annotated[Literal["bh1", "bh2"], Option("variant")] = "bh2",
    tries: Annotated[Literal[1, 2, 4], Option("how often")] = 1,
    label: Annotated[str, Option("any text")] = "none",
    shift: Annotated[float, Option("any number")] = 0.0,
    scale: Annotated[float, Option("at least zero", 0.0)] = 1.0,
    hidden: int = 3,
) -> None:
    """Do one thing.

    And more lines.
    """


def registry() -> Registry[Entry]:
    made: Registry[Entry] = Registry("method", Entry)
    made.add("dpm_2m", method, title="DPM++ 2M", paper="none", aliases=("MethodScheduler",))
    return made


ENTRY = registry().find("dpm_2m")
OPTIONS = {option.name: option for option in ENTRY.options}


@pytest.mark.parametrize("kind", [SCHEDULERS, SAMPLERS], ids=["schedulers", "samplers"])
def test_every_spelling_finds_its_entry(kind: Registry[Entry]) -> None:
    assert len(kind) == len(kind.names()) == len(list(kind)) > 0
    for entry in kind:
        for name in (entry.name, entry.title, *entry.aliases):
            for spelling in (
                name,
                name.upper(),
                name.lower(),
                name.replace("_", "-"),
                f" {name} ",
            ):
                assert kind.find(spelling) is entry


def test_every_entry_says_what_it_is() -> None:
    for entry in (*SCHEDULERS, *SAMPLERS):
        assert entry.summary.endswith((".", "`."))
        assert entry.paper
        signature = inspect.signature(entry.function).parameters
        assert [option.name for option in entry.options] == list(signature)[2:]
        for option in entry.options:
            assert option.description
            assert option.checked(option.default, entry.name) == option.default
            assert option.checked(str(option.default), entry.name) == option.default


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("DPM++ 2M", "dpmpp_2m"),
        ("dpm++_2m", "dpmpp_2m"),
        ("DPMpp-2M", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DDIMScheduler", "ddim"),
        ("DDPMScheduler", "ddpm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("Euler a", "euler_ancestral"),
        ("euler_a", "euler_ancestral"),
        ("HeunDiscreteScheduler", "heun"),
        ("UniPCMultistepScheduler", "unipc"),
        ("uni_pc", "unipc"),
    ],
)
def test_samplers_by_the_names_of_other_tools(spelling: str, name: str) -> None:
    assert SAMPLERS.find(spelling).name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("Karras", "karras"), ("DDIM-uniform", "ddim_uniform"), ("lu", "exponential")],
)
def test_schedulers_by_the_names_of_other_tools(spelling: str, name: str) -> None:
    assert SCHEDULERS.find(spelling).name == name


@pytest.mark.parametrize("taken", ["dpm_2m", "DPM-2m", "dpm++ 2m", "methodscheduler"])
@pytest.mark.parametrize("place", ["name", "title", "alias"])
def test_a_name_is_given_once(taken: str, place: str) -> None:
    made = registry()
    names = {"name": "new", "title": "New", "alias": "newer", place: taken}
    with pytest.raises(InvalidInputError) as caught:
        made.add(names["name"], method, title=names["title"], paper="", aliases=(names["alias"],))
    for part in (f"method name {taken!r} of", "taken by dpm_2m", "choose another"):
        assert part in str(caught.value)
    assert made.names() == ["dpm_2m"]
    for name in set(names.values()) - {taken}:  # a refused entry leaves nothing behind
        with pytest.raises(UnknownNameError):
            made.find(name)
    assert made.find(taken).name == "dpm_2m"


def test_a_plus_counts_and_two_may_be_written_pp() -> None:
    made = registry()
    assert made.find("dpmpp-2m") is made.find("DPM++ 2M")
    made.add("ays", method, title="AYS", paper="")
    made.add("ays+", method, title="AYS+", paper="")
    assert made.find("AYS +").name == "ays+"
    assert made.find("Ays").name == "ays"


def test_spellings_of_one_entry_may_agree() -> None:
    made: Registry[Entry] = Registry("method", Entry)
    made.add("two_m", method, title="Two M", paper="", aliases=("two-m", "TWOM"))
    assert made.find("twom").name == "two_m"


@pytest.mark.parametrize("name", ["dpm_3m", "", "   ", None, 5])
def test_unknown_names(name: object) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry().find(name)  # type: ignore[arg-type]
    assert f"unknown method {str(name)!r}" in str(caught.value)
    assert "Known: dpm_2m. List them with: fewstep methods" in str(caught.value)
    if name == "dpm_3m":
        assert "did you mean 'dpm_2m'?" in str(caught.value)


def test_metadata_is_read_from_the_function() -> None:
    assert ENTRY.summary == "Do one thing."
    assert ENTRY.function is method
    assert list(OPTIONS) == [
        *("eta", "order", "clip", "kind", "tries", "label", "shift", "scale"),
    ]
    eta = OPTIONS["eta"]
    assert (eta.default, eta.kind, eta.low, eta.high) == (0.5, float, 0.0, 1.0)
    assert eta.description == "share of fresh noise"
    assert OPTIONS["order"].kind is int
    assert OPTIONS["clip"].kind is bool
    assert (OPTIONS["kind"].kind, OPTIONS["kind"].choices) == (str, ("bh1", "bh2"))
    assert (OPTIONS["tries"].kind, OPTIONS["tries"].choices) == (int, (1, 2, 4))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eta", "a number in 0..1"),
        ("order", "a whole number in 1..3"),
        ("clip", "true or false"),
        ("kind", "one of bh1, bh2"),
        ("tries", "one of 1, 2, 4"),
        ("shift", "a number"),
        ("scale", "a number >= 0"),
    ],
)
def test_legal_values_in_words(name: str, words: str) -> None:
    assert OPTIONS[name].allowed == words


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("eta", "0.25", 0.25),
        ("eta", "1", 1.0),
        ("eta", 1, 1.0),
        ("shift", "-7.0", -7.0),
        ("shift", "1e-3", 1e-3),
        ("order", "3", 3),
        ("order", 3.0, 3),
        ("clip", "true", True),
        ("clip", "False", False),
        ("clip", "yes", True),
        ("clip", "0", False),
        ("clip", True, True),
        ("clip", 0, False),
        ("kind", "bh1", "bh1"),
        ("tries", "4", 4),
        ("label", "text", "text"),
    ],
)
def test_values_are_converted(name: str, value: object, expected: object) -> None:
    resolved = ENTRY.resolve({name: value})
    assert resolved[name] == expected
    assert type(resolved[name]) is type(expected)
    others = {n: o.default for n, o in OPTIONS.items() if n != name}
    assert {n: v for n, v in resolved.items() if n != name} == others


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eta", 1.01),
        ("eta", -1e-9),
        ("eta", math.nan),
        ("eta", "much"),
        ("eta", None),
        ("eta", [0.5]),
        ("eta", "10" * 400),
        ("order", 0),
        ("order", 4),
        ("order", 1.5),
        ("order", "2.5"),
        ("order", math.inf),
        ("order", math.nan),
        ("clip", "maybe"),
        ("clip", 2),
        ("clip", None),
        ("kind", "bh3"),
        ("kind", None),
        ("tries", 3),
        ("tries", "two"),
        ("scale", -0.5),
    ],
)
def test_illegal_values_are_named_with_the_legal_ones(name: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ENTRY.resolve({name: value})
    option = OPTIONS[name]
    assert str(caught.value) == (
        f"dpm_2m: {name}={value!r} is not {option.allowed} (default {option.default})"
    )


@pytest.mark.parametrize("name", ["ordr", "hidden", "x"])
def test_options_that_do_not_exist(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        ENTRY.resolve({name: 1})
    assert f"unknown option of dpm_2m {name!r}" in str(caught.value)
    assert "Known: clip, eta, kind, label, order, scale, shift, tries" in str(caught.value)
    assert ("did you mean 'order'" in str(caught.value)) == (name == "ordr")


def test_unknown_name_says_what_is_near_what_is_known_and_what_to_do() -> None:
    error = unknown_name("model", "Digts", ["digits", "fashion"], "Train one.")
    assert str(error) == (
        "unknown model 'Digts'; did you mean 'digits'? Known: digits, fashion. Train one."
    )
    assert str(unknown_name("model", "zzz", ["a"])) == "unknown model 'zzz'; Known: a"
    assert str(unknown_name("model", "zzz", [])) == "unknown model 'zzz'; Known: none"


def test_one_hierarchy_that_builtin_handlers_catch_too() -> None:
    raised = [
        member
        for _, member in inspect.getmembers(errors, inspect.isclass)
        if member.__module__ == errors.__name__
    ]
    assert len(raised) > 5
    assert all(issubclass(member, errors.FewstepError) for member in raised)
    for member, builtin in {
        InvalidInputError: ValueError,
        UnknownNameError: LookupError,
        errors.NonFiniteError: ArithmeticError,
        errors.CheckpointError: OSError,
        errors.CheckFailedError: AssertionError,
    }.items():
        assert issubclass(member, builtin)


class Table:
    """Something that is kept in files."""

    @classmethod
    def load(cls, path: str) -> Table:
        if path != "there":
            raise errors.CheckpointError(f"{path} does not exist")
        return cls()


def learned(
    rule: Annotated[Callable[[float], float] | None, Option("any rule")] = None,
    points: Annotated[tuple[float, ...], Option("points", 0, 1)] = (0.5,),
    table: Annotated[Table | None, Option("a table")] = None,
) -> None:
    """Take what was learned."""


def learned_entry() -> Entry:
    made: Registry[Entry] = Registry("method", Entry)
    return made.add("learned", learned, title="Learned", paper="none")


def test_options_may_be_functions_lists_and_files() -> None:
    entry = learned_entry()
    assert entry.resolve({}) == {"rule": None, "points": [0.5], "table": None}
    for given in ("0.25, 1", "[0.25, 1]", [0.25, 1], (0.25, 1.0)):
        assert entry.resolve({"points": given})["points"] == [0.25, 1.0]
    assert entry.resolve({"points": 1})["points"] == [1.0]
    resolved = entry.resolve({"rule": math.sqrt, "table": "there"})
    assert resolved["rule"] is math.sqrt
    assert isinstance(resolved["table"], Table)
    assert entry.resolve({"table": resolved["table"]}) == {**resolved, "rule": None}
    assert entry.resolve({"rule": None, "table": None}) == entry.resolve({})


def test_their_legal_values_are_said_in_words() -> None:
    words = [option.allowed for option in learned_entry().options]
    assert words == ["a function", "a list of numbers in 0..1", "a Table or the file of one"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "sqrt"}, r"rule='sqrt' is not a function \(default None\)"),
        ({"points": [0.5, 2]}, r"points=\[0.5, 2\] is not a list of numbers in 0..1"),
        ({"points": []}, "is not a list of numbers"),
        ({"points": "a,b"}, "is not a list of numbers"),
        ({"points": None}, "is not a list of numbers"),
        ({"points": math.nan}, "is not a list of numbers"),
    ],
)
def test_other_values_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        learned_entry().resolve(given)


def test_a_file_that_is_missing_says_so_itself() -> None:
    with pytest.raises(errors.CheckpointError, match="nowhere does not exist"):
        learned_entry().resolve({"table": "nowhere"})
