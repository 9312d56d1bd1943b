"""Samplers that can be run backwards exactly: EDICT, BDIA and O-BELM, and DDIM inversion, which is not exact.

Exact inversion gives the noise that a picture would come from, such that sampling from it gives the picture back.
A method can do so if each step determines the one before it, which takes two states instead of one: two points of one
level (EDICT), or the points of two neighbouring levels (BDIA, BELM). `encode` carries data up to noise and keeps both
states, `decode` brings them down again:

>>> import torch, fewstep as fs
>>> denoiser = fs.exact.GaussianMixture(torch.zeros(1, 2).double(), 1.0, process=fs.process.edm())
>>> grid = fs.schedulers.karras(denoiser.process, steps=20)
>>> x0 = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
>>> encoding = encode("belm", denoiser, x0, grid)
>>> bool((decode(encoding, denoiser) - x0).abs().max() < 1e-10)
True

The round trip is as exact as the arithmetic: use float64, and a denoiser that gives the same answer to the same
question. Dropout, guidance with momentum and batches of another size do not. As samplers, the same methods start from
one state, and are registered like all others.

All of it works in `x^ = x / alpha` over `r = sigma / alpha`, where every forward process is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.errors import InvalidInputError
from fewstep.plan import Tape, Vector
from fewstep.plan.eager import EagerTape
from fewstep.plan.executor import DenoiserLike, checked_start
from fewstep.process import Level
from fewstep.registry import Option
from fewstep.samplers.registry import SAMPLERS, sampler
from fewstep.samplers.steps import exponential_step, noise_estimate, noise_step
from fewstep.schedulers import Grid

V = TypeVar("V", Vector, Tensor)
Levels = Sequence[Level]
Pair = tuple[V, V]


class _Tape(Protocol[V]):
    """What the methods need of a tape, which may work on vectors or on tensors."""

    start: V

    def denoise(self, x: V, level: Level, /) -> V: ...

    def settle(self, x: V, /) -> V: ...


# ---- the two methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Coupled:
    """EDICT: two points that take turns, each stepping along the noise of the other, and are mixed after each step.

    Attributes:
        mix: Share of itself that a point keeps.
        alternate: Whether the points take turns in going first.
    """

    mix: float
    alternate: bool

    def sample(self, tape: _Tape[V], levels: Levels) -> V:
        """From one point, which stands for both."""
        x, levels = _out_of_pure_noise(tape, levels)
        return self.down(tape, levels, (x, x))

    def down(self, tape: _Tape[V], levels: Levels, states: Pair[V]) -> V:
        """From both points at the first level to the first of them at the last."""
        x, y = states
        for i, (t, s) in enumerate(zip(levels, levels[1:], strict=False)):
            first, second = (y, x) if self._swaps(i) else (x, y)
            first = noise_step(first, _noise_at(tape, second, t, t), t, s)
            second = noise_step(second, _noise_at(tape, first, s, t), t, s)
            x, y = (second, first) if self._swaps(i) else (first, second)
            x = tape.settle(self.mix * x + (1 - self.mix) * y)
            y = tape.settle(self.mix * y + (1 - self.mix) * x)
        return x

    def up(self, tape: _Tape[V], levels: Levels, x: V) -> Pair[V]:
        """Each line of `down` undone, from one point at the last level, which stands for both."""
        y = x
        for i in reversed(range(len(levels) - 1)):
            t, s = levels[i : i + 2]
            y = (y - (1 - self.mix) * x) / self.mix
            x = (x - (1 - self.mix) * y) / self.mix
            first, second = (y, x) if self._swaps(i) else (x, y)
            second = noise_step(second, _noise_at(tape, first, s, t), s, t)
            first = noise_step(first, _noise_at(tape, second, t, t), s, t)
            x, y = (second, first) if self._swaps(i) else (first, second)
        return x, y

    def _swaps(self, step: int) -> bool:
        return self.alternate and step % 2 == 1


def _noise_at(tape: _Tape[V], x: V, level: Level, t: Level) -> V:
    """The noise that the network, asked at t, finds in a point of another level, whose `x^` it is given."""
    point = x if level is t else (t.alpha / level.alpha) * x
    return noise_estimate(point, tape.denoise(point, t), t)


@dataclass(frozen=True)
class TwoStep:
    """BDIA and BELM: a DDIM step, and a share of what the DDIM step back to the level before would miss.

    With e the noise estimated at t: `x^_s = x^ + (r_s - r_t) e + share (x^_before - x^ - (r_before - r_t) e)`. This has
    the same form seen from the other end, where the share is its inverse.

    Attributes:
        share: The share, from the levels before, t and s.
    """

    share: Callable[[Level, Level, Level], float]

    def sample(self, tape: _Tape[V], levels: Levels) -> V:
        """From one point: the first step is one of DDIM."""
        x, levels = _out_of_pure_noise(tape, levels)
        if len(levels) == 1:
            return x
        t, s = levels[:2]
        return self.down(tape, levels, (x, exponential_step(x, tape.denoise(x, t), t, s)))

    def down(self, tape: _Tape[V], levels: Levels, states: Pair[V]) -> V:
        """From the points at the first two levels to the last."""
        return _walk(tape, levels, self.share, states)[1]

    def up(self, tape: _Tape[V], levels: Levels, x: V) -> Pair[V]:
        """From the last level to the points at the first two, beginning with a step of DDIM inversion."""
        begun = x, _ddim_up(tape, x, levels[-1], levels[-2])
        second, first = _walk(
            tape, levels[::-1], lambda before, t, s: 1 / self.share(s, t, before), begun
        )
        return first, second


def _walk(
    tape: _Tape[V], levels: Levels, share: Callable[[Level, Level, Level], float], states: Pair[V]
) -> Pair[V]:
    """The recursion of `TwoStep` along levels that fall or rise, to the points at the last two."""
    earlier, x = states
    for before, t, s in zip(levels, levels[1:], levels[2:], strict=False):
        noise = noise_estimate(x, tape.denoise(x, t), t)
        missed = earlier - noise_step(x, noise, t, before)
        weight = share(before, t, s) * s.alpha / before.alpha
        earlier, x = x, noise_step(x, noise, t, s) + weight * missed
    return earlier, x


def _out_of_pure_noise(tape: _Tape[V], levels: Levels) -> tuple[V, Levels]:
    """The start and its levels; after a step of DDIM if that is pure noise, where `x^` is infinite."""
    x = tape.start
    if not levels[0].is_pure_noise:
        return x, levels
    t, s = levels[:2]
    return exponential_step(x, tape.denoise(x, t), t, s), levels[1:]


def _ddim_up(tape: _Tape[V], x: V, t: Level, s: Level) -> V:
    """A DDIM step to the noisier level s. At clean data no network can be asked: then it is, at s, about the data."""
    if t.is_clean:
        denoised = x / t.alpha
        noise = noise_estimate(s.alpha * denoised, tape.denoise(s.alpha * denoised, s), s)
    else:
        denoised = tape.denoise(x, t)
        noise = noise_estimate(x, denoised, t)
    return s.alpha * denoised + s.sigma * noise


LARGEST_SHARE = 1e4
"""Where a step is a hundred times the one before: a parabola drawn out further would only magnify rounding."""


def optimal_share(before: Level, t: Level, s: Level) -> float:
    """The share that makes `TwoStep` exact for parabolas: `((r_s - r_t) / (r_t - r_before))^2`, up to `LARGEST_SHARE`.

    Source: Wang et al. 2024, arXiv 2410.07273.
    """
    return min(((s.ratio - t.ratio) / (t.ratio - before.ratio)) ** 2, LARGEST_SHARE)


METHODS: Mapping[str, Callable[..., Coupled | TwoStep]] = {
    "edict": Coupled,
    "bdia": lambda gamma: TwoStep(lambda before, t, s: gamma),
    "belm": lambda: TwoStep(optimal_share),
}


# ---- as samplers -----------------------------------------------------------------------------

Mix = Annotated[float, Option("share of itself that each of the two points keeps", 0.5, 1)]
Alternate = Annotated[bool, Option("let the two points take turns in going first")]
Gamma = Annotated[
    float,
    Option(
        "share of the step before that is taken back: 1 can be undone exactly, 0.5 is smoother",
        0.01,
        1,
    ),
]


@sampler(
    "edict",
    title="EDICT",
    family="implicit",
    calls_per_step=2,
    paper="Wallace, Gokul, Naik 2023, arXiv:2211.12446",
    aliases=("EDICTPipeline",),
)
def edict(tape: Tape, grid: Grid, mix: Mix = 0.93, alternate: Alternate = True) -> Vector:
    """Two coupled DDIM runs, each stepping along the noise of the other, so that each step can be undone.

    One of the two calls of a step asks the network at t about a point that is at s already. The paper hands it over at
    the scale of s, here it is brought to that of t, so that all processes give the same; where alpha is 1 both agree.
    Backwards, each step takes the two points `1 / mix^2` times further apart: for many steps take a mix near 1.
    """
    tape.declare_inexact("noise")
    return METHODS["edict"](mix=mix, alternate=alternate).sample(tape, grid.levels)


@sampler(
    "bdia",
    title="BDIA",
    family="implicit",
    paper="Zhang, Lewis, Kleijn 2024, arXiv:2307.10829",
    aliases=("BDIA-DDIM",),
)
def bdia(tape: Tape, grid: Grid, gamma: Gamma = 1.0) -> Vector:
    """DDIM that takes back a share of the step before and makes it anew from the middle; the leapfrog for gamma = 1.

    `x^_s = x^ + (r_s - r_t) e + gamma (x^_before - x^ - (r_before - r_t) e)`. The paper writes this for x, which where
    alpha is 1 is the same; elsewhere its gamma is ours times `alpha_s / alpha_before`. With gamma = 1 the order is two
    on grids whose steps change smoothly, else one, since the leapfrog takes both of its steps for equal; O-BELM does
    not. Below 1 the order is one, and backwards each step multiplies rounding by `1 / gamma`.
    """
    return METHODS["bdia"](gamma=gamma).sample(tape, grid.levels)


@sampler(
    "belm",
    title="O-BELM",
    family="implicit",
    order=2,
    paper="Wang et al. 2024, arXiv:2410.07273",
    aliases=("BELM",),
)
def belm(tape: Tape, grid: Grid) -> Vector:
    """The parabola through the earlier point, the point and its slope, on to the next level.

    The first step is one of DDIM, whose error is not damped. On grids whose steps change smoothly the order is two all
    the same; on others it is so while that error is small, as it is on grids that begin at nearly pure noise.
    """
    return METHODS["belm"]().sample(tape, grid.levels)


# ---- there and back on tensors ---------------------------------------------------------------


@dataclass(frozen=True)
class Encoding:
    """Data carried up to noise, with all that is needed to bring it back.

    Attributes:
        sampler: Name of the method.
        options: Its options.
        grid: The levels.
        states: Both points: EDICT's at the first level, or the points at the first two levels.
    """

    sampler: str
    options: Mapping[str, Any]
    grid: Grid
    states: tuple[Tensor, Tensor] = field(repr=False)

    @property
    def latent(self) -> Tensor:
        """The point at the first level, shape (B, ...), from which a sampler may start."""
        return self.states[0]


def encode(name: str, denoiser: DenoiserLike, x0: Tensor, grid: Grid, **options: Any) -> Encoding:
    """Run a sampler backwards, exactly.

    Args:
        name: "edict", "bdia" or "belm".
        denoiser: Any callable `(x, level) -> x_0 estimate` that gives the same answer to the same question.
        x0: The point at the last level of the grid, the data where that is clean, shape (B, ...); float64 for a round
            trip exact to many digits.
        grid: The levels; the first must not be pure noise, where different data look the same.
        options: The sampler's options. With small `mix` or `gamma`, rounding grows on the way up.

    Returns:
        The noise, in two states; `decode` brings it back.

    Raises:
        UnknownNameError: If there is no such sampler or option.
        InvalidInputError: If the sampler cannot be run backwards, an option is out of range, or the grid starts at
            pure noise.
    """
    entry = SAMPLERS.find(name)
    if entry.name not in METHODS:
        raise InvalidInputError(
            f"{entry.name} cannot be run backwards exactly; take one of {', '.join(METHODS)}, or the inexact "
            "fewstep.samplers.inversion.ddim_inverse"
        )
    if grid.levels[0].is_pure_noise:
        raise InvalidInputError(
            f"{entry.name} cannot be run back to pure noise, where no trace of the data is left; start the grid at a "
            "level with alpha > 0"
        )
    resolved = entry.resolve(options)
    method = METHODS[entry.name](**resolved)
    tape = _eager(entry.name, denoiser, x0)
    with torch.no_grad():
        return Encoding(entry.name, resolved, grid, method.up(tape, grid.levels, tape.start))


def decode(encoding: Encoding, denoiser: DenoiserLike) -> Tensor:
    """Bring an encoding down to the last level of its grid: with the denoiser that made it, `encode`'s x0 again.

    With another denoiser, such as one for another label, this edits the picture.
    """
    method = METHODS[encoding.sampler](**encoding.options)
    tape = _eager(encoding.sampler, denoiser, encoding.latent)
    with torch.no_grad():
        return method.down(tape, encoding.grid.levels, encoding.states)


def ddim_inverse(denoiser: DenoiserLike, x0: Tensor, grid: Grid) -> Tensor:
    """DDIM run upwards: `x_s = alpha_s D(x_t, t) + sigma_s noise(x_t, t)` to ever noisier levels.

    Not exact, since DDIM on its way down takes the noise at s, not at t: sampling from the result gives x0 back to the
    first order in the step at best.

    Args:
        denoiser: Any callable `(x, level) -> x_0 estimate`.
        x0: The point at the last level of the grid, shape (B, ...). From clean data, where no network can be asked, the
            first step asks it at the next level.
        grid: The levels, noisy to clean as for sampling.

    Returns:
        The point at the first level, shape (B, ...).

    Source: Song, Meng, Ermon 2021, arXiv 2010.02502, section 4.3; Mokady et al. 2022, arXiv 2211.09794.

    >>> import torch, fewstep as fs
    >>> grid = fs.Grid.from_ratios(fs.process.edm(), [2.0, 1.0, 0.0])
    >>> ddim_inverse(lambda x, level: torch.zeros_like(x), torch.ones(1, 1), grid)
    tensor([[4.]])
    """
    tape = _eager("ddim_inverse", denoiser, x0)
    x, levels = tape.start, grid.levels[::-1]
    with torch.no_grad():
        for t, s in zip(levels, levels[1:], strict=False):
            x = _ddim_up(tape, x, t, s)
    return x


def _eager(name: str, denoiser: Any, start: Tensor) -> EagerTape:
    start = checked_start(name, start, draws=0, noise=None)
    if hasattr(denoiser, "for_run"):
        denoiser = denoiser.for_run()
    return EagerTape(name, denoiser, start, None, None)
