"""Every sampler on any grid: finite coefficients, and the right marginal on a data set of one point."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fewstep as fs
from exact_problems import Gaussian
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.plan import Combine, Denoise, Differentiate, Draw, Plan
from fewstep.plan.instructions import CALLS, reads, writes
from fewstep.samplers import SAMPLERS, SamplerEntry
from sampler_cases import APART, CASES, ENTRIES, TRACED, Case

PROCESSES = [
    fs.process.vp_linear(),
    fs.process.vp_scaled_linear(zero_terminal_snr=True),
    fs.process.ve(),
    fs.process.edm(),
    fs.process.flow(),
]
LAST_STEP_OF_ITS_OWN = {
    "edict": "mixes its two points once more",
    "bdia": "takes the last step like the others, so that it can be run backwards",
    "belm": "likewise",
    "cfgpp_ud10_ab": "extrapolates the guided estimate",
}
"""Samplers whose last step to clean data is not the last estimate, and what it is."""

INEXACT = {
    "edict": {
        "noise"
    },  # its two points carry noise of two sizes, which the mixing brings together
    "ipndm_v": {"noise"},  # the published weights do not add up to 1
    "sde_dpm_solver": {
        "noise"
    },  # an exponential integrator of the noise keeps its size only to its order
}
"""The only samplers that may break a rule with their default options, and which."""


def random_grid(seed: int, pure: bool, clean: bool) -> fs.Grid:
    """2 to 100 levels with steps of every size from 1e-3 to 5 in log_snr."""
    rng = random.Random(seed)
    process = rng.choice(PROCESSES)
    pure = pure and process.name not in ("ve", "edm")
    ratio, ratios = math.exp(rng.uniform(-3, 7)), [math.inf] * pure
    for _ in range(rng.randint(2, 100) - pure - clean):
        ratios.append(ratio)
        ratio *= math.exp(-math.exp(rng.uniform(math.log(1e-3), math.log(5))))
    return fs.Grid.from_ratios(process, [*ratios, *([0.0] if clean or len(ratios) < 2 else [])])


class Marginal(NamedTuple):
    """What a point holds of x_0 and of noise when every estimate is x_0, and how large the outputs in it are."""

    level: fs.Level
    signal: float
    noise: float
    outputs: float


def marginals(plan: Plan) -> Iterator[Marginal]:
    """The marginals of the evaluated points and of the result.

    Worked out from the instructions with numbers of its own: register = [x_0 and noise of the start, draws, outputs].
    """
    outputs = sum(len(writes(i)) for i in plan.instructions if isinstance(i, Denoise))
    noises = 2 + plan.draws
    free_noises, free_outputs = np.split(np.eye(noises + outputs), [noises])
    signal, start, *draws = free_noises
    draws, estimates = iter(draws), iter(free_outputs)
    values = {0: plan.levels[0].alpha * signal + plan.levels[0].sigma * start}
    last_use = {register: k for k, i in enumerate(plan.instructions) for register in reads(i)}

    def marginal(register: int, level: fs.Level) -> Marginal:
        known, made = np.split(values[register], [noises])
        size = float(np.abs(made).sum())
        return Marginal(level, known[0] + made.sum(), float(np.linalg.norm(known[1:])), size)

    for k, i in enumerate(plan.instructions):
        if isinstance(i, CALLS):
            yield marginal(i.point, i.level)
        if isinstance(i, Combine):
            values[i.out] = np.sum([c * values[r] for r, c in i.terms], axis=0)
        elif isinstance(i, Draw):
            values[i.out] = next(draws)
        elif isinstance(i, Differentiate):
            values[i.out] = 0 * signal
        else:
            values |= {register: next(estimates) for register in writes(i)}
        for register in reads(i):
            if last_use[register] == k and register != plan.result:
                values.pop(register, None)
    yield marginal(plan.result, plan.levels[-1])


def sweep(examples: int) -> settings:
    """No shrinking: the seed of a grid has no simpler neighbours."""
    return settings(max_examples=examples, phases=(Phase.explicit, Phase.generate))


GRIDS = {"seed": st.integers(0, 2**32), "pure": st.booleans(), "clean": st.booleans()}


@pytest.mark.parametrize("case", [c for c in CASES if c.is_named], ids=str)
@given(**GRIDS)
@sweep(10)
def test_any_grid_has_a_finite_table_that_is_exact_for_one_point_and_survives_json(
    case: Case, seed: int, pure: bool, clean: bool
) -> None:
    check_table(case, random_grid(seed, pure, clean))


@pytest.mark.parametrize("case", [c for c in CASES if not c.is_named], ids=str)
@given(**GRIDS)
@sweep(2)
def test_so_it_is_with_every_option(case: Case, seed: int, pure: bool, clean: bool) -> None:
    check_table(case, random_grid(seed, pure, clean))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@given(**GRIDS)
@sweep(50)
def test_so_it_is_on_many_grids(case: Case, seed: int, pure: bool, clean: bool) -> None:
    check_table(case, random_grid(seed, pure, clean))


def check_table(case: Case, grid: fs.Grid) -> None:
    plan = fs.plan(case.name, grid, **case.options)
    if not case.options:
        assert set(plan.inexact) <= INEXACT.get(case.name, set())
    coefficients = [c for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms]
    assert all(math.isfinite(c) for c in coefficients)
    for level, signal, noise, outputs in marginals(plan):
        rounding = 1e-11 * (plan.levels[0].sigma + outputs)
        if "signal" not in plan.inexact:
            assert abs(signal - level.alpha) <= 1e-8 * (level.alpha + outputs)
        if "noise" not in plan.inexact:
            assert abs(noise - level.sigma) <= 1e-8 * level.sigma + rounding
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text


@pytest.mark.parametrize("entry", APART, ids=lambda e: e.name)
def test_samplers_without_a_table_or_with_a_trained_companion_have_tests_of_their_own(
    entry: SamplerEntry,
) -> None:
    here = Path(__file__)
    others = [p for p in here.parent.glob("test_*.py") if p != here]
    assert any(f'"{entry.name}"' in p.read_text(encoding="utf-8") for p in others)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_do_not_matter(case: Case) -> None:
    """Points, images and videos: with an elementwise denoiser the same numbers, in whatever shape."""
    process = fs.process.flow()
    plan = fs.plan(
        case.name, fs.Grid.from_ratios(process, [20.0, 5.0, 1.0, 0.2, 0.0]), **case.options
    )
    generator = torch.Generator().manual_seed(0)
    x, *draws = torch.randn(1 + plan.draws, 48, dtype=torch.float64, generator=generator)
    results = []
    for shape in ((24, 2), (4, 3, 2, 2), (2, 3, 2, 2, 2)):
        left = iter(draws)
        result = plan.run(
            Gaussian(), x.view(shape), lambda a, b, left=left, shape=shape: next(left).view(shape)
        )
        assert result.shape == shape
        results.append(result.flatten())
    assert bool(results[0].isfinite().all())
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@pytest.mark.parametrize("entry", TRACED, ids=lambda e: e.name)
def test_levels_and_calls_are_those_of_the_metadata(entry: SamplerEntry) -> None:
    calls = {}
    for steps in (1, 2, 3, 10, 20):
        grid = fs.schedulers.karras(fs.process.vp_linear(), steps)
        plan = fs.plan(entry.name, grid)
        asked = [i.level for i in plan.instructions if isinstance(i, CALLS)]
        assert plan.calls == len(asked) == (calls.setdefault(steps, len(asked)))
        assert asked[0].ratio >= grid.levels[0].ratio  # higher with churn
        assert all(grid.levels[-2].ratio <= level.ratio for level in asked)
        assert plan.levels == grid.levels
    assert calls[20] - calls[10] == 10 * entry.calls_per_step


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_metadata_is_complete_and_consistent(entry: SamplerEntry) -> None:
    assert entry.summary.endswith(".")
    assert entry.paper
    assert entry.order >= 0
    assert entry.calls_per_step >= 1
    names = {option.name for option in entry.options}
    assert bool(entry.mistake) == ("corrected" in names)
    assert not entry.mistake.endswith(".")
    assert bool(entry.mistake) or entry.corrected_order is None
    if entry.family in ("ODE", "SDE"):
        assert entry.stochastic == (entry.family == "SDE")
    for preset, options in entry.presets.items():
        assert SAMPLERS.find(preset).resolve({}) == entry.resolve(options)


@pytest.mark.parametrize("entry", TRACED, ids=lambda e: e.name)
def test_metadata_says_whether_noise_is_drawn(entry: SamplerEntry) -> None:
    plan = fs.plan(entry.name, fs.schedulers.karras(fs.process.edm(), 40))
    assert (plan.draws > 0) == entry.stochastic


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_ancestral"])
def test_no_noise_is_drawn_for_the_last_step_or_for_eta_zero(name: str) -> None:
    grid = fs.schedulers.karras(fs.process.edm(), 5)
    options = {"ddpm": {}, "ddim": {"eta": 1.0}, "euler_ancestral": {}}[name]
    draws = [i for i in fs.plan(name, grid, **options).instructions if isinstance(i, Draw)]
    assert [(d.start, d.end) for d in draws] == list(grid.steps[:-1])
    if name != "ddpm":
        assert fs.plan(name, grid, eta=0.0).draws == 0


@pytest.mark.parametrize(
    "entry", [e for e in TRACED if e.name not in LAST_STEP_OF_ITS_OWN], ids=lambda e: e.name
)
def test_the_last_step_to_clean_data_returns_the_last_estimate(entry: SamplerEntry) -> None:
    for ratios in ([3.0, 1.0, 0.0], [40.0, 9.0, 3.0, 1.0, 0.3, 0.1, 0.0]):
        plan = fs.plan(entry.name, fs.Grid.from_ratios(fs.process.flow(), ratios))
        estimates = [i.out for i in plan.instructions if isinstance(i, Denoise)]
        assert plan.result == estimates[-1]


@pytest.mark.parametrize("entry", TRACED, ids=lambda e: e.name)
def test_a_step_from_pure_noise_is_taken_by_itself(entry: SamplerEntry) -> None:
    """No method can look back past log_snr = -inf: the rest runs as though it had started after the first step."""
    process, noise = fs.process.flow(), fs.Noise([0], (1,), dtype=torch.float64)

    def run(x: torch.Tensor, *ratios: float) -> torch.Tensor:
        plan = fs.plan(entry.name, fs.Grid.from_ratios(process, ratios))
        return plan.run(Gaussian(), x, noise)

    rest = (9.0, 3.0, 1.0, 0.3, 0.0)
    whole = run(noise.initial(), math.inf, *rest)
    in_two = run(run(noise.initial(), math.inf, 9.0), *rest)
    torch.testing.assert_close(whole, in_two, rtol=1e-12, atol=1e-12)


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    grid = fs.schedulers.karras(fs.process.edm(), 5)
    with pytest.raises(UnknownNameError, match="unknown sampler 'dimm'; did you mean .*ddim"):
        fs.plan("dimm", grid)
    with pytest.raises(UnknownNameError, match="option of ddim 'etta'; did you mean 'eta'"):
        fs.plan("ddim", grid, etta=1)
    with pytest.raises(InvalidInputError, match=r"unipc: order=0 is not a whole number in 1\.\.6"):
        fs.plan("unipc", grid, order=0)
    with pytest.raises(
        InvalidInputError, match="variance='medium' is not one of posterior, large"
    ):
        fs.plan("ddpm", grid, variance="medium")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_names_titles_and_aliases_find_the_same_sampler(entry: SamplerEntry) -> None:
    grid = fs.schedulers.karras(fs.process.edm(), 5)
    for name in (entry.title, entry.name.upper(), *entry.aliases):
        assert SAMPLERS.find(name) is entry
    if entry in TRACED:
        for preset, options in entry.presets.items():
            assert fs.plan(preset, grid) == fs.plan(entry.name, grid, **options)
