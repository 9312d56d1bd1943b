"""The same levels as diffusers and k-diffusion make with their own flags, in their own precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fewstep as fs
from fewstep import process as fp
from fewstep.schedulers import make_grid
from peer_support import k_diffusion

SD, VP = fp.vp_scaled_linear(), fp.vp_linear()
COUNTS = (2, 3, 7, 10, 30, 37, 250)
FLOAT32 = 3e-5
"""Accuracy of tables that are computed in float32."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


def peer(name: str, **config: Any) -> Any:
    """A scheduler of diffusers on Stable Diffusion's table."""
    schedulers = pytest.importorskip("diffusers").schedulers
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return getattr(schedulers, name)(**table, **config)


def flow_peer(**config: Any) -> Any:
    return pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**config)


def times(name: str, n: int, **options: Any) -> list[float]:
    return [t for t in make_grid(name, SD, n, **options).times if t >= 0]


def flow_times(name: str, n: int, **options: Any) -> list[float]:
    return [level.sigma for level in make_grid(name, fp.flow(), n, **options).levels]


@pytest.mark.parametrize(
    ("spacing", "name", "options"),
    [
        ("linspace", "normal", {}),
        ("leading", "leading", {"offset": 1}),
        ("trailing", "trailing", {}),
    ],
)
@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_spacings_of_euler(
    scheduler: str, spacing: str, name: str, options: dict[str, Any]
) -> None:
    """Their linspace keeps fractional times, so it is our `normal`; between entries they go straight in sigma."""
    theirs = peer(scheduler, timestep_spacing=spacing, steps_offset=options.get("offset", 0))
    for n in COUNTS:
        theirs.set_timesteps(n)
        np.testing.assert_allclose(times(name, n, **options), theirs.timesteps, rtol=1e-6)
        ratios = make_grid(name, SD, n, **options).ratios
        np.testing.assert_allclose(
            ratios, theirs.sigmas, rtol=1e-4 if name == "normal" else FLOAT32
        )


@pytest.mark.parametrize(
    "scheduler",
    ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"],
)
@pytest.mark.parametrize(
    ("spacing", "name", "options"),
    [
        ("linspace", "linspace", {"tail": "cut"}),
        ("leading", "leading", {"tail": "cut", "offset": 1}),
        ("trailing", "trailing", {}),
    ],
)
def test_spacings_of_multistep_solvers(
    scheduler: str, spacing: str, name: str, options: dict[str, Any]
) -> None:
    theirs = peer(scheduler, timestep_spacing=spacing, steps_offset=options.get("offset", 0))
    for n in (1, *COUNTS):
        theirs.set_timesteps(n)
        assert times(name, n, **options) == theirs.timesteps.tolist(), n


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_end_of_multistep_solvers(final: str) -> None:
    theirs = peer("DPMSolverMultistepScheduler", final_sigmas_type=final)
    theirs.set_timesteps(10)
    ours = make_grid("linspace", SD, 10, tail="cut" if final == "zero" else "min")
    np.testing.assert_allclose(ours.ratios, theirs.sigmas, rtol=FLOAT32)


@pytest.mark.parametrize(
    "flag",
    ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas", "use_beta_sigmas"],
)
@pytest.mark.parametrize("n", COUNTS)
def test_flags_by_their_own_names(flag: str, n: int) -> None:
    pytest.importorskip("scipy")
    theirs = peer("DPMSolverMultistepScheduler", **{flag: True})
    theirs.set_timesteps(n)
    np.testing.assert_allclose(make_grid(flag, SD, n).ratios, theirs.sigmas, rtol=FLOAT32)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_consistency_models(name: str) -> None:
    theirs = peer(name)
    for n in range(1, 51):
        theirs.set_timesteps(n)
        assert times(name, n) == theirs.timesteps.tolist(), n


def test_align_your_steps() -> None:
    schedulers = pytest.importorskip("diffusers").schedulers
    published = schedulers.AysSchedules
    for model, name in (("StableDiffusion", "AYS SD1"), ("StableDiffusionXL", "AYS SDXL")):
        assert times(name, 10) == pytest.approx(published[f"{model}Timesteps"], abs=1e-8)
        ratios = make_grid(name, SD, 10).ratios
        assert ratios == pytest.approx(published[f"{model}Sigmas"], rel=0.02, abs=6e-3)
    wide = fp.edm(0.002, 700.0)
    assert make_grid("AYS SVD", wide, 10).ratios == pytest.approx(
        published["StableDiffusionVideoSigmas"], rel=1e-12
    )


@pytest.mark.parametrize("n", [1, *COUNTS])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_matching_with_a_constant_shift(n: int, shift: float) -> None:
    theirs = flow_peer(shift=shift)
    theirs.set_timesteps(n)
    ours = flow_times("flow_match_euler", n, shift=shift)
    # A shift below 1, twice, leads below the levels that a network is trained on; ours stay there.
    np.testing.assert_allclose(ours[:-1], theirs.sigmas[:-1].clamp(min=1e-3), rtol=1e-6)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / n, n))  # as the pipelines for Flux and Wan do
    np.testing.assert_allclose(flow_times("flow", n, shift=shift), theirs.sigmas, rtol=1e-6)


def test_the_shift_of_stable_diffusion_3() -> None:
    theirs = flow_peer(shift=3.0)
    theirs.set_timesteps(5)
    ours = flow_times("sd3_diffusers", 5)
    np.testing.assert_allclose(ours, theirs.sigmas, rtol=1e-6)
    assert ours[-2] == pytest.approx(0.00892857, rel=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
@pytest.mark.parametrize("terminal", [0.0, 0.1])
def test_flow_matching_with_a_dynamic_shift(tokens: int, terminal: float) -> None:
    theirs = flow_peer(use_dynamic_shifting=True, shift_terminal=terminal or None)
    for n in (2, 5, 28):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / n, n), mu=mu)
        ours = flow_times("flux", n, tokens=tokens, terminal=terminal)
        np.testing.assert_allclose(ours, theirs.sigmas, rtol=2e-6)


def test_ltx_video() -> None:
    theirs = flow_peer(use_dynamic_shifting=True, shift_terminal=0.1)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=0.95 + 1.1 * (2000 - 1024) / 3072)
    np.testing.assert_allclose(flow_times("ltx_video", 20, tokens=2000), theirs.sigmas, rtol=2e-6)


def test_flow_sigmas_of_multistep_solvers() -> None:
    theirs = peer("DPMSolverMultistepScheduler", use_flow_sigmas=True, flow_shift=5.0)
    for n in (2, 10, 33):
        theirs.set_timesteps(n)
        ours = flow_times("use_flow_sigmas", n, shift=5.0)[:-1]
        np.testing.assert_allclose(ours, theirs.sigmas[:-1], rtol=1e-6)


@pytest.mark.parametrize("n", COUNTS)
def test_k_diffusion(n: int) -> None:
    theirs = k_diffusion()
    for process in (SD, VP, fp.edm(), fp.ve()):
        low, high = process.least_noisy.ratio, process.noisiest.ratio
        for rho in (3.0, 7.0):
            np.testing.assert_allclose(
                fs.schedulers.karras(process, n, rho=rho).ratios,
                theirs.get_sigmas_karras(n, low, high, rho),
                rtol=FLOAT32,
            )
        np.testing.assert_allclose(
            make_grid("get_sigmas_exponential", process, n).ratios,
            theirs.get_sigmas_exponential(n, low, high),
            rtol=FLOAT32,
        )
        for rho in (0.5, 1.0, 2.0):
            np.testing.assert_allclose(
                make_grid("get_sigmas_polyexponential", process, n, rho=rho).ratios,
                theirs.get_sigmas_polyexponential(n, low, high, rho),
                rtol=FLOAT32,
            )
    np.testing.assert_allclose(
        make_grid("get_sigmas_vp", fp.vp_continuous(), n).ratios,
        theirs.get_sigmas_vp(n),
        rtol=3e-4,
    )


def test_vp_of_k_diffusion_moves_inside_narrower_ranges() -> None:
    theirs = k_diffusion().get_sigmas_vp(10, 15.0, 0.2, 1e-2).double().numpy()
    ours = np.array(fs.schedulers.vp(SD, 10, beta_d=15.0, beta_min=0.2, t_min=1e-2).ratios)
    inside = (theirs > SD.least_noisy.ratio) & (theirs < SD.noisiest.ratio)
    assert 6 < inside.sum() < 10
    np.testing.assert_allclose(ours[inside], theirs[inside], rtol=FLOAT32)
    outside = ours[: int(np.argmax(inside)) + 1]
    steps = np.diff(np.log(outside))
    assert steps == pytest.approx(steps[0])
    assert math.isclose(ours[0], SD.noisiest.ratio, rel_tol=1e-15)
