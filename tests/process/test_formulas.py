"""Every process against formulas written out again, in extended precision, and against diffusers' tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from fewstep import process as fp
from fewstep.process import Process

Real = np.longdouble


def linear(steps: int = 1000, low: float = 1e-4, high: float = 0.02) -> np.ndarray:
    return Real(low) + (Real(high) - Real(low)) * np.arange(steps, dtype=Real) / (steps - 1)


def scaled_linear(steps: int = 1000, low: float = 0.00085, high: float = 0.012) -> np.ndarray:
    return linear(steps, *np.sqrt([Real(low), Real(high)])) ** 2  # type: ignore[arg-type]


def capped_ratio(alpha_bar: np.ndarray, cap: float = 0.999) -> np.ndarray:
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], Real(cap))


def cosine(steps: int = 1000, offset: float = 0.008) -> np.ndarray:
    u = np.arange(steps + 1, dtype=Real) / steps
    angle = (u + Real(offset)) / (1 + Real(offset)) * (4 * np.arctan(Real(1))) / 2
    return capped_ratio(np.cos(angle) ** 2)


def sigmoid(steps: int = 1000, start: float = -3, end: float = 3, tau: float = 1) -> np.ndarray:
    def curve(x: np.ndarray | float) -> np.ndarray:
        return (1 + np.tanh(np.asarray(x, Real) / tau / 2)) / 2

    u = np.arange(steps + 1, dtype=Real) / steps
    low, high = curve(start), curve(end)
    alpha_bar = (high - curve(u * (end - start) + start)) / (high - low)
    return capped_ratio(np.maximum(alpha_bar, Real(1e-9)))


def sigmoid_beta(steps: int = 1000) -> np.ndarray:
    x = -6 + 12 * np.arange(steps, dtype=Real) / (steps - 1)
    return Real(1e-4) + Real(0.0199) * (1 + np.tanh(x / 2)) / 2


DISCRETE = [
    (fp.vp_linear(), linear()),
    (fp.vp_linear(steps=50, beta_start=1e-3, beta_end=0.3), linear(50, 1e-3, 0.3)),
    (fp.vp_scaled_linear(), scaled_linear()),
    (fp.vp_scaled_linear(steps=200, beta_end=0.018), scaled_linear(200, high=0.018)),
    (fp.vp_cosine(), cosine()),
    (fp.vp_cosine(steps=100, offset=0.02), cosine(100, 0.02)),
    (fp.vp_sigmoid(), sigmoid()),
    (fp.vp_sigmoid(steps=64, start=0, end=3, tau=0.7), sigmoid(64, 0, 3, 0.7)),
    (fp.vp_sigmoid_beta(), sigmoid_beta()),
    (fp.vp_from_betas([0.1, 0.2, 0.05, 0.9]), np.array([0.1, 0.2, 0.05, 0.9], Real)),
]


def table(process: Process) -> torch.Tensor:
    return torch.arange(process.training_steps)


def assert_levels(
    process: Process, t: torch.Tensor, alpha: np.ndarray, sigma: np.ndarray, rtol: float = 1e-11
) -> None:
    for name, expected in {
        "alpha": alpha,
        "sigma": sigma,
        "ratio": sigma / alpha,
        "log_snr": np.log(alpha / sigma),
    }.items():
        got = getattr(process, name)(t)
        assert got.dtype == torch.float64
        assert got.shape == t.shape
        np.testing.assert_allclose(got, expected.astype(float), rtol, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("process", "betas"), DISCRETE, ids=lambda x: repr(x)[:40])
def test_a_table_is_the_product_of_one_minus_beta(process: Process, betas: np.ndarray) -> None:
    alpha_bar = np.cumprod(1 - betas)
    assert process.training_steps == len(betas)
    assert_levels(process, table(process), np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    assert isinstance(process, fp.DiscreteVP)
    np.testing.assert_allclose(process.betas, betas.astype(float), rtol=1e-9)


@pytest.mark.parametrize(("process", "betas"), DISCRETE, ids=lambda x: repr(x)[:40])
def test_zero_terminal_snr_shifts_and_scales_alpha(process: Process, betas: np.ndarray) -> None:
    zero = fp.from_dict({**process.to_dict(), "zero_terminal_snr": True})
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha = (alpha - alpha[-1]) / (alpha[0] - alpha[-1]) * alpha[0]
    inside = table(zero)[:-1]
    # The difference of neighbouring alphas loses digits where they are nearly equal.
    assert_levels(zero, inside, alpha[:-1], np.sqrt((1 - alpha) * (1 + alpha))[:-1], rtol=1e-9)
    assert zero.noisiest == fp.Level(zero.t_max, 0.0, 1.0)
    assert zero.noisiest.is_pure_noise
    assert zero.noisiest.log_snr == -math.inf
    assert zero.ratio(zero.t_max) == math.inf
    assert zero.betas[-1] == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("process", "low", "high"),
    [
        (fp.vp_linear(), 0.0100005, 157.407),
        (fp.vp_scaled_linear(), 0.029167158151720367, 14.614641229333639),
        (fp.vp_cosine(), 0.0064, 20291.0),
        (fp.vp_sigmoid_beta(), 0.0122, 158.7),
        (fp.vp_continuous(), 0.0105, 152.2),
        (fp.ve(), 0.01, 50.0),
        (fp.edm(), 0.002, 80.0),
        (fp.flow(), 0.001 / 0.999, math.inf),
    ],
    ids=repr,
)
def test_published_range(process: Process, low: float, high: float) -> None:
    """The ranges of sigma / alpha that papers and other tools report."""
    assert process.least_noisy.ratio == pytest.approx(low, rel=5e-3)
    assert process.noisiest.ratio == pytest.approx(high, rel=5e-4)


def test_stable_diffusion_table() -> None:
    expected = [
        *(0.0291672, 0.3439312, 0.5716659, 0.8327527, 1.1643912, 1.6182788),
        *(2.2846399, 3.3343885, 5.1110277, 8.3465966, 14.6146412),
    ]
    t = torch.tensor([*range(0, 1000, 100), 999])
    np.testing.assert_allclose(fp.vp_scaled_linear().ratio(t), expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("process", "options"),
    [
        (fp.vp_linear(), {"beta_schedule": "linear"}),
        (
            fp.vp_scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (fp.vp_cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (fp.vp_sigmoid_beta(), {"beta_schedule": "sigmoid"}),
        (
            fp.vp_linear(zero_terminal_snr=True),
            {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        ),
        (
            fp.vp_scaled_linear(zero_terminal_snr=True),
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
        ),
        (
            fp.vp_cosine(steps=300, zero_terminal_snr=True),
            {
                "beta_schedule": "squaredcos_cap_v2",
                "num_train_timesteps": 300,
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
    ids=lambda x: repr(x)[:50],
)
def test_same_table_as_diffusers(process: Process, options: dict[str, object]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**options).alphas_cumprod.double()  # a float32 table
    torch.testing.assert_close(process.alpha(table(process)) ** 2, theirs, rtol=1e-3, atol=1e-6)


def test_the_sigmoid_keeps_a_billionth_of_the_signal() -> None:
    """Where the curve ends so flat that the cap on beta does not hold it up before."""
    assert fp.vp_sigmoid(steps=100, end=14).noisiest.alpha ** 2 == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_between_entries_log_snr_is_linear(zero_terminal_snr: bool) -> None:
    process = fp.vp_linear(steps=20, zero_terminal_snr=zero_terminal_snr)
    entries = process.log_snr(table(process))
    for left in range(18):
        for weight in (0.125, 0.5, 0.9):
            expected = (1 - weight) * entries[left] + weight * entries[left + 1]
            assert process.log_snr(left + weight) == pytest.approx(float(expected), rel=1e-13)


def test_before_pure_noise_the_signal_falls_linearly() -> None:
    process = fp.vp_linear(zero_terminal_snr=True)
    signal = 1 / process.ratio(998.0)
    for weight in (0.0, 0.25, 0.5, 0.999):
        assert 1 / process.ratio(998 + weight) == pytest.approx((1 - weight) * signal, rel=1e-12)


def test_entries_are_exact_at_both_ends() -> None:
    process = fp.vp_linear()
    batch = process.log_snr(table(process))
    single = [process.log_snr(float(t)) for t in range(1000)]
    assert batch.tolist() == single
    alpha_bar = np.cumprod(1 - linear())
    exact = np.log(alpha_bar[-1] / (1 - alpha_bar[-1])) / 2
    assert single[-1] == pytest.approx(float(exact), rel=1e-14)


TIMES = torch.tensor([1e-5, 1e-3, 0.01, 0.1, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_continuous_vp_is_the_closed_form() -> None:
    t = TIMES.numpy().astype(Real)
    log_alpha = -(t**2) * (Real(20) - Real(0.1)) / 4 - t * Real(0.1) / 2
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    assert_levels(fp.vp_continuous(), TIMES, alpha, sigma)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_continuous_vp_solves_its_differential_equation(t: float) -> None:
    """`d log alpha / dt = -beta(t) / 2` with beta linear from beta_min to beta_max."""
    integral, _ = quad(lambda u: 0.3 + u * (12.0 - 0.3), 0, t)
    process = fp.vp_continuous(beta_min=0.3, beta_max=12.0)
    assert process.alpha(t) == pytest.approx(math.exp(-integral / 2), rel=1e-12)


def test_variance_exploding_is_geometric() -> None:
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    sigma = Real(0.01) * (Real(50) / Real(0.01)) ** t.numpy().astype(Real)
    assert_levels(fp.ve(), t, np.ones(7, Real), sigma)
    assert fp.ve(sigma_min=0.02, sigma_max=348.0).sigma(0.5) == pytest.approx(
        math.sqrt(0.02 * 348), rel=1e-13
    )


def test_edm_time_is_sigma() -> None:
    t = torch.tensor([0.002, 0.3, 1.0, 17.5, 80.0], dtype=torch.float64)
    assert_levels(fp.edm(), t, np.ones(5, Real), t.numpy().astype(Real))
    assert fp.edm().sigma(t).tolist() == t.tolist()


def test_flow_is_a_straight_line() -> None:
    t = TIMES.numpy().astype(Real)
    assert_levels(fp.flow(), TIMES[:-1], 1 - t[:-1], t[:-1])
    assert fp.flow().noisiest == fp.Level(1.0, 0.0, 1.0)


PROCESSES = [
    *(process for process, _ in DISCRETE),
    fp.vp_linear(zero_terminal_snr=True),
    fp.vp_cosine(zero_terminal_snr=True),
    fp.vp_continuous(),
    fp.ve(),
    fp.edm(),
    fp.flow(),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])
@settings(max_examples=40)
@given(u=st.floats(0, 1))
def test_every_time_lies_on_its_path(process: Process, u: float) -> None:
    level = process.level(process.t_min + u * (process.t_max - process.t_min))
    norm = {"ve": level.alpha, "edm": level.alpha, "flow": level.alpha + level.sigma}.get(
        process.name, level.alpha**2 + level.sigma**2
    )
    assert norm == pytest.approx(1.0, abs=1e-15)
    assert process.least_noisy.ratio <= level.ratio <= process.noisiest.ratio


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])
def test_noise_grows_strictly_along_the_table(process: Process) -> None:
    t = [process.table_time(i) for i in range(process.training_steps)]
    assert t[0] == process.t_min
    assert t[-1] == process.t_max
    ratios = [level.ratio for level in process.levels(t)]
    assert (np.diff(ratios) > 0).all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:50])
def test_clean_data(process: Process) -> None:
    assert process.level(process.clean_time) == process.clean
    assert (process.clean.alpha, process.clean.sigma, process.clean.ratio) == (1.0, 0.0, 0.0)
    assert process.clean.log_snr == process.log_snr(process.clean_time) == math.inf


def test_the_table_of_edm_is_geometric_and_those_of_ve_and_flow_are_even_in_time() -> None:
    edm, flow = fp.edm(), fp.flow()
    assert edm.table_time(333) == pytest.approx(0.002 * 40000 ** (1 / 3), rel=1e-12)
    assert flow.table_time(499) == pytest.approx(0.5, rel=1e-12)
    assert fp.ve().sigma(fp.ve().table_time(499.5)) == pytest.approx(math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize("make", [float, np.float64, np.float32])
def test_a_number_gives_a_float(make: type) -> None:
    process = fp.vp_continuous()
    for name in ("alpha", "sigma", "ratio", "log_snr"):
        assert type(getattr(process, name)(make(0.5))) is float
    assert type(process.time(ratio=make(0.5))) is float


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_tensors_of_any_type_are_computed_in_float64(dtype: torch.dtype) -> None:
    t = torch.tensor([[1, 500], [7, 999]], dtype=dtype)
    expected = [[fp.vp_linear().alpha(float(v)) for v in row] for row in t]
    assert fp.vp_linear().alpha(t).tolist() == expected
    assert fp.vp_linear().alpha(t[0, 1]).ndim == 0
