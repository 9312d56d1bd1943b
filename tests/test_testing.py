"""The conformance checks pass what is right and find what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.denoisers import TARGETS, Parameterisation
from fewstep.errors import CheckFailedError, FewstepError, InvalidInputError, UnknownNameError
from fewstep.process.continuous import VE, ContinuousVP, Flow
from fewstep.samplers import SAMPLERS, SamplerEntry
from fewstep.samplers.steps import exponential_step, noise_estimate
from fewstep.schedulers import SCHEDULERS
from fewstep.testing import (
    ODD_GRIDS,
    check_denoiser,
    check_process,
    check_sampler,
    check_scheduler,
)
from sampler_cases import TRACED, corrected

# ---- processes -------------------------------------------------------------------------------

PROCESSES = [make() for name, make in fs.process.PROCESSES.items() if name != "vp_from_betas"] + [
    fs.process.vp_from_betas([0.1, 0.5, 0.2, 0.9]),
    fs.process.vp_linear(zero_terminal_snr=True),
    fs.process.vp_cosine(steps=50),
    fs.process.ve(0.002, 500.0),
]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_our_processes_pass(process: fs.Process) -> None:
    check_process(process)


class Falling(ContinuousVP):
    """Noise that falls again near the end."""

    def _log_snr(self, t: Tensor) -> Tensor:
        return super()._log_snr(torch.where(t > 0.9, 1.8 - t, t))


class BadInverse(Flow):
    def _time(self, log_snr: Tensor) -> Tensor:
        return 0.99 * super()._time(log_snr)


class NeverClean(ContinuousVP):
    def _log_snr(self, t: Tensor) -> Tensor:
        return super()._log_snr(t.clamp(min=1e-4))


class BadTable(VE):
    def table_time(self, index: float) -> float:
        return 0.9 * super().table_time(index)


class BadRatio(Flow):
    def ratio(self, t: Any) -> Any:
        return 1.01 * super().ratio(t)


class BadAlpha(Flow):
    def alpha(self, t: Any) -> Any:
        return 0.99 * super().alpha(t)


class BadTensors(Flow):
    def sigma(self, t: Any) -> Any:
        sigma = super().sigma(t)
        return sigma.float() if isinstance(t, Tensor) and t.ndim == 1 else sigma


class BadAddNoise(Flow):
    def add_noise(self, x0: Tensor, noise: Tensor, t: Any) -> Tensor:
        return super().add_noise(x0, 1.01 * noise, t)


class ForgetsOptions(VE):
    def to_dict(self) -> dict[str, Any]:
        return {"name": "ve"}


class OddOptions(Flow):
    def to_dict(self) -> dict[str, Any]:
        return {"name": "mine", "table": object()}


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (Falling(0.1, 20.0, 1e-3), "must rise with the time, but falls"),
        (BadInverse(1e-3), "_time must be the inverse"),
        (NeverClean(0.1, 20.0, 1e-3), "at clean_time=0 .* must be 1 and 0"),
        (BadTable(0.01, 50.0), "training table ends at t=0.9 where t_max=1"),
        (BadRatio(1e-3), r"(ratio|log_snr)\(.*but its alpha and sigma give"),
        (BadAlpha(1e-3), "alpha of a tensor of times differs"),
        (BadTensors(1e-3), "sigma of a tensor of times differs"),
        (BadAddNoise(1e-3), "add_noise of a tensor of times differs"),
        (ForgetsOptions(0.01, 30.0), "put all arguments into options"),
        (OddOptions(1e-3), "not plain data"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_broken_processes_are_found(process: fs.Process, message: str) -> None:
    with pytest.raises(CheckFailedError, match=message):
        check_process(process)


# ---- schedulers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [e.name for e in SCHEDULERS])
def test_our_schedulers_pass(name: str) -> None:
    check_scheduler(name)
    check_scheduler(getattr(fs.schedulers, name), fs.process.vp_sigmoid())


def test_options_reach_the_scheduler() -> None:
    check_scheduler("karras", rho=3.0)
    with pytest.raises(CheckFailedError, match="option of karras 'roh'; did you mean 'rho'"):
        check_scheduler("karras", roh=3.0)
    with pytest.raises(CheckFailedError, match="unknown scheduler 'karas'"):
        check_scheduler("karas")


def ratios_of(process: fs.Process, steps: int) -> list[float]:
    return fs.schedulers.exponential(process, steps).ratios


def no_clean_end(process: fs.Process, steps: int) -> fs.Grid:
    levels = fs.schedulers.exponential(process, steps + 1).levels
    return fs.Grid(process, levels[:-1])


def one_too_many(process: fs.Process, steps: int) -> fs.Grid:
    return fs.schedulers.exponential(process, steps + 1)


def too_noisy(process: fs.Process, steps: int) -> fs.Grid:
    ratios = ratios_of(process, steps)
    return fs.Grid.from_ratios(process, [2 * ratios[0], *ratios[1:]])


def wrong_times(process: fs.Process, steps: int) -> fs.Grid:
    def shifted(level: fs.Level) -> fs.Level:
        return level if level.is_clean else dataclasses.replace(level, t=level.t * 0.98)

    levels = fs.schedulers.exponential(process, steps).levels
    return fs.Grid(process, tuple(map(shifted, levels)))


def another_process(process: fs.Process, steps: int) -> fs.Grid:
    return fs.schedulers.exponential(fs.process.ve(), steps)


def a_list(process: fs.Process, steps: int) -> Any:
    return ratios_of(process, steps)


def moody() -> Callable[..., fs.Grid]:
    count = itertools.count(1)

    def make(process: fs.Process, steps: int) -> fs.Grid:
        return fs.schedulers.karras(process, steps, rho=float(next(count)))

    return make


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (no_clean_end, "is not clean; append 0"),
        (one_too_many, "the grid has 2; n steps need n levels"),
        (too_noisy, "outside the process's range"),
        (wrong_times, "whose time is"),
        (another_process, "the grid belongs to ve"),
        (a_list, "gives a list; return a fewstep.Grid"),
        (moody(), "two calls give two grids"),
    ],
    ids=lambda v: getattr(v, "__name__", "message"),
)
def test_broken_schedulers_are_found(scheduler: Callable[..., Any], message: str) -> None:
    with pytest.raises(CheckFailedError, match=message):
        check_scheduler(scheduler, fs.process.vp_linear())


# ---- samplers --------------------------------------------------------------------------------


SLOW_TO_CONVERGE = {"dpmpp_dual_sde_momentumized": 0.75}
"""Orders that are still this far down at the most steps at which they are measured, and rise to that stated."""


@pytest.mark.parametrize("entry", TRACED, ids=lambda e: e.name)
def test_our_samplers_pass(entry: SamplerEntry) -> None:
    order = SLOW_TO_CONVERGE.get(entry.name, entry.order)
    report = check_sampler(entry.name, None if order == entry.order else order)
    assert report.name == entry.name
    plan = fs.plan(entry.name, fs.schedulers.karras(fs.process.edm(), 20))
    inexact = entry.stochastic and "noise" in plan.inexact
    assert report.order == (pytest.approx(order, abs=0.25) if order and not inexact else None)
    assert str(report).startswith(f"{entry.name}: measured ")


@pytest.mark.parametrize("entry", [e for e in TRACED if e.corrected_order], ids=lambda e: e.name)
def test_our_corrected_samplers_pass(entry: SamplerEntry) -> None:
    case = corrected(entry)
    report = check_sampler(entry.name, entry.corrected_order, options=case.options, odd_grids=())
    assert report.order == pytest.approx(entry.corrected_order, abs=0.25)


def test_the_metadata_of_the_defaults_says_nothing_of_other_options() -> None:
    assert check_sampler("dpmpp_3m", options={"corrected": True}, odd_grids=()).order > 2.75
    report = check_sampler("uni_pc_bh2", odd_grids=())  # a preset of order 4
    assert report.order == pytest.approx(4, abs=0.25)
    with pytest.raises(CheckFailedError, match="dpmpp_3m: the measured order is 3.*, not 2"):
        check_sampler("dpmpp_3m", 2, options={"corrected": True}, odd_grids=())


def test_a_method_that_solves_nothing_has_no_order() -> None:
    assert check_sampler("lcm").order is None
    assert check_sampler(never_looks, 0, odd_grids=("from pure noise",)).order is None


def test_samplers_that_choose_their_steps_by_the_data_are_refused() -> None:
    with pytest.raises(CheckFailedError, match="rk45 chooses its steps by the data"):
        check_sampler("rk45")


@pytest.mark.parametrize("order", [1, 3])
def test_options_and_the_expected_order_are_apart(order: int) -> None:
    report = check_sampler("unipc", order=order + 1, options={"order": order})
    assert report.order == pytest.approx(order + 1, abs=0.25)
    with pytest.raises(CheckFailedError, match=rf"the measured order is .*, not {order}"):
        check_sampler("unipc", order=order, options={"order": order}, odd_grids=())


def test_inexact_noise_has_no_order() -> None:
    assert check_sampler("ddpm", options={"variance": "large"}).order is None
    assert check_sampler("euler_ancestral", options={"s_noise": 1.1}).order is None


def test_unknown_samplers_and_grids_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown sampler 'eler'"):
        check_sampler("eler")
    with pytest.raises(
        UnknownNameError, match="unknown odd grid 'one stp'; did you mean 'one step'"
    ):
        check_sampler("euler", odd_grids=["one stp"])


def midpoint(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """A right one of the user's own: second order, the slope taken halfway in log_snr."""
    x = tape.start
    for t, s in grid.steps:
        denoised = tape.denoise(x, t)
        if not (s.is_clean or t.is_pure_noise):
            (m,) = grid.process.levels_at([math.sqrt(t.ratio * s.ratio)])
            halfway = exponential_step(x, denoised, t, m)
            denoised = tape.denoise(halfway, m)
        x = exponential_step(x, denoised, t, s)
    return x


def test_a_users_own_sampler_passes() -> None:
    report = check_sampler(midpoint, order=2)
    assert report.name == "midpoint"
    assert report.order == pytest.approx(2, abs=0.25)
    assert report.calls == 19


def stops_early(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    x = tape.start
    for t, s in grid.steps[:-1]:
        x = exponential_step(x, tape.denoise(x, t), t, s)
    return x


def divides_by_sigma(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    x = tape.start
    for t, s in grid.steps:
        x = exponential_step(x, tape.denoise(x, t), t, s) * (s.sigma / s.sigma)
    return x


def flips_the_noise(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    x = tape.start
    for t, s in grid.steps:
        d = tape.denoise(x, t)
        x = s.alpha * d - s.sigma * noise_estimate(x, d, t)
    return x


def steps_in_sigma(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """Heun's method in sigma instead of sigma / alpha: right on VE, and another method elsewhere."""
    x = tape.start
    for t, s in grid.steps:
        d = tape.denoise(x, t)
        predicted = exponential_step(x, d, t, s)
        if not (s.is_clean or t.is_pure_noise):
            weight = s.sigma / (s.sigma + t.sigma)
            d = (1 - weight) * d + weight * tape.denoise(predicted, s)
            predicted = exponential_step(x, d, t, s)
        x = predicted
    return x


def moody_sampler() -> Callable[..., fs.Vector]:
    count = itertools.count()

    def sampler(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        heun = SAMPLERS.find("heun").function
        euler = SAMPLERS.find("euler").function
        return (heun if next(count) % 2 else euler)(tape, grid)

    return sampler


def looks_back_wrongly(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """DPM-Solver++(2M) without the ratio of the steps, which smooth grids would hide."""
    x, previous = tape.start, None
    for t, s in grid.steps:
        d = target = tape.denoise(x, t)
        if previous is not None and not s.is_clean:
            target = d + (d - previous) / 2
        x = exponential_step(x, target, t, s)
        previous = d
    return x


def never_looks(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """Reuses the first estimate for ever: it converges to nothing."""
    first = tape.denoise(tape.start, grid.levels[0])
    return exponential_step(tape.start, first, grid.levels[0], grid.levels[-1])


def too_little_noise(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
    """Fresh noise of the right size put where the kept noise should be: independent each time."""
    x = tape.start
    for t, s in grid.steps:
        x = s.alpha * tape.denoise(x, t)
        if not s.is_clean:
            x = x + s.sigma * tape.noise(t, s)
    return x


@pytest.mark.parametrize(
    ("sampler", "order", "message"),
    [
        (stops_early, 1, "stops_early on one step: .*breaks the signal rule"),
        (divides_by_sigma, 1, "divides_by_sigma on one step: .*cannot run on this grid"),
        (flips_the_noise, 1, "the noise arrives times -.*check its sign"),
        (steps_in_sigma, 2, "in x / alpha; write the steps in x / alpha"),
        (moody_sampler(), 1, "two traces give two plans"),
        (looks_back_wrongly, 2, "the measured order is .*, not 2"),
        (midpoint, 3, r"the measured order is (1\.9|2\.0).*, not 3"),
        (midpoint, 1.5, r"the measured order is (1\.9|2\.0).*, not 1\.5"),
        (never_looks, None, "does not converge to the solution"),
        (too_little_noise, None, "does not converge to the solution"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_broken_samplers_are_found(
    sampler: Callable[..., Any], order: float | None, message: str
) -> None:
    with pytest.raises(CheckFailedError, match=message):
        check_sampler(sampler, order)


def test_a_sampler_may_be_let_off_grids_that_it_is_not_meant_for() -> None:
    def needs_an_inside(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        if len(grid.steps) < 2:
            raise InvalidInputError("needs 2 steps or more")
        return SAMPLERS.find("euler").function(tape, grid)

    with pytest.raises(CheckFailedError, match="needs_an_inside on one step: needs 2 steps"):
        check_sampler(needs_an_inside)
    check_sampler(needs_an_inside, 1, odd_grids=[n for n in ODD_GRIDS if "one step" not in n])


# ---- denoisers -------------------------------------------------------------------------------

PATHS = {
    p.name: p
    for p in (
        fs.process.vp_linear(),
        fs.process.vp_scaled_linear(),
        fs.process.vp_cosine(),
        fs.process.vp_continuous(),
        fs.process.ve(),
        fs.process.edm(),
        fs.process.flow(),
    )
}
MEANS = torch.rand(5, 16, generator=torch.Generator().manual_seed(5)) * 1.6 - 0.8


def data(n: int = 96) -> Tensor:
    mixture = fs.exact.GaussianMixture(MEANS, 0.15, process=PATHS["edm"])
    return mixture.sample(n, torch.Generator().manual_seed(1))


def exact_network(process: fs.Process, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A perfect network of a kind on a process; like a real one it answers at any time whatever."""
    mixture = fs.exact.GaussianMixture(MEANS, 0.15, process=process)
    form = Parameterisation(kind)

    def network(x: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        if kind == "edm":
            (level,) = process.levels_at([math.exp(min(max(4 * time, -20.0), 20.0))])
            x = x / form.input_scale(level)
        else:
            level = process.level(min(max(time, process.t_min), 0.9999 * process.t_max))
        skip, out = form.skip_out(level)
        return (mixture(x, level) - skip * x) / out

    return network


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("process", PATHS.values(), ids=PATHS)
def test_right_declarations_pass(process: fs.Process, kind: str) -> None:
    report = check_denoiser(fs.Denoiser(exact_network(process, kind), process, kind), data())
    assert report.reading == f"{kind} on {process.name}"
    assert report.error < 0.8
    assert len(report.levels) == len(report.errors) == 6
    assert min(report.others.values()) > 0.99 * report.error
    assert str(report).startswith(f"{kind} on {process.name}: ")


@pytest.mark.parametrize("declared", TARGETS)
@pytest.mark.parametrize("kind", TARGETS)
def test_every_wrong_kind_is_found(kind: str, declared: str) -> None:
    if kind == declared:
        return
    process = PATHS["vp_linear" if kind < declared else "flow"]
    denoiser = fs.Denoiser(exact_network(process, kind), process, declared)
    with pytest.raises(CheckFailedError) as caught:
        check_denoiser(denoiser, data())
    message = str(caught.value)
    if kind == "edm":  # such a network is told the noise level itself, so it fits every process
        assert f"declared predicts={declared!r}" in message
        assert "but 'edm'" in message
    else:
        assert message.startswith(
            f"declared predicts={declared!r}, but {kind!r} explains the data "
        )
        assert message.endswith(" times better")


@pytest.mark.parametrize("declared", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("process", PATHS.values(), ids=PATHS)
def test_every_wrong_process_is_found(process: fs.Process, declared: fs.Process) -> None:
    kind = ("noise", "velocity", "data")[len(process.name) % 3]
    if process == declared:
        return
    with pytest.raises(CheckFailedError) as caught:
        check_denoiser(fs.Denoiser(exact_network(process, kind), declared, kind), data())
    assert f"declared process={declared.name}, but {process.name} explains" in str(caught.value)


def test_a_wrong_kind_on_a_wrong_process_is_found() -> None:
    network = exact_network(PATHS["vp_cosine"], "velocity")
    denoiser = fs.Denoiser(network, PATHS["flow"], "noise")
    message = "declared predicts='noise' on flow, but 'velocity' on vp_cosine explains"
    with pytest.raises(CheckFailedError, match=message):
        check_denoiser(denoiser, data())


@pytest.mark.parametrize(
    "network",
    [
        lambda x, t: torch.zeros_like(x),
        lambda x, t: x.cos(),
        lambda x, t: torch.full_like(x, math.nan),
        lambda x, t: 100 * x,
    ],
)
def test_an_untrained_network_is_found(network: Callable[..., Tensor]) -> None:
    with pytest.raises(CheckFailedError, match="best linear estimate explains .*untrained"):
        check_denoiser(fs.Denoiser(network, PATHS["vp_linear"], "noise"), data())


def test_data_on_the_wrong_scale_is_found() -> None:
    network = exact_network(PATHS["vp_linear"], "velocity")
    with pytest.raises(CheckFailedError):
        check_denoiser(fs.Denoiser(network, PATHS["vp_linear"], "velocity"), 127.5 * (data() + 1))


def test_a_network_that_fails_on_strange_times_passes_on_its_own() -> None:
    process = PATHS["vp_linear"]
    inner = exact_network(process, "noise")

    def strict(x: Tensor, t: Tensor) -> Tensor:
        if not bool(((t >= 1) & (t <= 999)).all()):
            raise IndexError("no embedding for this time")
        return inner(x, t)

    report = check_denoiser(fs.Denoiser(strict, process, "noise"), data())
    assert all("ve" != name.split(" on ")[1] for name in report.others)
    assert "velocity on vp_linear" in report.others


def test_wrappers_are_taken_off_and_conditions_kept() -> None:
    process = PATHS["vp_linear"]
    inner = exact_network(process, "noise")
    seen = []

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return inner(x, t)

    labels = torch.arange(96)
    conditioned = fs.Denoiser(network, process, "noise").with_conditions(labels=labels)
    report = check_denoiser(fs.Clipped(conditioned, -0.01, 0.01), data())
    assert report.reading == "noise on vp_linear"
    assert seen
    assert all(given is labels for given in seen)


def test_a_closed_form_passes() -> None:
    mixture = fs.exact.GaussianMixture(MEANS, 0.15, process=PATHS["vp_linear"])
    report = check_denoiser(mixture, data())
    assert report.reading == "GaussianMixture on vp_linear"
    assert report.others == {}
    wrong = fs.exact.GaussianMixture(MEANS + 1, 0.15, process=PATHS["vp_linear"])
    with pytest.raises(CheckFailedError, match="best linear estimate"):
        check_denoiser(wrong, data())


def test_a_bfloat16_network_and_doubled_channels_are_no_obstacle() -> None:
    process = PATHS["vp_linear"]
    inner = exact_network(process, "noise")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out = inner(x.float(), t)
            return torch.cat([out, out], 1).bfloat16()

    report = check_denoiser(fs.Denoiser(Net(), process, "noise"), data())
    assert report.error < 0.8


def test_the_same_answer_every_time() -> None:
    denoiser = fs.Denoiser(exact_network(PATHS["flow"], "flow"), PATHS["flow"], "flow")
    assert check_denoiser(denoiser, data()) == check_denoiser(denoiser, data())


@pytest.mark.parametrize(
    "x0",
    [
        None,
        torch.zeros(4, 3),
        torch.ones(1, 3),
        torch.rand(5),
        torch.zeros(4, 3, dtype=torch.uint8),
        torch.full((4, 3), math.nan),
    ],
    ids=lambda x: "none" if x is None else f"{tuple(x.shape)}-{x.dtype}",
)
def test_data_that_cannot_be_used_is_refused(x0: Any) -> None:
    denoiser = fs.Denoiser(lambda x, t: x, PATHS["flow"], "flow")
    with pytest.raises(InvalidInputError, match="x0"):
        check_denoiser(denoiser, x0)


def test_failures_are_errors_of_ours_and_assertions() -> None:
    assert issubclass(CheckFailedError, FewstepError)
    assert issubclass(CheckFailedError, AssertionError)
