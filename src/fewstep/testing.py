"""Conformance checks for processes, schedulers, samplers and denoisers: Fewstep's own, and yours.

Each check raises `CheckFailedError` at the first fault it finds, with the value and the remedy. They draw no global
random numbers, so they give the same answer every time.

>>> import fewstep as fs
>>> def my_euler(tape, grid):
...     x = tape.start
...     for t, s in grid.steps:
...         noise = (x - t.alpha * tape.denoise(x, t)) / t.sigma
...         x = s.alpha / t.alpha * x + s.alpha * (s.ratio - t.ratio) * noise
...     return x
>>> print(check_sampler(my_euler, order=1, odd_grids=("one step", "short of clean data")))
my_euler: measured order 1.00, 10 calls and 0 draws for 10 steps
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.denoisers import (
    TARGETS,
    BaseDenoiser,
    Denoiser,
    GaussianMixture,
    Wrapper,
)
from fewstep.errors import CheckFailedError, FewstepError, InvalidInputError, unknown_name
from fewstep.plan import EagerPlan, Plan, Vector
from fewstep.process import (
    PROCESSES,
    Level,
    Process,
    edm,
    flow,
    forward_kernel,
    from_dict,
    posterior,
    ve,
    vp_continuous,
    vp_cosine,
    vp_linear,
    vp_scaled_linear,
)
from fewstep.samplers import SAMPLERS, SamplerEntry, plan
from fewstep.schedulers import Grid, make_grid

__all__ = [
    "DenoiserReport",
    "SamplerReport",
    "check_denoiser",
    "check_process",
    "check_sampler",
    "check_scheduler",
    "measured_order",
]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckFailedError(message)


def _near(a: float, b: float, relative: float = 1e-9, absolute: float = 1e-12) -> bool:
    return a == b or abs(a - b) <= max(relative * max(abs(a), abs(b)), absolute)


# ---- processes -------------------------------------------------------------------------------


def check_process(process: Process) -> None:
    """Check that a forward process is one: noise rises, the inverses invert, and its kernels fit together.

    Args:
        process: The process.

    Raises:
        CheckFailedError: If it is not.

    >>> check_process(vp_linear())
    """
    name = process.name
    _require(
        process.t_min < process.t_max and process.training_steps >= 2,
        f"{name}: t_min={process.t_min:g} must lie below t_max={process.t_max:g}, "
        f"and training_steps={process.training_steps} be at least 2",
    )
    indices = np.linspace(0, process.training_steps - 1, 257).tolist()
    levels = process.levels([process.table_time(i) for i in indices])
    _check_curve(process, levels)
    _check_inverses(process, levels)
    _check_tensors(process, levels)
    _check_kernels(name, [process.clean, *levels])
    _check_config(process)


def _check_curve(process: Process, levels: Sequence[Level]) -> None:
    name = process.name
    for ends in ((levels[0].t, process.t_min, "t_min"), (levels[-1].t, process.t_max, "t_max")):
        _require(
            _near(*ends[:2]),
            f"{name}: the training table ends at t={ends[0]:g} where {ends[2]}={ends[1]:g}; correct table_time",
        )
    for level in levels:
        _require(
            0 <= level.alpha < math.inf and 0 < level.sigma < math.inf,
            f"{name}: level {level} must have finite alpha >= 0 and sigma > 0; correct _log_snr or the path",
        )
    for less, more in itertools.pairwise(levels):
        _require(
            less.ratio < more.ratio,
            f"{name}: sigma/alpha must rise with the time, but falls from {less.ratio:.9g} at t={less.t:g} to "
            f"{more.ratio:.9g} at t={more.t:g}; correct _log_snr",
        )
    clean = process.level(process.clean_time)
    _require(
        (clean.alpha, clean.sigma) == (1.0, 0.0),
        f"{name}: at clean_time={process.clean_time:g} alpha={clean.alpha:g} and sigma={clean.sigma:g} must be "
        "1 and 0; let _log_snr give inf there",
    )


def _check_inverses(process: Process, levels: Sequence[Level]) -> None:
    name, size = process.name, process.t_max - process.t_min
    for level in levels:
        for what, value, expected in (
            ("ratio", process.ratio(level.t), level.ratio),
            ("log_snr", process.log_snr(level.t), level.log_snr),
        ):
            _require(
                _near(value, expected, 1e-9, 1e-9),
                f"{name}: {what}({level.t:g})={value:.12g}, but its alpha and sigma give {expected:.12g}",
            )
        for given in ({"log_snr": level.log_snr}, {"ratio": level.ratio}):
            t = process.time(**given)
            _require(
                _near(t, level.t, 1e-6, 1e-6 * size),
                f"{name}: time({next(iter(given))}) gives t={t:.9g} at the level of t={level.t:.9g}; "
                "_time must be the inverse of _log_snr",
            )
    ratios = [level.ratio for level in levels]
    for ratio, level in zip(ratios, process.levels_at(ratios), strict=True):
        _require(
            _near(level.ratio, ratio),
            f"{name}: levels_at([{ratio:.12g}]) gives sigma/alpha={level.ratio:.12g}; correct the path",
        )
    clean = process.time(ratio=0.0)
    _require(
        clean == process.clean_time,
        f"{name}: time(ratio=0) gives {clean:g}, not clean_time={process.clean_time:g}",
    )


def _check_tensors(process: Process, levels: Sequence[Level]) -> None:
    name = process.name
    t = torch.tensor([level.t for level in levels], dtype=torch.float64)
    x0, noise = torch.full((len(t), 2), 0.5).double(), torch.full((len(t), 2), -2.0).double()
    for what, values, expected in (
        ("alpha", process.alpha(t), [level.alpha for level in levels]),
        ("sigma", process.sigma(t), [level.sigma for level in levels]),
        (
            "add_noise",
            process.add_noise(x0, noise, t)[:, 0],
            [0.5 * level.alpha - 2.0 * level.sigma for level in levels],
        ),
    ):
        _require(
            values.dtype == torch.float64
            and torch.allclose(values, torch.tensor(expected, dtype=torch.float64), 1e-9, 1e-12),
            f"{name}: {what} of a tensor of times differs from its values at single times",
        )


def _check_kernels(name: str, levels: Sequence[Level]) -> None:
    """Going up from s to t must give the marginal at t, and coming back down that at s."""
    for s, t in itertools.pairwise(levels[::16]):
        up = forward_kernel(s, t)
        _require(
            _near(up.scale * s.alpha, t.alpha)
            and _near(math.hypot(up.scale * s.sigma, up.std), t.sigma),
            f"{name}: q(x_t|x_s) from level {s} to level {t} does not lead to the marginal there",
        )
        down = posterior(t, s)
        _require(
            _near(down.on_x * t.alpha + down.on_x0, s.alpha)
            and _near(math.hypot(down.on_x * t.sigma, down.std), s.sigma),
            f"{name}: q(x_s|x_t,x_0) from level {t} to level {s} does not lead to the marginal there",
        )


def _check_config(process: Process) -> None:
    config = process.to_dict()
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckFailedError(
            f"{process.name}: to_dict() gives {config!r}, which is not plain data ({error}); "
            "keep options to finite numbers, texts and lists"
        ) from error
    if process.name in PROCESSES:
        again = from_dict(json.loads(text))
        _require(
            again == process,
            f"{process.name}: from_dict(to_dict()) gives {again}, not {process}; put all arguments into options",
        )


# ---- schedulers ------------------------------------------------------------------------------


def check_scheduler(
    scheduler: str | Callable[..., Grid], process: Process | None = None, **options: Any
) -> None:
    """Check a scheduler for several numbers of steps: as many steps as asked, inside the process, down to clean data.

    Args:
        scheduler: A scheduler's name, or a function `(process, steps, **options) -> Grid` of your own.
        process: The process to check it on; by default one of each kind.
        options: The scheduler's options.

    Raises:
        CheckFailedError: If a grid is not as asked.

    >>> check_scheduler("karras", rho=5.0)
    """
    name = scheduler if isinstance(scheduler, str) else getattr(scheduler, "__name__", "scheduler")
    every = (
        vp_linear(),
        vp_scaled_linear(zero_terminal_snr=True),
        vp_cosine(),
        vp_continuous(),
        ve(),
        edm(),
        flow(),
    )
    for on in every if process is None else (process,):
        for steps in (1, 2, 4, 5, 10, 20, 50):
            place = f"{name} on {on.name} with {steps} steps"
            try:
                first, second = (_made(scheduler, on, steps, options) for _ in range(2))
            except FewstepError as error:
                raise CheckFailedError(f"{place}: {error}") from error
            _check_grid(place, first, on, steps)
            _require(
                first.levels == second.levels,
                f"{place}: two calls give two grids; take everything from the arguments",
            )


def _made(
    scheduler: str | Callable[..., Grid], process: Process, steps: int, options: Mapping[str, Any]
) -> Grid:
    if isinstance(scheduler, str):
        return make_grid(scheduler, process, steps, **options)
    return scheduler(process, steps, **options)


def _check_grid(place: str, grid: Grid, process: Process, steps: int) -> None:
    _require(
        isinstance(grid, Grid),
        f"{place}: gives a {type(grid).__name__}; return a fewstep.Grid, such as Grid.from_ratios(process, ratios)",
    )
    _require(grid.process == process, f"{place}: the grid belongs to {grid.process}")
    _require(
        len(grid.steps) == steps,
        f"{place}: the grid has {len(grid.steps)}; n steps need n levels and then clean data",
    )
    *noisy, last = grid.levels
    _require(
        last.is_clean,
        f"{place}: the last level {last} is not clean; append 0 to the ratios",
    )
    top, bottom = process.noisiest.ratio, process.least_noisy.ratio
    for level in noisy:
        _require(
            bottom * (1 - 1e-6) <= level.ratio <= top * (1 + 1e-6),
            f"{place}: sigma/alpha={level.ratio:.9g} is outside the process's range {bottom:.9g}..{top:.9g}, "
            "where no network is trained; stay inside process.least_noisy and process.noisiest",
        )
        t = process.time(ratio=level.ratio)
        _require(
            _near(level.t, t, 1e-6, 1e-6 * (process.t_max - process.t_min)),
            f"{place}: level {level} has sigma/alpha={level.ratio:.9g}, whose time is {t:.9g}; make levels with "
            "process.level(t) or process.levels_at(ratios)",
        )


# ---- samplers --------------------------------------------------------------------------------

ODD_GRIDS: dict[str, list[float]] = {
    "one step": [5.0, 0.0],
    "one step short of clean data": [5.0, 1.0],
    "from pure noise": [math.inf, 9.0, 2.0, 0.4, 0.0],
    "one step from pure noise": [math.inf, 0.0],
    "short of clean data": [30.0, 11.0, 4.0, 2.0, 0.3],
    "steps of very different size": [20.0, 19.9, 3.0, 2.99, 2.98, 0.01, 0.0099, 0.0],
    "levels far apart": [1e4, 30.0, 1.0, 1e-3, 0.0],
    "many steps": [*np.geomspace(100, 0.01, 60).tolist(), 0.0],
}
"""Values of sigma / alpha by what is odd about them."""

MIXTURE = (
    [[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]],
    [0.4, 0.5, 0.6],
    [0.3, 0.5, 0.2],
)
"""Centres, widths and shares of the data that orders are measured on: smooth, but far from Gaussian."""

HIGH_RATIO, FIRST_RATIO, LAST_RATIO = 100.0, 10.0, 0.05
"""Range in which orders are measured: from the first ratio to the last, short of clean data, where every order is lost.
Paths start higher, where the first steps of a multistep method, which are of lower order, do no harm."""

ORDER_STEPS = (48, 96, 192, 384)
"""Steps at which errors are measured."""


@dataclass(frozen=True)
class SamplerReport:
    """What `check_sampler` measured.

    Attributes:
        name: The sampler.
        order: Measured order of convergence: of the points if the sampler is deterministic, else of the standard
            deviation on Gaussian data (weak); None for a sampler that has none, or declares its noise inexact.
        calls: Network calls for 10 steps down to clean data.
        draws: Noise draws for those.
    """

    name: str
    order: float | None
    calls: int
    draws: int

    def __str__(self) -> str:
        order = "no order" if self.order is None else f"order {self.order:.2f}"
        kind = "weak " if self.draws and self.order is not None else ""
        return f"{self.name}: measured {kind}{order}, {self.calls} calls and {self.draws} draws for 10 steps"


def check_sampler(
    sampler: str | Callable[..., Vector],
    order: float | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    odd_grids: Iterable[str] = tuple(ODD_GRIDS),
) -> SamplerReport:
    """Run the whole conformance suite on a sampler.

    It must run on odd grids with finite coefficients, land where it should on a data set of one point, do the same
    each time it is traced, survive JSON, give the same points on every forward process, and converge to the solution
    with its order.

    Args:
        sampler: A sampler's name, or a function `(tape, grid, **options) -> Vector` of your own.
        order: The order it should have, met within 0.25; 0 for a method that does not converge to the solution, whose
            order is not looked at. By default that of the metadata, for a name whose options it holds for; without
            either, the order must only be above 0.75.
        options: The sampler's options.
        odd_grids: Which of `ODD_GRIDS` it must run on; leave out those that your sampler is not meant for.

    Returns:
        What was measured.

    Raises:
        CheckFailedError: If it fails, with the remedy.

    Source: of the test by order, Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, section II.4.

    >>> print(check_sampler("dpmpp_2m"))
    dpmpp_2m: measured order 2.01, 10 calls and 0 draws for 10 steps
    """
    if isinstance(sampler, str):
        entry = SAMPLERS.find(sampler)
        name = entry.name
        order = _stated_order(entry, options or {}) if order is None else order
    else:
        name = getattr(sampler, "__name__", "sampler")

    def trace(grid: Grid) -> Plan:
        return _traced(sampler, grid, options or {})

    for label in odd_grids:
        if label not in ODD_GRIDS:
            raise unknown_name("odd grid", label, ODD_GRIDS)
        for process in (flow(), ve()):
            if process.noisiest.is_pure_noise or math.isfinite(ODD_GRIDS[label][0]):
                _check_odd_grid(f"{name} on {label}", trace, process, ODD_GRIDS[label])
    _check_paths(name, trace)
    ten = trace(_measuring_grid(vp_linear(), 9, 0.0))
    measured = None if order == 0 else measured_order(sampler, **(options or {}))
    _check_order(name, measured, order)
    return SamplerReport(name, measured, ten.calls, ten.draws)


def measured_order(sampler: str | Callable[..., Vector], **options: Any) -> float | None:
    """Measure a sampler's order of convergence on data whose solution is known, in float64.

    Slope of the error over the number of steps, on steps of two sizes in turn, at the most steps at which rounding does
    not show yet: the error of the points on a mixture of Gaussians if the sampler is deterministic, else the weak one,
    that of the standard deviation on Gaussian data.

    Args:
        sampler: A sampler's name, or a function `(tape, grid, **options) -> Vector` of your own.
        options: The sampler's options.

    Returns:
        The order; None where noise is inexact, or there is no error.

    Source: Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, section II.4.

    >>> round(measured_order("heun"), 1)
    2.0
    """
    traced = [_traced(sampler, _measuring_grid(vp_linear(), n), options) for n in ORDER_STEPS]
    if not any(p.draws for p in traced):
        grids = (_measuring_grid(vp_linear(), n, first=HIGH_RATIO) for n in ORDER_STEPS)
        errors = [_point_error(_traced(sampler, grid, options)) for grid in grids]
    elif "noise" in traced[0].inexact:
        return None
    else:
        errors = [_spread_error(p) for p in traced]
    clear = [pair for pair in itertools.pairwise(errors) if min(pair) > 1e-10] or [errors[:2]]
    coarse, fine = clear[-1]
    return math.log2(coarse / fine) if fine > 0 and coarse > 0 else None


def _traced(sampler: str | Callable[..., Vector], grid: Grid, options: Mapping[str, Any]) -> Plan:
    made = plan(sampler, grid, **options)
    if isinstance(made, EagerPlan):
        raise InvalidInputError(
            f"{made.sampler} chooses its steps by the data and has no table to check; compare its results with those "
            "of a sampler that has one"
        )
    return made


def _stated_order(entry: SamplerEntry, options: Mapping[str, Any]) -> int | None:
    """The order in the metadata, which is that of the defaults, and of `corrected` added to them."""
    default = SAMPLERS.find(entry.name)
    resolved = entry.resolve(options)
    if resolved == default.resolve({}):
        return entry.order
    if "corrected" in resolved and resolved == default.resolve({"corrected": True}):
        return entry.corrected_order
    return None


def _check_odd_grid(
    place: str, trace: Callable[[Grid], Plan], process: Process, ratios: list[float]
) -> None:
    grid = Grid.from_ratios(process, ratios)
    try:
        traced = trace(grid)
    except FewstepError as error:
        raise CheckFailedError(f"{place}: {error}") from error
    _require(
        trace(grid) == traced,
        f"{place}: two traces give two plans; take everything from tape, grid and options",
    )
    _require(
        Plan.from_json(traced.to_json()) == traced,
        f"{place}: the plan does not survive JSON; keep options to plain numbers, texts and lists",
    )
    _check_single_point(place, traced)


def _check_single_point(place: str, traced: Plan) -> None:
    """On a data set of one point the result is that point, with the noise of the last level."""
    x0, noise = torch.eye(2, dtype=torch.float64)[:, None]
    first, last = traced.levels[0], traced.levels[-1]
    start = first.alpha * x0 + first.sigma * noise
    point = _Exact(x0, 0.0, process=traced.process)
    result = traced.run(point, start, lambda a, b: 0 * noise)
    signal, kept = result[0].tolist()
    _require(
        "signal" in traced.inexact or _near(signal, last.alpha, 1e-6, 1e-6),
        f"{place}: of a data set of one point {signal:.9g} arrives at a level of alpha={last.alpha:.9g}",
    )
    _require(
        bool(traced.draws) or "noise" in traced.inexact or _near(kept, last.sigma, 1e-6, 1e-6),
        f"{place}: on a data set of one point the noise arrives times {kept:.9g} at a level of "
        f"sigma={last.sigma:.9g}; check its sign",
    )


def _check_paths(name: str, trace: Callable[[Grid], Plan]) -> None:
    """In `x / alpha` over `sigma / alpha` all processes have the same path."""
    ends = {
        process.name: _end(trace(_measuring_grid(process, 8, 0.0)), _guided_mixture(process))
        for process in (vp_continuous(), edm(), flow())
    }
    (_, wanted), *others = ends.items()
    for process, end in others:
        error = float((end - wanted).abs().max())
        _require(
            error <= 1e-8,
            f"{name}: on {process} it ends {error:.2g} away from where it ends on vp_continuous, in x / alpha; write "
            "the steps in x / alpha and sigma / alpha, and multiply by alpha at the end",
        )


def _measuring_grid(
    process: Process, steps: int, last: float | None = None, first: float = FIRST_RATIO
) -> Grid:
    """Every second step is twice as long, since smooth grids hide faults; one more step goes to `last`, if given."""
    ends = first ** (1 / 7), LAST_RATIO ** (1 / 7)
    path = np.cumsum([0.0, *(1.0 + np.arange(steps) % 2)])
    curve = (ends[0] + path / path[-1] * (ends[1] - ends[0])) ** 7
    return Grid.from_ratios(process, [*curve.tolist(), *([] if last is None else [last])])


class _Exact(GaussianMixture):
    """An exact denoiser for samplers that need guidance as well: away from another estimate, or off."""

    weak: GaussianMixture | None = None

    def guided_pair(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        denoised = self(x, level)
        return denoised, denoised if self.weak is None else self.weak(x, level)


def _mixture(process: Process) -> _Exact:
    means, widths, weights = (torch.tensor(v, dtype=torch.float64) for v in MIXTURE)
    return _Exact(means, widths, weights, process=process)


def _guided_mixture(process: Process) -> _Exact:
    """The mixture, with guidance away from a single Gaussian."""
    denoiser = _mixture(process)
    denoiser.weak = GaussianMixture(denoiser.means[:1], 1.0, process=process)
    return denoiser


def _normal(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, dtype=torch.float64, generator=generator)


def _end(traced: Plan, denoiser: _Exact) -> Tensor:
    """Where six points end, in `x / alpha`, with noise that belongs to the draw's number.

    Noise that is not that of the level may depend on the path, so it is left out.
    """
    first, last = traced.levels[0], traced.levels[-1]
    count, size = itertools.count(1), float("noise" not in traced.inexact)
    start = first.sigma * _normal(0)
    end = traced.run(denoiser, start, lambda a, b: size * _normal(next(count)))
    return end / last.alpha


@functools.cache
def _solution() -> Tensor:
    """Where the six points end without noise, by an adaptive solver of order 8: `dx^ / dlog_snr = D - x^`."""
    from scipy.integrate import solve_ivp

    denoiser, start = _mixture(edm()), HIGH_RATIO * _normal(0)

    def slope(log_snr: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).view_as(start)
        ratio = math.exp(-log_snr)
        return (denoiser(x, Level(ratio, 1.0, ratio)) - x).flatten().numpy()

    span = (-math.log(HIGH_RATIO), -math.log(LAST_RATIO))
    end = solve_ivp(slope, span, start.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(end.y[:, -1]).view_as(start)


def _point_error(traced: Plan) -> float:
    return float((_end(traced, _mixture(traced.process)) - _solution()).abs().max())


def _spread_error(traced: Plan) -> float:
    """Error of the result's standard deviation for normal data of width 1/2, worked out without sampling.

    The estimate of x_0 is linear there, so each register is a vector of weights on the normal numbers that went in.
    """
    start, *drawn = torch.eye(1 + traced.draws, dtype=torch.float64).split(1)
    left = iter(drawn)
    denoiser = _Exact(torch.zeros_like(start), 0.5, process=traced.process)

    def spread(level: Level) -> float:
        return math.hypot(level.alpha / 2, level.sigma)

    first, last = traced.levels[0], traced.levels[-1]
    result = traced.run(denoiser, spread(first) * start, lambda a, b: next(left))
    return abs(float(result.norm()) - spread(last)) / last.alpha


def _check_order(name: str, measured: float | None, order: float | None) -> None:
    if measured is None:
        return
    if order is None:
        _require(
            measured > 0.75,
            f"{name}: with twice the steps the error falls by a factor of {2**measured:.2f} only, so it does not "
            "converge to the solution; check the coefficients on the network's outputs",
        )
        return
    _require(
        abs(measured - order) <= 0.25,
        f"{name}: the measured order is {measured:.2f}, not {order:g}; check how the coefficients depend on the step "
        "sizes, or state the order that it has",
    )


# ---- denoisers -------------------------------------------------------------------------------

OTHER_KIND, OTHER_PROCESS = 1.1, 1.02
"""By what factor another reading of the network must explain the data better to be the right one. A wrong kind of
prediction does much damage, a similar process little."""

CERTAIN = 4.0
"""And by how many standard errors over the batch."""


@dataclass(frozen=True)
class DenoiserReport:
    """What `check_denoiser` measured. All errors are mean squared ones, divided by those of the best linear estimate.

    Attributes:
        reading: What the denoiser declares, such as "noise on vp_linear".
        error: Its error, the geometric mean over the levels; below 1 for a trained network.
        levels: The levels it was measured at, noisy to clean.
        errors: Its error at each of them.
        others: The errors of all other readings of the same network, the best first.
    """

    reading: str
    error: float
    levels: tuple[Level, ...]
    errors: tuple[float, ...]
    others: Mapping[str, float]

    def __str__(self) -> str:
        next_best = "".join(f"; {name}: {error:.3g}" for name, error in [*self.others.items()][:1])
        return f"{self.reading}: {self.error:.3g} times the error of the best linear estimate{next_best}"


def check_denoiser(denoiser: BaseDenoiser, x0: Tensor, levels: int = 6) -> DenoiserReport:
    """Find a wrong `predicts` or process from one batch of data.

    Noise is added to the data at several levels, and the estimates are compared with the data. The network is then
    read in every other way: with each other kind of prediction, and as trained on each other common process with the
    time that belongs to the level there. If another reading explains the data better, or the best linear estimate
    does, the declaration is wrong. Wrappers such as guidance are taken off first. Takes about 100 network passes.

    Args:
        denoiser: The denoiser, with its conditions for this batch.
        x0: A batch of the data that the network was trained on, scaled as in training, shape (B, ...); 64 are plenty.
        levels: How many noise levels to look at.

    Returns:
        What was measured.

    Raises:
        CheckFailedError: If the declaration is wrong, with the right one where there is one.
        InvalidInputError: If x0 is not a batch of floating-point data that differ.

    >>> from fewstep.process import vp_cosine
    >>> network = lambda x, t: x * vp_cosine().sigma(t)[:, None]  # exact for standard normal data
    >>> x0 = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    >>> print(check_denoiser(Denoiser(network, vp_cosine(), "noise"), x0).reading)
    noise on vp_cosine
    >>> check_denoiser(Denoiser(network, vp_cosine(), "data"), x0)
    Traceback (most recent call last):
    fewstep.errors.CheckFailedError: ...
    """
    if not isinstance(x0, Tensor) or not x0.is_floating_point() or x0.ndim < 2 or len(x0) < 2:
        raise InvalidInputError(
            "x0 must be a floating-point batch of at least 2 data points, shape (B, ...)"
        )
    if not float(x0.std()) > 0:
        raise InvalidInputError("x0 is constant, so it tells nothing; give real data")
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.inner
    trial = _Trial(x0, _log_snrs(denoiser.process, levels))
    own = trial.errors(denoiser)
    others = trial.others(denoiser) if isinstance(denoiser, Denoiser) else {}
    report = DenoiserReport(
        reading=_reading(denoiser),
        error=_mean(own),
        levels=tuple(trial.levels(denoiser.process)),
        errors=tuple(own.mean(1).tolist()),
        others={name: _mean(errors) for name, errors in others.items()},
    )
    _judge(report, own, others)
    return report


def _log_snrs(process: Process, count: int) -> list[float]:
    """Where networks differ: neither nearly pure noise nor nearly clean."""
    low = max(-2.5, process.noisiest.log_snr)
    high = min(3.0, process.least_noisy.log_snr)
    return np.linspace(low, high, count).tolist()


class _Trial:
    """One batch of data, one of noise, and the levels at which all readings of a network are compared."""

    def __init__(self, x0: Tensor, log_snrs: Sequence[float]) -> None:
        self.x0 = x0 if x0.dtype == torch.float64 else x0.float()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        self.noise = noise.to(self.x0)
        self.ratios = [math.exp(-v) for v in log_snrs]
        variance = float(self.x0.var())
        self.linear = [variance * r**2 / (variance + r**2) for r in self.ratios]

    def levels(self, process: Process) -> list[Level]:
        return process.levels_at(self.ratios)

    def points(self, process: Process) -> Iterable[tuple[Level, Tensor]]:
        for level in self.levels(process):
            yield level, level.alpha * self.x0 + level.sigma * self.noise

    @torch.no_grad()
    def errors(self, denoiser: BaseDenoiser) -> Tensor:
        """Of each image at each level, over the error of the best linear estimate, shape (levels, B)."""
        return self._errors([denoiser(x, level) for level, x in self.points(denoiser.process)])

    @torch.no_grad()
    def others(self, denoiser: Denoiser) -> dict[str, Tensor]:
        """The errors of every other reading of a network, the best first."""
        own = _reading(denoiser)
        found: dict[str, Tensor] = {}
        for process in {p.name: p for p in (*_common_processes(), denoiser.process)}.values():
            plain, scaled = (
                self._outputs(Denoiser(denoiser.network, process, kind, denoiser.conditions))
                for kind in ("data", "edm")
            )
            for kind in TARGETS:
                other = Denoiser(denoiser.network, process, kind, denoiser.conditions)
                outputs = scaled if kind == "edm" else plain
                if _reading(other) != own and outputs is not None:
                    found[_reading(other)] = self._errors(self._read(other, outputs))
        return dict(sorted(found.items(), key=lambda item: _mean(item[1])))

    def _outputs(self, denoiser: Denoiser) -> list[Tensor] | None:
        """The network's own outputs, or None where it does not take such times."""
        try:
            return [denoiser.output(x, level) for level, x in self.points(denoiser.process)]
        except Exception:  # a network may fail in any way on times that it was not made for
            return None

    def _read(self, denoiser: Denoiser, outputs: Iterable[Tensor]) -> Iterable[Tensor]:
        for (level, x), output in zip(self.points(denoiser.process), outputs, strict=True):
            skip, out = denoiser.parameterisation.skip_out(level)
            yield skip * x + out * output

    def _errors(self, estimates: Iterable[Tensor]) -> Tensor:
        squared = [(d.double() - self.x0.double()).square().flatten(1).mean(1) for d in estimates]
        linear = torch.tensor(self.linear, dtype=torch.float64)
        return (torch.stack(squared).cpu() / linear[:, None]).nan_to_num(math.inf, math.inf)


def _common_processes() -> tuple[Process, ...]:
    return (
        vp_linear(),
        vp_scaled_linear(),
        vp_cosine(),
        vp_continuous(),
        ve(),
        edm(),
        flow(),
    )


def _reading(denoiser: BaseDenoiser) -> str:
    kind = denoiser.predicts if isinstance(denoiser, Denoiser) else type(denoiser).__name__
    return f"{kind} on {denoiser.process.name}"


def _mean(errors: Tensor) -> float:
    """Geometric over the levels, so that each counts alike."""
    return float(errors.mean(1).clamp(min=1e-30).log().mean().exp())


def _judge(report: DenoiserReport, own: Tensor, others: Mapping[str, Tensor]) -> None:
    for other, error in [*report.others.items()][:1]:
        same_kind = _kind(other) == _kind(report.reading)
        needed = OTHER_PROCESS if same_kind else OTHER_KIND
        better = report.error / error if error > 0 else math.inf
        # what the best linear estimate does as well, any network might
        if error < 1 and better > needed and _certain(own, others[other]):
            raise CheckFailedError(
                f"declared {_differing(report.reading, other)} explains the data {better:.3g} times better"
            )
    if report.error > OTHER_KIND:
        raise CheckFailedError(
            f"declared {report.reading}, but the best linear estimate explains the data {report.error:.3g} times "
            "better, and no other reading of the network does better than that: it may be untrained, need other "
            "conditions, or expect data on another scale (images in [-1, 1])"
        )


def _certain(own: Tensor, other: Tensor) -> bool:
    """Whether the other's errors are smaller by more than the chance of the batch."""
    gain = ((own - other) / own.mean(1, keepdim=True)).mean(0)
    if not bool(gain.isfinite().all()):
        return bool(other.isfinite().all())
    return float(gain.mean()) > CERTAIN * float(gain.std()) / math.sqrt(len(gain))


def _kind(reading: str) -> str:
    return reading.split(" on ")[0]


def _differing(declared: str, other: str) -> str:
    """Name only what differs, as in "predicts='noise', but 'velocity'"."""
    (kind, process), (right_kind, right_process) = (r.split(" on ") for r in (declared, other))
    if process == right_process:
        return f"predicts={kind!r}, but {right_kind!r}"
    if kind == right_kind:
        return f"process={process}, but {right_process}"
    return f"predicts={kind!r} on {process}, but {right_kind!r} on {right_process}"
