"""Supreme: Runge-Kutta steps that reshape each estimate of x_0 and the fresh noise; nonlinear, so it has no table.

Everything is done in `x^ = x / alpha` over `r = sigma / alpha`, where the original works too. It takes norms over the
whole batch; here each image has its own, so that it does not depend on those beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.plan import EagerTape
from fewstep.process import Level, Process
from fewstep.registry import Option
from fewstep.samplers.options import AncestralEta, NoiseFactor
from fewstep.samplers.registry import sampler
from fewstep.samplers.steps import (
    Output,
    ancestral_split,
    exponential_rule,
    noise_estimate,
    renoised,
    weighted,
)
from fewstep.schedulers import Grid

WARM_UP = "rkf45"
"""The method of the first step, which has nothing to compare with."""

BY_CHANGE = ((0.01, "rkf45"), (0.0375, "rk4"), (0.075, "bogacki_shampine"), (0.15, "trapezoidal"))
"""What `dynamic` takes where the slope changes by less than so much of its size; from the last on, Euler."""

ADAPTIVE = {
    "rkf45": "adaptive_4",
    "rk4": "adaptive_4",
    "bogacki_shampine": "adaptive_3",
    "trapezoidal": "adaptive_2",
    "euler": "euler",
}
"""What `adaptive_rk` takes in its place."""

DIVISORS = {
    "euler": 1,
    "dpm_1s": 1,
    "reversible_heun_1s": 1,
    "dpm_3s": 3,
    "bogacki_shampine": 3,
    "rk4": 4,
    "rkf45": 6,
}
"""How many parts the enhancements of a step are divided into, as published; 2 for the others."""

BLUR, COLOUR_STD = 1.5, 0.1
"""Standard deviations of the edge filters: in pixels, and in the unit of the data."""

PERCENTILE, MOST = 0.05, 0.5
"""Share of the frequencies at either end whose amplitude is changed, and by how much at most."""

Method = Literal[
    "euler",
    "trapezoidal",
    "rk4",
    "rkf45",
    "bogacki_shampine",
    "RES",
    "dpm_1s",
    "dpm_2s",
    "dpm_3s",
    "reversible_heun",
    "reversible_heun_1s",
    "reversible_bogacki_shampine",
]
StepMethod = Literal[
    "euler",
    "dynamic",
    "adaptive_rk",
    "trapezoidal",
    "rk4",
    "rkf45",
    "bogacki_shampine",
    "RES",
    "dpm_1s",
    "dpm_2s",
    "dpm_3s",
    "reversible_heun",
    "reversible_heun_1s",
    "reversible_bogacki_shampine",
]


@sampler(
    "supreme",
    title="Supreme",
    family="SDE",
    order=0,
    calls_per_step=2,
    stochastic=True,
    eager=True,
    paper="Clybius, ComfyUI-Extra-Samplers",
    aliases=("sample_supreme",),
    mistake="the last stage of its bogacki_shampine methods and the stages of adaptive_rk do not lie at the levels at "
    "which they are evaluated, so that these methods are of first order",
    corrected_order=0,
)
def supreme(
    tape: EagerTape,
    grid: Grid,
    step_method: Annotated[
        StepMethod, Option("solver; dynamic and adaptive_rk choose by the change of the slope")
    ] = "euler",
    substep_method: Annotated[Method, Option("solver of all substeps but the first")] = "euler",
    substeps: Annotated[
        int, Option("steps from the same point, of which the mean is taken", 1, 16)
    ] = 2,
    eta: AncestralEta = 1.0,
    s_noise: NoiseFactor = 1.0,
    centralization: Annotated[
        float, Option("share of each channel's mean that is taken from the estimate", -10, 10)
    ] = 0.05,
    normalization: Annotated[
        float, Option("how far each channel's deviation is moved towards 1", -10, 10)
    ] = 0.05,
    edge_enhancement: Annotated[
        float,
        Option(
            "how much the estimate is sharpened, and the point blurred where it is flat", -10, 10
        ),
    ] = 0.25,
    perphist: Annotated[
        float, Option("how much of what is new against the previous estimate is added", -10, 10)
    ] = 0.5,
    noise_modulation: Annotated[
        Literal["none", "intensity", "frequency", "spectral_signum"],
        Option("how the fresh noise is shaped: by the point's contrast, or by frequency"),
    ] = "intensity",
    modulation_strength: Annotated[
        float, Option("weight of the shaped noise; the plain noise has the rest to 1", -10, 10)
    ] = 2.0,
    modulation_dims: Annotated[
        Literal[1, 2, 3], Option("over what the noise is shaped: channels, space, or both")
    ] = 3,
    reversible_eta: AncestralEta = 1.0,
    corrected: Annotated[
        bool, Option("stages of bogacki_shampine and adaptive_rk where they belong")
    ] = False,
) -> Tensor:
    """Ancestral Runge-Kutta steps with estimates that are sharpened, centred and pushed away from the previous one.

    With all enhancements 0 and no modulation it is the ancestral form of the step method; otherwise it converges to
    nothing, and is made for its look. The first step is Runge-Kutta-Fehlberg of order 4, the last, and one that keeps
    no noise, Euler. A step from pure noise is one of Euler without enhancements. The fresh noise is drawn once a step,
    and what needs an image (edges, channels) leaves other data as they are.
    """
    parts = DIVISORS.get(step_method, 2) + DIVISORS.get(substep_method, 2) * (substeps - 1)
    model = _Model(
        tape,
        grid.process,
        edges=edge_enhancement / parts,
        centralization=centralization / parts,
        normalization=normalization / parts,
        history=perphist / parts,
    )
    tableaus = CORRECTED if corrected else PUBLISHED
    x, before = tape.start, None
    for t, s in grid.steps:
        split = ancestral_split(t, s, eta)
        fresh = s_noise * tape.noise(t, s) if s_noise * split.up > 0 else None
        if t.is_pure_noise:
            denoised = tape.denoise(x, t)
            x = renoised(denoised, noise_estimate(x, denoised, t), fresh, split, s)
            continue
        z, steps = x / t.alpha, []
        model.start, model.end = t.ratio, s.ratio
        reversible = ancestral_split(t, s, reversible_eta).down
        for substep in range(substeps):
            newest = Output(_plain(t.ratio), model(z, t.ratio))
            step = _Step(model, tableaus, z, newest, before, split.down, s.ratio, reversible)
            step.take([substep_method] * len(z) if substep else step.methods(step_method))
            steps.append(step)
        z, before = torch.stack([step.x for step in steps]).mean(0), steps[-1].newest
        if fresh is not None:
            fresh = split.up * fresh
            z = z + _modulated(noise_modulation, fresh, z, modulation_strength, modulation_dims)
        x = s.alpha * z
    return x


# ---- the estimates ---------------------------------------------------------------------------


@dataclass
class _Model:
    """The estimate of x_0 at a point of x^, enhanced; it remembers the previous one of each image.

    Attributes:
        edges, centralization, normalization, history: Strengths of what is done to each estimate.
        start, end: r at the ends of the present step.
    """

    tape: EagerTape
    process: Process
    edges: float
    centralization: float
    normalization: float
    history: float
    start: float = 0.0
    end: float = 0.0
    previous: Tensor | None = None

    def __call__(self, x: Tensor, ratio: float) -> Tensor:
        level = self.process.levels_at([ratio])[0]
        denoised = self.tape.denoise(level.alpha * x, level)
        if self.edges and _is_image(x):
            sharper = (denoised - _blurred(denoised)) + (_flattened(x, denoised) - x)
            denoised = denoised + (self.start - self.end) * self.edges * sharper
        if x.ndim > 2:
            denoised = self._levelled(denoised)
        if self.history and self.previous is not None:
            now, then = 2 * x - denoised, 2 * x - self.previous
            new = then - now * (_inner(now, then) / _inner(now, now))
            denoised = denoised + self.history * new
        self.previous = denoised
        return denoised

    def _levelled(self, denoised: Tensor) -> Tensor:
        """Each channel with less of its mean, and a standard deviation nearer to 1."""
        space, root = tuple(range(2, denoised.ndim)), math.sqrt(self.start)
        mean = denoised.mean(space, keepdim=True)
        denoised = denoised - self.centralization * root * mean
        std = _std(denoised, space)
        unit = torch.where(std > 0, denoised / std, denoised)
        return denoised + self.normalization * root * (unit - denoised)


def _is_image(x: Tensor) -> bool:
    return x.ndim > 3 and min(x.shape[-2:]) > 1


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """`<a, b>` of each image, in a shape that multiplies images."""
    return (a * b).reshape(len(a), -1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _std(x: Tensor, axes: Sequence[int]) -> Tensor:
    """Standard deviation over some axes, 0 of a single element."""
    if math.prod(x.shape[axis] for axis in axes) < 2:
        return torch.zeros_like(x.mean(tuple(axes), keepdim=True))
    return x.std(tuple(axes), keepdim=True)


def _windows(x: Tensor) -> Tensor:
    """The 3 x 3 neighbours of every pixel, mirrored at the border, shape (B, C, ..., H, W, 9)."""
    frames = functional.pad(x.flatten(0, -4), (1, 1, 1, 1), mode="reflect")
    return frames.unfold(-2, 3, 1).unfold(-2, 3, 1).flatten(-2).reshape(*x.shape, 9)


def _gaussian(x: Tensor) -> Tensor:
    """Weights of the neighbours in a Gaussian blur."""
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device)
    line = torch.exp(-0.5 * (line / BLUR) ** 2)
    weights = torch.outer(line, line).flatten()
    return weights / weights.sum()


def _blurred(x: Tensor) -> Tensor:
    """The image under a Gaussian blur of 3 x 3 pixels."""
    return (_windows(x) * _gaussian(x)).sum(-1)


def _flattened(x: Tensor, guide: Tensor) -> Tensor:
    """The image blurred where the guide is flat: the joint bilateral filter of 3 x 3 pixels."""
    distance = (_windows(guide) - guide.unsqueeze(-1)).abs().sum(1, keepdim=True)
    weights = _gaussian(x) * torch.exp(-0.5 * (distance / COLOUR_STD) ** 2)
    return (_windows(x) * weights).sum(-1) / weights.sum(-1)


# ---- the steps -------------------------------------------------------------------------------


class _Tableau(NamedTuple):
    """An explicit Runge-Kutta method: where its later stages lie, what leads to them, and what leads to the end."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


def _misplaced(weights: tuple[float, ...]) -> _Tableau:
    """The tableau that takes the weights for its rows as well, and their sums for its nodes."""
    rows = tuple(weights[:k] for k in range(1, len(weights)))
    return _Tableau(tuple(map(sum, rows)), rows, weights)


PUBLISHED = {
    "rk4": _Tableau(
        (1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
    "rkf45": _Tableau(
        (1 / 4, 3 / 8, 12 / 13, 1),
        (
            (1 / 4,),
            (3 / 32, 9 / 32),
            (1932 / 2197, -7200 / 2197, 7296 / 2197),
            (439 / 216, -8, 3680 / 513, -845 / 4104),
        ),
        (25 / 216, 0, 1408 / 2565, 2197 / 4104, -1 / 5),
    ),
    "bogacki_shampine": _Tableau(
        (1 / 2, 3 / 4), ((1 / 2,), (3 / 4, 1 / 4)), (2 / 9, 1 / 3, 4 / 9)
    ),
    "adaptive_2": _misplaced((1 / 2, 1 / 2)),
    "adaptive_3": _misplaced((1 / 6, 2 / 3, 1 / 6)),
    "adaptive_4": _misplaced((1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
"""The methods of constant coefficients."""

CORRECTED = {
    **PUBLISHED,
    "bogacki_shampine": PUBLISHED["bogacki_shampine"]._replace(rows=((1 / 2,), (0, 3 / 4))),
    "adaptive_2": _Tableau((1,), ((1,),), (1 / 2, 1 / 2)),
    "adaptive_3": _Tableau((1 / 2, 1), ((1 / 2,), (-1, 2)), (1 / 6, 2 / 3, 1 / 6)),
    "adaptive_4": _Tableau(
        (1 / 3, 2 / 3, 1), ((1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
}
"""With stages at their nodes: the methods of Bogacki and Shampine, Heun, Kutta (third order), and the 3/8 rule."""


@dataclass
class _Step:
    """A step of the ODE in x^ over r, from the level of the newest estimate to the kept part of the next level's noise.

    Attributes:
        model: Gives the estimates of the stages.
        tableaus: The methods of constant coefficients.
        x: The point.
        newest: The estimate there.
        before: The last estimate of the step before, if there was one.
        down: r where the step ends.
        end: r of the next level.
        reversible: r where the step would end with `reversible_eta`.
    """

    model: _Model
    tableaus: dict[str, _Tableau]
    x: Tensor
    newest: Output[Tensor]
    before: Output[Tensor] | None
    down: float
    end: float
    reversible: float

    @property
    def slope(self) -> Tensor:
        """`dx^/dr` at the start."""
        return noise_estimate(self.x, self.newest.value, self.newest.level)

    def methods(self, step_method: str) -> list[str]:
        """The method of each image."""
        if self.before is None:
            return [WARM_UP] * len(self.x)
        if step_method not in ("dynamic", "adaptive_rk"):
            return [step_method] * len(self.x)
        level, last = self.newest.level, self.before.level
        slope = noise_estimate(self.x, self.before.value, last)
        predicted = self.x + slope * (level.ratio - last.ratio)
        change = noise_estimate(predicted, self.newest.value, level) - slope
        sizes = (_inner(change, change) / _inner(slope, slope)).sqrt().flatten().tolist()
        chosen = [next((m for most, m in BY_CHANGE if size < most), "euler") for size in sizes]
        return chosen if step_method == "dynamic" else [ADAPTIVE[method] for method in chosen]

    def take(self, methods: Sequence[str]) -> None:
        """Move each image to the end of the step with its own method.

        Where they differ, the whole batch takes each of them, since a network's labels belong to whole batches.
        """
        remembered, end, memory = self.model.previous, self.x, self.x
        for method in dict.fromkeys(methods):
            self.model.previous = remembered
            reached = self._taken(method)
            assert self.model.previous is not None
            own = torch.tensor([m == method for m in methods], device=end.device)
            own = own.reshape(-1, *[1] * (end.ndim - 1))
            end = torch.where(own, reached, end)
            memory = torch.where(own, self.model.previous, memory)
        self.x, self.model.previous = end, memory

    def _taken(self, method: str) -> Tensor:
        if self.down == 0:
            return self.newest.value
        if method in ("euler", "dpm_1s"):
            return self.x + (self.down - self.newest.level.ratio) * self.slope
        if method in ("RES", "dpm_3s"):
            return self._exponential(noise_form=method == "dpm_3s")
        if method == "reversible_heun_1s":
            return self._one_stage()
        return self._runge_kutta(self.tableaus.get(method) or self._tableau(method))

    def _runge_kutta(self, tableau: _Tableau) -> Tensor:
        start = self.newest.level.ratio
        length, slopes = self.down - start, [self.slope]
        for node, row in zip(tableau.nodes, tableau.rows, strict=True):
            slopes.append(
                self._slope_at(self.x + length * weighted(row, slopes), start + node * length)
            )
        return self.x + length * weighted(tableau.weights, slopes)

    def _slope_at(self, x: Tensor, ratio: float) -> Tensor:
        return noise_estimate(x, self.model(x, ratio), _plain(ratio))

    def _tableau(self, method: str) -> _Tableau:
        """The methods whose coefficients depend on the step."""
        start = self.newest.level.ratio
        length = self.down - start
        # The correction that Reversible Heun subtracts is taken over the step with reversible_eta.
        reversible = (self.reversible - start) ** 2
        if method == "reversible_bogacki_shampine":
            nodes, rows, (w1, w2, w3) = self.tableaus["bogacki_shampine"]
            return _Tableau(nodes, rows, (w1, w2 + reversible / 6, w3 - reversible / 6))
        if method == "reversible_heun":
            shift = reversible / (4 * length)
            return _Tableau((1,), ((1,),), (1 / 2 + shift, 1 / 2 - shift))
        if method == "dpm_2s":
            node = (math.sqrt(start * self.down) - start) / length
            return _Tableau((node,), ((node,),), (0, 1))
        node = (
            self.end - start
        ) / length  # trapezoidal: the second slope is that at the next level
        return _Tableau((node,), ((node,),), (1 / 2, 1 / 2))

    def _one_stage(self) -> Tensor:
        """Reversible Heun with the two newest estimates, at the same point, in place of two stages."""
        start = self.newest.level.ratio
        before = self.newest if self.before is None else self.before
        slope = noise_estimate(self.x, before.value, self.newest.level)
        length = self.down - start
        there = noise_estimate(self.x + length * slope, self.newest.value, _plain(self.down))
        change = there - slope
        return self.x + length * (slope + change / 2) - (self.reversible - start) ** 2 / 4 * change

    def _exponential(self, noise_form: bool) -> Tensor:
        """DPM-Solver-3 in noise form, the refined exponential solver with one stage in data form."""

        def output(x: Tensor, level: Level) -> Output[Tensor]:
            denoised = self.model(x, level.ratio)
            return Output(level, noise_estimate(x, denoised, level) if noise_form else denoised)

        start, end = self.newest.level, _plain(self.down)
        first = Output(start, self.slope) if noise_form else self.newest
        used = [first]
        for place in (1 / 3, 2 / 3) if noise_form else (1 / 2,):
            level = _plain(start.ratio * (self.down / start.ratio) ** place)
            stage = exponential_rule(self.x, used, level, noise_form=noise_form)
            used = [first, output(stage, level)]
        return exponential_rule(self.x, used, end, noise_form=noise_form)


def _plain(ratio: float) -> Level:
    """The level in the coordinates of x^, where alpha = 1."""
    return Level(ratio, 1.0, ratio)


# ---- the noise -------------------------------------------------------------------------------


def _modulated(
    modulation: str, fresh: Tensor, x: Tensor, strength: float, dims: Literal[1, 2, 3]
) -> Tensor:
    """The fresh noise, shaped."""
    if modulation == "none" or x.ndim < 2:
        return fresh
    every = tuple(range(1, x.ndim))
    axes = {1: (1,), 2: every[1:] or every, 3: every}[dims]
    if modulation == "spectral_signum":
        return _evened(fresh, strength, axes)
    shaped = fresh * (1 + 1 / (1 + abs(strength) * _std(x, axes)))
    if modulation == "frequency":
        shaped = _sharpened(shaped, strength, every[-2:])
    shaped = shaped * (_inner(fresh, fresh) / _inner(shaped, shaped)).sqrt()
    return strength * shaped + (1 - strength) * fresh


def _sharpened(noise: Tensor, strength: float, axes: tuple[int, ...]) -> Tensor:
    """Amplitudes times `2 - e^-(m^2 sum (k / N)^2)`, k the index of the Fourier transform, which is not centred."""
    size = torch.zeros((), dtype=noise.dtype, device=noise.device)
    for axis in axes:
        places = torch.arange(noise.shape[axis], device=noise.device) / noise.shape[axis]
        size = size + (places.to(noise.dtype) ** 2).reshape(-1, *[1] * (noise.ndim - 1 - axis))
    factors = 2 - torch.exp(-size * strength**2)
    return torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * factors, dim=axes).real


def _evened(noise: Tensor, strength: float, axes: tuple[int, ...]) -> Tensor:
    """Fourier amplitudes a drawn towards the middle where `log a` lies beyond the outer percentiles of `|log a|`.

    Above the high one h, of a maximum top: times `1 - min((log a - h) / (top - h), 1/2)`; below the low one l:
    `1 + min(1 - log a / l, 1/2)`; to the power of the strength.
    """
    spectrum = torch.fft.fftn(noise, dim=axes)
    log = spectrum.abs().log()
    sizes = log.abs().reshape(len(log), -1)
    shares = torch.tensor([PERCENTILE, 1 - PERCENTILE, 1.0], dtype=log.dtype, device=log.device)
    low, high, top = (
        q.reshape(-1, *[1] * (noise.ndim - 1)) for q in torch.quantile(sizes, shares, dim=1)
    )
    down = 1 - ((log - high) / (top - high)).clamp(max=MOST)
    up = 1 + (1 - log / low).clamp(max=MOST)
    factors = torch.where(log > high, down, 1.0) * torch.where(log < low, up, 1.0)
    return torch.fft.ifftn(spectrum * factors**strength, dim=axes).real
