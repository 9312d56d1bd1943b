"""Every sampler on any grid: finite coefficients, and the right marginal on a data set of one point."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.plan import Combine, Denoise, Draw, Plan
from fewstep.samplers import SAMPLERS, SamplerEntry

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "large"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 3.0}),
    ("euler", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"s_noise": 1.1}),
    ("heun", {}),
    ("dpmpp_2m", {}),
    *(
        ("unipc", {"order": p, "variant": v, "lower_order_final": low})
        for p in (1, 2, 3, 6)
        for v in ("bh1", "bh2")
        for low in (True, False)
    ),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in VARIANTS]
PROCESSES = [
    fs.process.vp_linear(),
    fs.process.vp_scaled_linear(zero_terminal_snr=True),
    fs.process.ve(),
    fs.process.edm(),
    fs.process.flow(),
]


def random_ratios(seed: int) -> list[float]:
    """2 to 60 levels with steps of every size from 1e-3 to 5 in log_snr."""
    rng = random.Random(seed)
    ratio, ratios = math.exp(rng.uniform(-3, 7)), []
    for _ in range(rng.randint(2, 60)):
        ratios.append(ratio)
        ratio *= math.exp(-math.exp(rng.uniform(math.log(1e-3), math.log(5))))
    return ratios


def random_grid(seed: int, pure: bool, clean: bool) -> fs.Grid:
    process = random.Random(seed).choice(PROCESSES)
    pure = pure and process.name not in ("ve", "edm")
    return fs.Grid.from_ratios(
        process, [math.inf] * pure + random_ratios(seed + 1) + [0.0] * clean
    )


def marginals(plan: Plan) -> list[tuple[float, float, fs.Level]]:
    """Signal and noise of each evaluated point and the result when every estimate is x_0.

    Worked out from the instructions with numbers of its own: register = (part of x_0, parts of the noises).
    """
    first, last = plan.levels[0], plan.levels[-1]
    size = 2 + plan.draws
    unit = np.eye(size)
    values = {0: first.alpha * unit[0] + first.sigma * unit[1]}
    draws, found = iter(unit[2:]), []
    for i in plan.instructions:
        if isinstance(i, Combine):
            values[i.out] = sum(c * values[r] for r, c in i.terms)
        elif isinstance(i, Draw):
            values[i.out] = next(draws)
        else:
            found.append((values[i.point], i.level))
            values[i.out] = unit[0]
    found.append((values[plan.result], last))
    return [(float(v[0]), float(np.linalg.norm(v[1:])), level) for v, level in found]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
@given(seed=st.integers(0, 2**32), pure=st.booleans(), clean=st.booleans())
@settings(max_examples=25)
def test_every_point_lies_on_the_marginal_of_its_level(
    name: str, options: dict[str, Any], seed: int, pure: bool, clean: bool
) -> None:
    grid = random_grid(seed, pure, clean)
    plan = fs.plan(name, grid, **options)
    coefficients = [c for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms]
    assert all(math.isfinite(c) for c in coefficients)
    noise_is_exact = options.get("variance") != "large" and options.get("s_noise", 1.0) == 1.0
    assert plan.inexact == (() if noise_is_exact else ("noise",))
    size = max([1.0, *map(abs, coefficients)])
    for signal, noise, level in marginals(plan):
        assert signal == pytest.approx(level.alpha, rel=1e-9, abs=1e-11 * size)
        if noise_is_exact:
            assert noise == pytest.approx(level.sigma, rel=1e-9, abs=1e-11 * size)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_levels_and_calls_are_those_of_the_grid(name: str, options: dict[str, Any]) -> None:
    entry = SAMPLERS.find(name)
    for steps in (1, 2, 3, 10):
        grid = fs.schedulers.karras(fs.process.vp_linear(), steps)
        plan = fs.plan(name, grid, **options)
        asked = [i.level for i in plan.instructions if isinstance(i, Denoise)]
        assert plan.calls == len(asked) == entry.calls_per_step * (steps - 1) + 1
        assert set(asked) == set(grid.levels[:-1])
        assert asked[0] == grid.levels[0]
        assert plan.levels == grid.levels


@pytest.mark.parametrize("entry", list(SAMPLERS), ids=lambda e: e.name)
def test_metadata_says_whether_noise_is_drawn(entry: SamplerEntry) -> None:
    plan = fs.plan(entry.name, fs.schedulers.karras(fs.process.edm(), 5))
    assert (plan.draws > 0) == entry.stochastic == (entry.family == "SDE")


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler_ancestral"])
def test_no_noise_is_drawn_for_the_last_step_or_for_eta_zero(name: str) -> None:
    grid = fs.schedulers.karras(fs.process.edm(), 5)
    options = {"ddpm": {}, "ddim": {"eta": 1.0}, "euler_ancestral": {}}[name]
    draws = [i for i in fs.plan(name, grid, **options).instructions if isinstance(i, Draw)]
    assert [(d.start, d.end) for d in draws] == list(grid.steps[:-1])
    if name != "ddpm":
        assert fs.plan(name, grid, eta=0.0).draws == 0


def test_the_last_step_to_clean_data_returns_the_last_estimate() -> None:
    for entry in SAMPLERS:
        plan = fs.plan(entry.name, fs.Grid.from_ratios(fs.process.flow(), [3.0, 1.0, 0.0]))
        last_call = [i.out for i in plan.instructions if isinstance(i, Denoise)][-1]
        assert plan.result == last_call


@pytest.mark.parametrize("entry", list(SAMPLERS), ids=lambda e: e.name)
def test_a_step_from_pure_noise_is_taken_by_itself(entry: SamplerEntry) -> None:
    """No method can look back past log_snr = -inf: the rest runs as though it had started after the first step."""
    process = fs.process.flow()
    denoiser = fs.exact.GaussianMixture(
        torch.tensor([[0.7], [-0.4]], dtype=torch.float64), 0.5, process=process
    )
    noise = fs.Noise([0], (1,), dtype=torch.float64)

    def run(x: torch.Tensor, *ratios: float) -> torch.Tensor:
        return fs.plan(entry.name, fs.Grid.from_ratios(process, ratios)).run(denoiser, x, noise)

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


@pytest.mark.parametrize("entry", list(SAMPLERS), ids=lambda e: e.name)
def test_names_titles_and_aliases_find_the_same_sampler(entry: SamplerEntry) -> None:
    grid = fs.schedulers.karras(fs.process.edm(), 5)
    for name in (entry.title, entry.name.upper(), *entry.aliases):
        assert fs.plan(name, grid) == fs.plan(entry.name, grid)
    assert entry.summary
    assert entry.paper
