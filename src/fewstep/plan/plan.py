"""The Plan: a sampler's coefficient table on one grid."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.plan.executor import DenoiserLike, NoiseSource, Progress, execute
from fewstep.plan.instructions import (
    CALLS,
    Combine,
    Denoise,
    Differentiate,
    Draw,
    Instruction,
    reads,
    writes,
)
from fewstep.plan.lowering import LinearForm, Program, lower
from fewstep.plan.rules import broken_rules
from fewstep.plan.tape import Tape, Vector
from fewstep.process import Level, Process, from_dict

if TYPE_CHECKING:
    from fewstep.plan.analysis import Influence, Stability
    from fewstep.plan.parallel import ParallelResult, Round

FORMAT, VERSION = "fewstep-plan", 1


class GridLike(Protocol):
    """What a Plan needs to know of a grid."""

    @property
    def process(self) -> Process: ...
    @property
    def levels(self) -> tuple[Level, ...]: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Plan:
    """A sampler traced on one grid: instructions over registers, with float64 coefficients. It holds no state.

    A Plan checks itself when it is made: registers are written once and before they are read, and the result is on
    the right marginal for a data set of one point (the signal and noise rules), unless the sampler declares otherwise.

    Attributes:
        instructions: The program.
        result: The register that holds the result.
        levels: The grid's levels, noisy to clean.
        process: The forward process that the levels belong to.
        sampler: Name of the sampler.
        options: The sampler's options.
        scheduler: Name of the scheduler.
        scheduler_options: The scheduler's options.
        inexact: The rules that the sampler declares that it breaks.

    Raises:
        InvalidInputError: If the program is malformed or breaks a rule that is not declared.
    """

    instructions: tuple[Instruction, ...]
    result: int
    levels: tuple[Level, ...]
    process: Process
    sampler: str = "custom"
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "custom"
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    inexact: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if fault := _fault(self.instructions, self.result, self.levels):
            raise InvalidInputError(f"plan {self.name}: {fault}")
        for rule, why in broken_rules(
            self.instructions, self.result, self.levels[0], self.levels[-1]
        ):
            if rule not in self.inexact:
                raise InvalidInputError(
                    f"plan {self.name} breaks the {rule} rule: {why}; correct the sampler's coefficients, or let it "
                    f"call tape.declare_inexact({rule!r}) if that is meant"
                )

    @property
    def name(self) -> str:
        """Sampler, scheduler and number of steps."""
        return f"{self.sampler}/{self.scheduler}-{len(self.levels) - 1}"

    @cached_property
    def calls(self) -> int:
        """Network calls for one sample; a guided denoiser's second half is not counted."""
        return sum(isinstance(i, CALLS) for i in self.instructions)

    @cached_property
    def draws(self) -> int:
        """Noise draws after the start; 0 means deterministic."""
        return sum(isinstance(i, Draw) for i in self.instructions)

    def lowered(self, form: LinearForm | None) -> Program:
        """The program for networks of one kind; see `fewstep.plan.lowering`. Worked out once for each kind."""
        if form not in self._lowered:
            self._lowered[form] = lower(self.instructions, self.result, form)
        return self._lowered[form]

    @cached_property
    def _lowered(self) -> dict[LinearForm | None, Program]:
        return {}

    def run(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        noise: NoiseSource | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """Carry x from the first level of the grid to the last.

        Args:
            denoiser: A `fewstep.Denoiser`, or any callable `(x, level) -> x_0 estimate`.
            x: The point at the first level, shape (B, ...): `sigma * noise`, plus `alpha * x_0` when starting from
                data. State is kept in float32, or in float64 if x is float64, whatever the network's type.
            noise: A `fewstep.Noise`, or any callable `(from_level, to_level) -> standard normal tensor` of x's shape.
                Needed when `draws > 0`.
            on_step: Called after each network call with a `Progress`.

        Returns:
            The point at the last level, in the shape of x.

        Raises:
            InvalidInputError: If noise is needed and missing, or x is not a floating-point tensor.
            NonFiniteError: If a NaN or infinity appears; names the component, the call and the level.
        """
        return execute(self, denoiser, x, noise, on_step)

    def run_parallel(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        noise: NoiseSource | None = None,
        *,
        window: int | None = None,
        tolerance: float = 1e-3,
        on_round: Callable[[Round], None] | None = None,
    ) -> ParallelResult:
        """Carry x from the first level to the last in few rounds of the network, each with many calls in one batch.

        The result is that of `run` within the tolerance. After k rounds the first k calls are exact, so there are
        never more rounds than calls; on smooth models there are far fewer. All in all the network does more work than
        in a sequential run: this pays where a larger batch costs little more time, as on a GPU with few images.

        Args:
            denoiser: As for `run`. With a method `many(x, levels)`, as all of Fewstep have, the calls of a round are
                one batch; otherwise they are made one by one. It must not remember earlier calls.
            x: As for `run`.
            noise: As for `run`; each draw is made once.
            window: Largest number of calls that are evaluated at once, >= 1; by default a third of all, at least 8. A
                larger one takes somewhat fewer rounds and many more calls. Images that move on at different pace may
                have some more evaluated at once. Memory is that of a network call with `window` times the images, and
                some 8 tensors of that size.
            tolerance: How far the result may be from that of `run`, as root mean square over an image, >= 0. A call is
                done when its point moved by at most `tolerance * sigma / 100` since it was evaluated. That
                bounds the result's distance on smooth models; one that carries nearby points to different images can
                end further off. 0 asks for the result of `run` up to rounding. A network in bfloat16 has rounding of
                its own, and needs 0.03 or so.
            on_round: Called after each round with a `Round`.

        Returns:
            The point at the last level, the rounds and the network calls. An image does not depend on the others.

        Raises:
            InvalidInputError: As for `run`; or if the Plan asks for derivatives, an argument is out of range, or the
                denoiser remembers earlier calls.
            NonFiniteError: If the network gives a NaN or infinity; names the call and the level.

        Source: Shih et al. 2023, arXiv 2305.16317.
        """
        from fewstep.plan.parallel import run_parallel

        return run_parallel(self, denoiser, x, noise, window, tolerance, on_round)

    def influence(self, spread: float = 1.0) -> Influence:
        """How strongly each network call reaches the result.

        Written out, the result is `R start + sum B_k D_k + sum E_m noise_m`. The *direct* weights are B: what an
        error in one estimate does if all later ones stay as they are. But they do not: the *total* weights are the
        derivatives of the result where the estimates follow, for data that are normal with standard deviation
        `spread` along the direction of the error.

        Args:
            spread: Standard deviation of the data, > 0.

        Returns:
            Both, for each answer of the network, the start and the draws; `print` shows a table.

        Raises:
            InvalidInputError: If spread is not a finite number > 0.

        >>> import fewstep as fs
        >>> plan = fs.plan("ddim", fs.Grid.from_ratios(fs.process.edm(), [3, 2, 1]))
        >>> print(plan.influence().direct.answers.round(3))
        [0.167 0.5  ]
        """
        from fewstep.plan.analysis import influence

        return influence(self, spread)

    def stability(self, spreads: Sequence[float] | None = None) -> Stability:
        """How errors of the start and of the network grow, as multiples of how they grow in the exact solution.

        Data that are normal make the estimates linear, so the answer is exact for them: `start`, `width` and `errors`
        for each spread, and the largest factor of all.

        Args:
            spreads: Standard deviations of the data, > 0; by default 51 from 0.001 to 100.

        Returns:
            The factors; `print` shows the largest ones.

        Raises:
            InvalidInputError: If a spread is not a finite number > 0.

        >>> import fewstep as fs
        >>> grid = fs.schedulers.karras(fs.process.vp_linear(), steps=5)
        >>> [round(fs.plan(name, grid).stability().factor, 1) for name in ("ddim", "dpmpp_2m", "heun")]
        [0.9, 1.2, 11.3]
        """
        from fewstep.plan.analysis import SPREADS, stability

        return stability(self, SPREADS if spreads is None else spreads)

    def describe(self) -> str:
        """The Plan as text to read: names and options, rules, a table of its steps, influence and stability."""
        from fewstep.plan.analysis import describe

        return describe(self)

    def to_dict(self) -> dict[str, Any]:
        """The Plan as plain data."""
        index: dict[Level, int] = {}
        for level in self.levels:
            index.setdefault(level, len(index))
        rows = [_row(i, index) for i in self.instructions]
        return {
            "format": FORMAT,
            "version": VERSION,
            "sampler": self.sampler,
            "options": dict(self.options),
            "scheduler": self.scheduler,
            "scheduler_options": dict(self.scheduler_options),
            "process": self.process.to_dict(),
            "inexact": list(self.inexact),
            "calls": self.calls,
            "grid": [index[level] for level in self.levels],
            "levels": [
                [_number(v) for v in (level.t, level.alpha, level.sigma)] for level in index
            ],
            "instructions": rows,
            "result": self.result,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Make a Plan from `to_dict()`.

        Raises:
            InvalidInputError: If the data is not a Plan, or a malformed one.
        """
        if not isinstance(data, Mapping):
            raise InvalidInputError(f"not a plan: {type(data).__name__} in place of an object")
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise InvalidInputError(
                f"not a plan of version {VERSION}: format={data.get('format')!r}, version={data.get('version')!r}"
            )
        try:
            levels = [Level(*map(float, row)) for row in data["levels"]]
            return cls(
                instructions=tuple(_instruction(row, levels) for row in data["instructions"]),
                result=int(data["result"]),
                levels=tuple(_pick(levels, i) for i in data["grid"]),
                process=from_dict(data["process"]),
                sampler=str(data["sampler"]),
                options=dict(data["options"]),
                scheduler=str(data["scheduler"]),
                scheduler_options=dict(data["scheduler_options"]),
                inexact=tuple(map(str, data["inexact"])),
            )
        except InvalidInputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidInputError(f"malformed plan: {type(error).__name__}: {error}") from error

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The Plan as JSON text, written to a file if a path is given; `from_json` gives it back bit for bit.

        Raises:
            InvalidInputError: If an option is not plain data, or the file cannot be written.
        """
        try:
            text = json.dumps(self.to_dict(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"plan {self.name} cannot be saved: {error}; its options must be finite numbers, texts or lists"
            ) from error
        if path is not None:
            try:
                Path(path).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise InvalidInputError(
                    f"cannot write a plan to {os.fspath(path)!r}: {error}"
                ) from error
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Plan:
        """Make a Plan from JSON text or from a file.

        Raises:
            InvalidInputError: If the text is not a Plan.
        """
        text = (
            source
            if isinstance(source, str) and source.lstrip().startswith("{")
            else _read(source)
        )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"not JSON: {error}") from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        return f"{self.name}: {self.calls} network calls, {self.draws} noise draws"


Sampler = Callable[..., Vector]


def trace(sampler: Sampler, grid: GridLike, name: str = "custom", **options: Any) -> Plan:
    """Run a sampler function `(tape, grid, **options) -> Vector` once on symbolic vectors.

    >>> from fewstep.process import edm
    >>> from fewstep.schedulers import karras
    >>> def jump(tape, grid):
    ...     t, s = grid.levels[0], grid.levels[-1]
    ...     return tape.denoise(tape.start, t)
    >>> print(trace(jump, karras(edm(), 1), "jump"))
    jump/karras-1: 1 network calls, 0 noise draws
    """
    tape = Tape()
    try:
        result = tape.finish(sampler(tape, grid, **options))
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise InvalidInputError(
            f"sampler {name} cannot run on this grid ({error}): it divides by zero, by an infinite step, or by one "
            "that rounding makes zero; spread the levels, or handle clean data and pure noise in the sampler"
        ) from error
    return Plan(
        instructions=tuple(tape.program),
        result=result,
        levels=tuple(grid.levels),
        process=grid.process,
        sampler=name,
        options=options,
        scheduler=grid.scheduler,
        scheduler_options=grid.options,
        inexact=tuple(sorted(tape.inexact)),
    )


def _fault(program: Sequence[Instruction], result: int, levels: Sequence[Level]) -> str | None:
    """What is wrong with the form of a program, if anything."""
    if len(levels) < 2:
        return f"a plan needs at least 2 levels, got {len(levels)}"
    for level in levels:
        if not (0 <= level.alpha < math.inf and 0 <= level.sigma < math.inf):
            return f"level {level} must have finite alpha and sigma >= 0; start at a level with finite noise"
    written = {0}
    for k, instruction in enumerate(program):
        if missing := [r for r in reads(instruction) if r not in written]:
            return f"instruction {k} reads register {missing[0]} before it is written"
        if again := [r for r in writes(instruction) if r in written]:
            return f"instruction {k} writes register {again[0]} again"
        if isinstance(instruction, Combine):
            if not instruction.terms:
                return f"instruction {k} adds up nothing"
            if bad := [c for _, c in instruction.terms if not math.isfinite(c)]:
                return f"instruction {k} has the coefficient {bad[0]}; all must be finite"
        written.update(writes(instruction))
    return None if result in written else f"the result register {result} is never written"


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot read a plan from {os.fspath(path)!r}: {error}") from error


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if abs(value) != float("inf") else str(value)


def _row(instruction: Instruction, index: dict[Level, int]) -> list[Any]:
    def place(level: Level) -> int:
        return index.setdefault(level, len(index))

    match instruction:
        case Combine(out, terms):
            return ["combine", out, [[register, c] for register, c in terms]]
        case Denoise(out, point, level, weak):
            return ["denoise", out, point, place(level), *([] if weak is None else [weak])]
        case Differentiate(out, point, along, level):
            return ["differentiate", out, point, along, place(level)]
        case Draw(out, start, end, lap):
            return ["draw", out, place(start), place(end), *([lap] if lap else [])]


def _pick(levels: list[Level], index: int) -> Level:
    if index < 0:
        raise IndexError(f"level {index}")
    return levels[index]


def _instruction(row: Any, levels: list[Level]) -> Instruction:
    match row:
        case ["combine", int(out), list(terms)]:
            return Combine(out, tuple((int(register), float(c)) for register, c in terms))
        case ["denoise", int(out), int(point), int(level)]:
            return Denoise(out, point, _pick(levels, level))
        case ["denoise", int(out), int(point), int(level), int(weak)]:
            return Denoise(out, point, _pick(levels, level), weak)
        case ["differentiate", int(out), int(point), int(along), int(level)]:
            return Differentiate(out, point, along, _pick(levels, level))
        case ["draw", int(out), int(start), int(end)]:
            return Draw(out, _pick(levels, start), _pick(levels, end))
        case ["draw", int(out), int(start), int(end), int(lap)]:
            return Draw(out, _pick(levels, start), _pick(levels, end), lap)
        case _:
            raise InvalidInputError(f"malformed plan: {row!r} is not an instruction")
