"""Going from one level to another: add_noise, the forward kernel and the posterior."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fewstep import process as fp
from fewstep.errors import InvalidInputError
from fewstep.process import Level, Process

PROCESSES = [
    fp.vp_linear(),
    fp.vp_cosine(zero_terminal_snr=True),
    fp.vp_continuous(),
    fp.ve(),
    fp.edm(),
    fp.flow(),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])
VP = fp.vp_linear()


def falling_times(process: Process, *shares: float) -> list[float]:
    """Times of which neighbours differ in log_snr, so that variances can be told apart in float64."""
    times = [
        process.t_min + u * (process.t_max - process.t_min) for u in sorted(shares, reverse=True)
    ]
    levels = process.levels(times)
    assume(all(t.ratio > s.ratio * 1.001 for t, s in pairwise(levels)))
    return times


shares = st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))


def normals(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_process
def test_added_noise_has_the_moments_of_the_level(process: Process) -> None:
    noise = normals((200, 1000))
    x0 = torch.full_like(noise, 0.7)
    for u in (0.1, 0.5, 0.9):
        level = process.level(process.t_min + u * (process.t_max - process.t_min))
        x = process.add_noise(x0, noise, level.t)
        error = level.sigma / math.sqrt(noise.numel())  # of the mean; 5 of them are never seen
        assert float(x.mean()) == pytest.approx(level.alpha * 0.7, abs=5 * error)
        assert float(x.std()) == pytest.approx(level.sigma, rel=8e-3)


@every_process
def test_add_noise_is_alpha_x0_plus_sigma_noise(process: Process) -> None:
    x0, noise = normals((3, 2, 4, 4), 1), normals((3, 2, 4, 4), 2)
    for t in (process.t_min, (process.t_min + process.t_max) / 2, process.t_max):
        expected = process.alpha(t) * x0 + process.sigma(t) * noise
        torch.testing.assert_close(process.add_noise(x0, noise, t), expected, rtol=1e-14, atol=0)
    assert process.add_noise(x0, noise, process.clean_time).equal(x0)


@pytest.mark.parametrize("image", [(), (5,), (2, 4, 4), (2, 3, 4, 4)])
def test_one_time_for_each_image(image: tuple[int, ...]) -> None:
    x0, noise = normals((4, *image), 1), normals((4, *image), 2)
    times = [0, 10.5, 500, 999]
    together = VP.add_noise(x0, noise, torch.tensor(times))
    alone = [VP.add_noise(x0[i], noise[i], t) for i, t in enumerate(times)]
    assert together.equal(torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_add_noise_keeps_the_type_and_rounds_once(dtype: torch.dtype) -> None:
    x0, noise = normals((8, 50), 1).to(dtype), normals((8, 50), 2).to(dtype)
    got = VP.add_noise(x0, noise, 5)
    assert got.dtype == dtype
    exact = VP.alpha(5) * x0.double() + VP.sigma(5) * noise.double()
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("x0", "noise", "t"),
    [
        ((4, 2), (1, 2), (4,)),
        ((4, 2), (4, 2), (3,)),
        ((1, 2), (1, 2), (4,)),
        ((4, 2), (4, 2), (4, 1)),
        ((4, 2), (4, 2), (1,)),
    ],
)
def test_shapes_that_do_not_fit(x0, noise, t) -> None:
    with pytest.raises(InvalidInputError) as caught:
        VP.add_noise(torch.ones(x0), torch.ones(noise), torch.ones(t))
    for shape in (x0, noise, t):
        assert str(shape) in str(caught.value)


def test_pictures_of_bytes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"uint8.*/ 127\.5 - 1"):
        VP.add_noise(torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 2), 5)


@every_process
@settings(max_examples=30)
@given(shares)
def test_two_kernels_in_a_row_are_one(process: Process, u: tuple[float, float, float]) -> None:
    """Chapman-Kolmogorov."""
    t, s, r = falling_times(process, *u)
    first, second = process.forward_kernel(s, r), process.forward_kernel(t, s)
    direct = process.forward_kernel(t, r)
    assert direct.scale == pytest.approx(second.scale * first.scale, rel=1e-12)
    assert direct.std == pytest.approx(math.hypot(second.scale * first.std, second.std), rel=1e-10)


@every_process
@settings(max_examples=30)
@given(shares)
def test_a_kernel_carries_one_marginal_to_the_next(process: Process, u) -> None:
    t, s, _ = falling_times(process, *u)
    scale, std = process.forward_kernel(t, s)
    assert scale * process.alpha(s) == pytest.approx(process.alpha(t), rel=1e-12)
    assert math.hypot(scale * process.sigma(s), std) == pytest.approx(process.sigma(t), rel=1e-12)
    from_clean = process.forward_kernel(t, process.clean_time)
    assert from_clean == pytest.approx((process.alpha(t), process.sigma(t)), rel=1e-12)


def bayes(t: Level, s: Level) -> tuple[float, float, float]:
    """Posterior from prior `N(alpha_s x0, sigma_s^2)` and likelihood `N(a x_s, v)`, by adding up precisions."""
    real = np.longdouble
    a = real(t.alpha) / real(s.alpha)
    v = real(t.sigma) ** 2 - (a * real(s.sigma)) ** 2
    variance = 1 / (1 / real(s.sigma) ** 2 + a**2 / v)
    return (
        float(variance * a / v),
        float(variance * real(s.alpha) / real(s.sigma) ** 2),
        float(np.sqrt(variance)),
    )


@every_process
@settings(max_examples=30)
@given(shares)
def test_posterior_is_bayes_rule(process: Process, u: tuple[float, float, float]) -> None:
    t, s, _ = process.levels(falling_times(process, *u))
    assert fp.posterior(t, s) == pytest.approx(bayes(t, s), rel=1e-8, abs=1e-15)


@every_process
@settings(max_examples=30)
@given(shares)
def test_posterior_carries_the_marginal_back(process: Process, u) -> None:
    t, s, _ = process.levels(falling_times(process, *u))
    on_x, on_x0, std = fp.posterior(t, s)
    assert on_x * t.alpha + on_x0 == pytest.approx(s.alpha, rel=1e-11)
    assert math.hypot(on_x * t.sigma, std) == pytest.approx(s.sigma, rel=1e-11)


@pytest.mark.parametrize("t", [1, 2, 10, 500, 999])
def test_posterior_is_that_of_ddpm(t: int) -> None:
    """Equations 6 and 7 of DDPM, written with betas."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    beta, here, before = betas[t], alpha_bar[t], alpha_bar[t - 1]
    x_t, x0 = normals((2, 3), 1), normals((2, 3), 2)
    mean, std = VP.posterior(x_t, x0, t)
    expected = (
        math.sqrt(before) * beta / (1 - here) * x0
        + math.sqrt(1 - beta) * (1 - before) / (1 - here) * x_t
    )
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)
    assert std == pytest.approx(math.sqrt((1 - before) / (1 - here) * beta), rel=1e-9)
    assert VP.forward_kernel(t) == pytest.approx((math.sqrt(1 - beta), math.sqrt(beta)), rel=1e-9)


def test_posterior_variance_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule="linear", variance_type="fixed_small")
    x = torch.zeros(1)
    for t in range(1, 1000):
        std = VP.posterior(x, x, t)[1]
        assert std**2 == pytest.approx(float(theirs._get_variance(t)), rel=3e-3), t


def test_the_entry_before_is_the_default_of_a_table() -> None:
    x = torch.ones(2)
    assert VP.forward_kernel(7) == VP.forward_kernel(7, 6)
    assert VP.posterior(x, x, 7)[1] == VP.posterior(x, x, 7, 6)[1]
    assert VP.forward_kernel(0) == VP.forward_kernel(0, VP.clean_time)
    assert VP.forward_kernel(7.25) == VP.forward_kernel(7.25, 7)
    assert VP.forward_kernel(0.25) == VP.forward_kernel(0.25, 0)
    mean, std = VP.posterior(x, 3 * x, 0)
    assert mean.equal(3 * x)
    assert std == 0.0


@pytest.mark.parametrize("process", [fp.vp_continuous(), fp.ve(), fp.edm(), fp.flow()], ids=repr)
def test_continuous_time_has_no_entry_before(process: Process) -> None:
    with pytest.raises(InvalidInputError, match=f"{process.name} is continuous.*t=0.5; give s"):
        process.forward_kernel(0.5)
    with pytest.raises(InvalidInputError, match="give s"):
        process.posterior(torch.ones(1), torch.ones(1), 0.5)


@pytest.mark.parametrize(
    "process", [fp.vp_linear(zero_terminal_snr=True), fp.vp_from_betas([0.1, 1.0]), fp.flow()]
)
def test_from_pure_noise_the_posterior_is_the_marginal(process: Process) -> None:
    s = process.least_noisy
    assert fp.posterior(process.noisiest, s) == (0.0, s.alpha, s.sigma)
    assert fp.forward_kernel(s, process.noisiest) == (0.0, 1.0)


@pytest.mark.parametrize(("t", "s"), [(5, 9), (5, 5), (-1, -1), (-1, 5), (1000, 1000), (5, 1000)])
def test_the_order_of_the_levels_is_checked(t: float, s: float) -> None:
    process = fp.vp_linear(steps=1001, zero_terminal_snr=True)
    for call in (fp.posterior, lambda t, s: fp.forward_kernel(s, t)):
        with pytest.raises(InvalidInputError, match=f"t={s} .* is not less noisy than t={t} "):
            call(process.level(t), process.level(s))


def test_level_reads_off_ratio_and_log_snr() -> None:
    level = Level(t=3.0, alpha=0.6, sigma=0.8)
    assert level.ratio == pytest.approx(4 / 3)
    assert level.log_snr == pytest.approx(math.log(0.75))
    assert not level.is_clean
    assert not level.is_pure_noise
    assert str(level) == "t=3 (alpha=0.6, sigma=0.8)"
    assert fp.log_snr_step(level, Level(0.0, 0.8, 0.6)) == pytest.approx(2 * math.log(4 / 3))
    assert fp.log_snr_step(level, Level(0.0, 1.0, 0.0)) == math.inf
    assert fp.log_snr_step(Level(9.0, 0.0, 1.0), level) == math.inf
