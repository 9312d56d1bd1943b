"""Published tables, against values that were recorded from the tools they come from, and what they are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewstep import process as fp
from fewstep import schedulers as fs
from fewstep.errors import InvalidInputError
from fewstep.schedulers import make_grid

SD = fp.vp_scaled_linear()

TEN_STEPS = {
    "simple": [
        *(14.6146412, 8.3028032, 5.0877632, 3.3210831, 2.2764631, 1.6128862, 1.1605783),
        *(0.8298595, 0.5692849, 0.3416738, 0.0),
    ],
    "normal": [
        *(14.6146412, 7.8398829, 4.6091741, 2.9183071, 1.9501615, 1.3449278, 0.932358),
        *(0.6249769, 0.3686577, 0.0291672, 0.0),
    ],
    "sgm_uniform": [
        *(14.6146412, 8.3071722, 5.0924076, 3.3250691, 2.2797303, 1.6155803, 1.1628645),
        *(0.8318837, 0.5711889, 0.3437048, 0.0),
    ],
    "ddim_uniform": [
        *(8.3906848, 5.1344311, 3.3477636, 2.2928538, 1.6236921, 1.168216, 0.8356528),
        *(0.5740503, 0.3461867, 0.0413144, 0.0),
    ],
    "beta": [
        *(14.6146412, 11.5427708, 7.3718441, 4.3728017, 2.6152358, 1.6182788, 1.0273293),
        *(0.6548854, 0.3955097, 0.1990586, 0.0),
    ],
    "beta_1_1": [
        *(14.6146412, 8.3028032, 5.0877632, 3.3210831, 2.2764631, 1.6182788, 1.1643912),
        *(0.8327527, 0.5716659, 0.3439312, 0.0),
    ],
    "beta57": [
        *(14.6146412, 9.1876114, 4.8844755, 2.6946152, 1.6128862, 1.0239253, 0.6649985),
        *(0.4268407, 0.2555727, 0.1233661, 0.0),
    ],
    "karras": [
        *(14.6146412, 9.1029281, 5.478392, 3.1686031, 1.749417, 0.9140723, 0.4469182),
        *(0.2013983, 0.0819102, 0.0291672, 0.0),
    ],
    "exponential": [
        *(14.6146412, 7.3248702, 3.6712309, 1.840024, 0.9222215, 0.4622182, 0.2316641),
        *(0.1161103, 0.0581946, 0.0291672, 0.0),
    ],
    "polyexponential rho=2": [
        *(14.6146412, 3.964092, 1.2536126, 0.4622182, 0.1986986, 0.0995879, 0.0581946),
        *(0.0396481, 0.0314939, 0.0291672, 0.0),
    ],
    "kl_optimal": [
        *(14.6146412, 4.2323505, 2.3937189, 1.5970662, 1.1329969, 0.8152445, 0.5729142),
        *(0.3724842, 0.1952883, 0.0291672, 0.0),
    ],
    "kl_optimal_a1111": [
        *(14.6146412, 4.5650367, 2.6328879, 1.7864453, 1.2947673, 0.961588, 0.7116268),
        *(0.5094194, 0.3356374, 0.1783465, 0.0291672),
    ],
    "beta_sigma": [
        *(14.6146412, 13.9277847, 12.4909802, 10.5976078, 8.4424367, 6.2013717, 4.0462006),
        *(2.1528282, 0.7160236, 0.0291672, 0.0),
    ],
    "golden": [
        *(14.6146412, 12.0795736, 9.7342581, 7.5883751, 5.6539533, 3.9462694, 2.4856625),
        *(1.3013632, 0.4417358, 0.0291672, 0.0),
    ],
    "gaussian_tail": [
        *(14.6146412, 10.4527533, 6.8062118, 4.0068339, 2.123925, 1.0142878, 0.4413436),
        *(0.182154, 0.0794257, 0.043754, 0.0),
    ],
    "lu": [
        *(14.6146412, 7.3248702, 3.6712309, 1.840024, 0.9222215, 0.4622182, 0.2316641),
        *(0.1161103, 0.0581946, 0.0291672, 0.0),
    ],
}
"""Ten steps on Stable Diffusion's table, as ComfyUI and others compute them."""

ALIGNED = {
    "ays 10": [
        *(14.6146412, 6.3184485, 3.768179, 2.1811481, 1.3405245, 0.8620721, 0.5550693),
        *(0.3798541, 0.2332364, 0.1114188, 0.0),
    ],
    "ays 20": [
        *(14.6146412, 9.6094671, 6.3184485, 4.8794513, 3.768179, 2.8668722, 2.1811481),
        *(1.7099364, 1.3405245, 1.0750018, 0.8620721, 0.691744, 0.5550693, 0.459179),
        *(0.3798541, 0.2976505, 0.2332364, 0.1612046, 0.1114188, 0.0570068, 0.0),
    ],
    "ays+ 10": [
        *(14.6146412, 5.9657953, 3.3370727, 1.8544495, 1.1016938, 0.6750305, 0.4310493),
        *(0.2599367, 0.1209504, 0.0291672, 0.0),
    ],
    "ays+ 20": [
        *(14.6146412, 9.3997365, 6.1488765, 4.684346, 3.5574366, 2.6678745, 2.0197823),
        *(1.563277, 1.2215473, 0.968276, 0.7677658, 0.6089745, 0.4924103, 0.4032987),
        *(0.3173786, 0.2455236, 0.1708861, 0.1158363, 0.0590533, 0.0291672, 0.0),
    ],
    "ays_30 10": [
        *(14.6146412, 6.4745761, 3.8962105, 2.301105, 1.4268551, 0.9260792, 0.6053758),
        *(0.4134023, 0.2652524, 0.1379907, 0.0),
    ],
    "ays_30 20": [
        *(14.6146412, 9.7512404, 6.4745761, 5.0011622, 3.8962105, 2.9957985, 2.301105),
        *(1.8095898, 1.4268551, 1.1471585, 0.9260792, 0.7480042, 0.6053758, 0.4973775),
        *(0.4134023, 0.3348551, 0.2652524, 0.1982933, 0.1379907, 0.0792661, 0.0),
    ],
    "ays_30+ 10": [
        *(14.6146412, 6.1044586, 3.4656464, 1.9569113, 1.174479, 0.7301811, 0.4673798),
        *(0.2941797, 0.149739, 0.0291672, 0.0),
    ],
    "ays_30+ 20": [
        *(14.6146412, 9.5464561, 6.2965403, 4.8114931, 3.6859692, 2.7966422, 2.1311082),
        *(1.6593825, 1.2998743, 1.0371465, 0.8283895, 0.6610122, 0.5330549, 0.438146),
        *(0.3560536, 0.278582, 0.2096367, 0.1434362, 0.0831353, 0.0291672, 0.0),
    ],
    "align_your_steps 20": [
        *(14.6146412, 9.7274666, 6.4745761, 5.0015653, 3.8636746, 3.2266261, 2.6946152),
        *(2.2532582, 1.8841921, 1.6208889, 1.3943805, 1.1595444, 0.9642584, 0.7931279),
        *(0.6523686, 0.5093886, 0.3977456, 0.2454948, 0.1515233, 0.0664793, 0.0),
    ],
    "AYS SDXL 20": [
        *(14.6146412, 9.6094671, 6.3184485, 4.8794513, 3.768179, 2.8668722, 2.1811481),
        *(1.7099364, 1.3405245, 1.0750018, 0.8620721, 0.691744, 0.5550693, 0.459179),
        *(0.3798541, 0.2976505, 0.2332364, 0.1612046, 0.1114188, 0.0570068, 0.0),
    ],
}
"""Align Your Steps on Stable Diffusion's table, by name and number of steps."""

GITS_ROWS = {
    "0.8 5": [14.61464119, 11.54541874, 7.49001646, 5.85520077, 2.05039096, 0.02916753],
    "1.0 2": [14.61464119, 1.56271636, 0.02916753],
    "1.2 10": [
        *(14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381),
        *(0.32104823, 0.19894916, 0.09824532, 0.02916753),
    ],
    "1.5 20": [
        *(14.61464119, 2.45070267, 1.41535246, 0.95350921, 0.72133851, 0.57119018, 0.4783645),
        *(0.43325692, 0.38853383, 0.36617002, 0.34370604, 0.32104823, 0.29807833, 0.27464288),
        *(0.25053367, 0.22545385, 0.19894916, 0.17026083, 0.13792117, 0.09824532, 0.02916753),
    ],
}
"""Published levels by coefficient and number of steps; clean data takes the place of the last."""

LINEAR_QUADRATIC = {
    1: [1.0, 0.0],
    2: [1.0, 0.975, 0.0],
    3: [1.0, 0.975, 0.71875, 0.0],
    4: [1.0, 0.9875, 0.975, 0.725, 0.0],
    5: [1.0, 0.9875, 0.975, 0.8583333, 0.5333333, 0.0],
    7: [1.0, 0.9916667, 0.9833333, 0.975, 0.9078125, 0.7229167, 0.4203125, 0.0],
    10: [
        *(1.0, 0.995, 0.99, 0.985, 0.98, 0.975, 0.932),
        *(0.813, 0.618, 0.347, 0.0),
    ],
    20: [
        *(1.0, 0.9975, 0.995, 0.9925, 0.99, 0.9875, 0.985),
        *(0.9825, 0.98, 0.9775, 0.975, 0.963, 0.932, 0.882),
        *(0.813, 0.725, 0.618, 0.492, 0.347, 0.183, 0.0),
    ],
}
"""Flow times by number of steps."""


@pytest.mark.parametrize("name", TEN_STEPS)
def test_ten_steps_on_stable_diffusion(name: str) -> None:
    scheduler, *options = name.split()
    grid = make_grid(scheduler, SD, 10, **dict(option.split("=") for option in options))
    np.testing.assert_allclose(grid.ratios, TEN_STEPS[name], rtol=4e-6)


@pytest.mark.parametrize("name", ALIGNED)
def test_align_your_steps(name: str) -> None:
    scheduler, n = name.rsplit(" ", 1)
    np.testing.assert_allclose(make_grid(scheduler, SD, int(n)).ratios, ALIGNED[name], rtol=4e-6)


def test_names_of_align_your_steps_differ_by_options_only() -> None:
    assert make_grid("ays_30+", SD, 7) == fs.align_your_steps(SD, 7, table="sdxl_30", tail="zero")
    assert make_grid("AYS", SD, 7) == fs.align_your_steps(SD, 7, table="sdxl")
    assert make_grid("ays+", SD, 7) != make_grid("ays", SD, 7)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_tables_of_30_and_32_are_resampled_ones(model: str) -> None:
    """Of the published levels to three decimals, with 0.015 as the last: AYS_32; its first 31 on the table: AYS_30."""
    decimals = {
        "sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.015],
        "sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.015],
    }[model]
    place = np.linspace(0, 10, 32)
    made = np.exp(np.interp(place, np.arange(11), np.log(decimals)))
    wide = fp.edm(0.001, 100.0)
    shipped = fs.align_your_steps(wide, 32, table=f"{model}_32", tail="zero").ratios
    np.testing.assert_allclose(shipped[:-1], made, rtol=1e-6)
    table = np.array([SD.ratio(float(t)) for t in range(1000)])
    nearest = [int(np.abs(np.log(table / level)).argmin()) for level in made[:31]]
    thirty = fs.align_your_steps(SD, 31, table=f"{model}_30", tail="zero").times[:-1]
    assert thirty == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("name", GITS_ROWS)
def test_gits_rows_as_published(name: str) -> None:
    coefficient, n = name.split()
    levels = GITS_ROWS[name]
    wide = fp.edm()
    got = fs.gits(wide, int(n), coefficient=coefficient).ratios
    assert got == pytest.approx([*levels[:-1], 0.0], rel=1e-15)
    assert fs.gits(wide, int(n), coefficient=coefficient, tail="min").ratios == pytest.approx(
        levels, rel=1e-15
    )


def teacher_grid() -> np.ndarray:
    """101 times of Stable Diffusion from 1 to 1/1000, log(alpha) going straight between the entries."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    log_alpha = 0.5 * np.log(np.cumprod(1 - betas))
    t = np.linspace(1, 1e-3, 101)
    return np.sqrt(np.expm1(-2 * np.interp(t, np.arange(1, 1001) / 1000, log_alpha)))


@pytest.mark.parametrize("coefficient", np.arange(16, 31) / 20)
def test_all_levels_of_gits_lie_on_its_teacher_grid(coefficient: float) -> None:
    teacher = teacher_grid()
    for n in range(2, 21):
        levels = np.array(fs.gits(fp.edm(), n, coefficient=coefficient, tail="min").ratios)
        assert len(levels) == n + 1
        off = np.abs(np.log(levels[:, None] / teacher)).min(1)
        assert off.max() < 2e-5


def test_gits_steps_move_to_low_noise_with_the_coefficient() -> None:
    medians = [fs.gits(fp.edm(), 10, coefficient=c).ratios[5] for c in (0.8, 1.0, 1.2, 1.5)]
    assert medians == sorted(medians, reverse=True)
    assert fs.gits(SD, 10, coefficient=1.21).ratios == fs.gits(SD, 10, coefficient=1.2).ratios


def test_gits_beyond_its_tables() -> None:
    twenty = fs.gits(fp.edm(), 20, tail="min").ratios
    forty = fs.gits(fp.edm(), 40, tail="min").ratios
    assert forty[::2] == pytest.approx(twenty, rel=1e-14)
    between = [math.sqrt(a * b) for a, b in zip(twenty[:-1], twenty[1:], strict=True)]
    assert forty[1::2] == pytest.approx(between, rel=1e-12)
    assert fs.gits(fp.edm(), 1).ratios == [pytest.approx(14.61464119), 0.0]


@pytest.mark.parametrize("coefficient", [0.79, 1.51, "much"])
def test_gits_coefficients_out_of_range(coefficient: object) -> None:
    with pytest.raises(
        InvalidInputError, match=r"gits: coefficient=.* is not a number in 0.8..1.5"
    ):
        fs.gits(SD, 5, coefficient=coefficient)


@pytest.mark.parametrize(
    ("model", "n", "some"),
    [
        ("flux", 10, {0: 0.9968, 5: 0.9471, 9: 0.2808}),
        ("wan", 20, {0: 1.0, 10: 0.973, 19: 0.208}),
        ("chroma", 40, {0: 0.992, 20: 0.69, 39: 0.048}),
    ],
)
def test_optimal_steps(model: str, n: int, some: dict[int, float]) -> None:
    flow = fp.flow()
    native = fs.optimal_steps(flow, n, model=model)
    for i, time in some.items():
        assert native.levels[i].sigma == pytest.approx(time, rel=1e-12)
    assert native.levels[-1].is_clean
    double = fs.optimal_steps(flow, 2 * n, model=model).levels
    for i in range(1, n):  # between two levels the logarithm of the flow time is straight
        a, b = native.levels[i - 1].sigma, native.levels[i].sigma
        assert double[2 * i - 1].sigma == pytest.approx(math.sqrt(a * b), rel=1e-9)


@pytest.mark.parametrize("n", LINEAR_QUADRATIC)
def test_linear_quadratic(n: int) -> None:
    times = [level.sigma for level in fs.linear_quadratic(fp.flow(), n).levels]
    np.testing.assert_allclose(times, LINEAR_QUADRATIC[n], atol=6e-8)


@pytest.mark.parametrize("n", [5, 12, 33])
def test_both_halves_of_linear_quadratic_meet_smoothly(n: int) -> None:
    covered = 0.1
    times = np.array(
        [lv.sigma for lv in fs.linear_quadratic(fp.flow(), n, threshold=covered).levels]
    )
    linear = n // 2
    assert times[linear] == pytest.approx(1 - covered, rel=1e-12)
    assert np.diff(times[: linear + 1]) == pytest.approx(-covered / linear, rel=1e-9)
    seconds = np.diff(times[linear:], 2)
    assert seconds == pytest.approx(seconds[0], rel=1e-9)  # a parabola that ends at 0
    first = times[linear + 1] - times[linear]
    assert first - seconds[0] / 2 == pytest.approx(-covered / linear, rel=1e-9)


def test_flux() -> None:
    expected = [1.0, 0.92664737, 0.82570165, 0.67798674, 0.44119975, 0.0]
    times = [level.sigma for level in make_grid("flux", fp.flow(), 5).levels]
    np.testing.assert_allclose(times, expected, rtol=1e-7)
    same = fs.flow(fp.flow(), 5, shift=math.exp(1.15))
    assert [level.sigma for level in same.levels] == pytest.approx(times, rel=1e-12)


def test_stable_diffusion_3() -> None:
    times = [level.sigma for level in make_grid("sd3", fp.flow(), 5).levels]
    np.testing.assert_allclose(times, [1, 12 / 13, 9 / 11, 2 / 3, 3 / 7, 0], rtol=1e-12)
    assert make_grid("sd3_dynamic", fp.flow(), 5).ratios == pytest.approx(
        make_grid("sd3", fp.flow(), 5).ratios
    )
    smaller = make_grid("sd3_dynamic", fp.flow(), 5, tokens=1024).ratios
    assert smaller == pytest.approx(fs.flow(fp.flow(), 5, shift=1.5).ratios)


def test_laplace() -> None:
    expected = [
        *(14.6146412, 2.1212726, 1.4999831, 1.2247357, 1.0606542),
        *(0.9428143, 0.8165027, 0.6666742, 0.4714151, 0.0291672, 0.0),
    ]
    np.testing.assert_allclose(fs.laplace(SD, 10).ratios, expected, rtol=3e-6)
    narrow = np.log(fs.laplace(SD, 11, mu=0.7, beta=0.2).ratios[1:-2])
    r = np.arange(1, 10) / 10
    quantiles = 0.7 + 0.2 * np.where(r < 0.5, -np.log(2 * r), np.log(2 - 2 * r))
    np.testing.assert_allclose(narrow, quantiles, atol=1e-4)


def test_vp() -> None:
    expected = [
        *(152.1669703, 53.3098475, 21.0956241, 9.4031966, 4.6806399),
        *(2.5494299, 1.4619718, 0.822899, 0.3817022, 0.010486, 0.0),
    ]
    np.testing.assert_allclose(fs.vp(fp.vp_continuous(), 10).ratios, expected, rtol=1e-4)
