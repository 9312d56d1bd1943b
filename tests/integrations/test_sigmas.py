"""Plans for other programs: the programs themselves, driven by what they are told, make the plan's own picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.integrations import export_sigmas
from fewstep.plan import Plan
from fewstep.samplers import SAMPLERS
from peer_support import k_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VP, FLOW, EDM = fs.process.vp_linear(), fs.process.flow(), fs.process.edm()
SCALED = fs.process.vp_scaled_linear()
COSINE = fs.process.vp_cosine()
CENTRES = torch.tensor([[-1.0, 0.3], [0.8, -0.5], [0.2, 1.1]], dtype=torch.float64)
LEVELS = [14.2, 7.3, 2.1, 0.83, 0.31, 0.094, 0.0]
"""Levels between the entries of every table."""


TIMES = [1.0, 0.8, 0.55, 0.3, 0.12]


def mixture(process: fs.Process) -> fs.exact.GaussianMixture:
    return fs.exact.GaussianMixture(CENTRES, 0.2, process=process)


def start() -> Tensor:
    return torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(sampler: str, process: fs.Process, **options: Any) -> Plan:
    made = fs.plan(sampler, fs.Grid.from_ratios(process, LEVELS), **options)
    assert isinstance(made, Plan)
    return made


def picture(plan: Plan) -> Tensor:
    return plan.run(mixture(plan.process), plan.levels[0].sigma * start())


def as_text(told: dict[str, Any]) -> dict[str, Any]:
    """What somebody reads who gets it as JSON."""
    return json.loads(json.dumps(told, allow_nan=False))


def assert_the_plans_picture(got: Tensor, plan: Plan, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), picture(plan), rtol=0, atol=atol)


# ---- diffusers -------------------------------------------------------------------------------


def by_diffusers(told: dict[str, Any], process: fs.Process, arguments: str = "") -> Tensor:
    """Run diffusers in float32 as it is told, the exact denoiser being asked at the times that diffusers names."""
    peers = pytest.importorskip("diffusers").schedulers
    made = getattr(peers, told["scheduler"])(**told["config"])
    given = told[arguments or "set_timesteps"]
    if told["scheduler"] == "UniPCMultistepScheduler" and "sigmas" in given:
        given = {"sigmas": np.array(given["sigmas"])}  # on a plain list it fails
    made.set_timesteps(**given)
    if not arguments:
        for name, values in told.get("assign", {}).items():
            setattr(made, name, torch.tensor(values, dtype=torch.float32))
    denoiser = mixture(process)
    flow = process.name == "flow"
    x = told["start"] * start().float()
    if told["scheduler"] == "EulerDiscreteScheduler":
        x = x / process.path.alpha_of(made.sigmas[0])
    for t in made.timesteps:
        point = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        level = process.level(float(t) / 1000 if flow else float(t))
        estimate = denoiser(point, level)
        noise = (point - level.alpha * estimate) / level.sigma
        x = made.step(noise - estimate if flow else noise, t, x).prev_sample
    return x


@pytest.mark.parametrize("process", [VP, SCALED, COSINE, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {}),
        ("euler", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("unipc", {}),
        ("unipc", {"order": 3}),
    ],
)
def test_diffusers_makes_the_plans_picture(sampler, options, process):
    plan = by_hand(sampler, process, **options)
    told = as_text(export_sigmas(plan, "diffusers"))
    assert told["exact"] is True
    assert_the_plans_picture(by_diffusers(told, process), plan)


def test_whole_timesteps_are_enough_where_the_levels_have_them():
    trailing = fs.plan("dpmpp_2m", fs.schedulers.trailing(VP, 6))
    told = as_text(export_sigmas(trailing, "diffusers"))
    assert "assign" not in told and "nearest" not in told
    assert told["set_timesteps"]["timesteps"] == [999, 832, 666, 499, 332, 166]
    assert_the_plans_picture(by_diffusers(told, VP), trailing)


@pytest.mark.parametrize(("sampler", "process"), [("dpmpp_2m", VP), ("unipc", FLOW)])
def test_whole_timesteps_come_near_and_are_not_called_exact(sampler, process):
    plan = by_hand(sampler, process)
    told = as_text(export_sigmas(plan, "diffusers"))
    distance = (by_diffusers(told, process, "nearest").double() - picture(plan)).abs().max()
    assert 1e-4 < distance < 0.05
    assert told["set_timesteps"] == {"num_inference_steps": 6}  # that alone is not the list


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_flow_models_may_start_at_pure_noise(sampler):
    plan = fs.plan(sampler, fs.Grid.from_times(FLOW, TIMES))
    told = as_text(export_sigmas(plan, "diffusers"))
    assert_the_plans_picture(by_diffusers(told, FLOW), plan)


# ---- k-diffusion and ComfyUI, whose functions are the same -----------------------------------


def by_k_diffusion(
    function: str, sigmas: list[float], denoiser: Callable[[Tensor, float], Tensor], x: Tensor
) -> Tensor:
    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, float(sigma[0]))

    values = torch.tensor(sigmas, dtype=torch.float64)
    return getattr(k_diffusion(), function)(model, x, values)


@pytest.mark.global_rng  # the peer draws noise for churn even where it adds none
@pytest.mark.parametrize("process", [VP, EDM, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm_2", "dpmpp_2m"])
def test_k_diffusion_makes_the_plans_picture(sampler, process):
    plan = by_hand(sampler, process)
    told = as_text(export_sigmas(plan, "k-diffusion"))

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        level = process.levels_at([sigma])[0]
        return mixture(process)(level.alpha * x, level)

    got = by_k_diffusion(told["function"], told["sigmas"], denoiser, told["start"] * start())
    assert told["exact"] is True
    assert_the_plans_picture(got, plan, atol=1e-9)


@pytest.mark.global_rng
@pytest.mark.parametrize(
    ("sampler", "options"), [("euler", {}), ("heun", {"variable": "flow_time"}), ("dpmpp_2m", {})]
)
def test_comfyui_is_given_the_flow_time_of_flow_models(sampler, options):
    """ComfyUI calls k-diffusion's functions with the flow time as sigma, and with points that are not scaled."""
    plan = fs.plan(sampler, fs.Grid.from_times(FLOW, TIMES), **options)
    told = as_text(export_sigmas(plan, "comfyui"))
    assert told["sigmas"] == "1, 0.8, 0.55, 0.3, 0.12, 0" and told["sampler"] == sampler
    sigmas = [float(text) for text in told["sigmas"].split(",")]

    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return mixture(FLOW)(x, FLOW.level(sigma))

    got = by_k_diffusion(f"sample_{told['sampler']}", sigmas, denoiser, start())
    assert told["exact"] is (sampler != "dpmpp_2m")
    assert bool((got - picture(plan)).abs().max() < 1e-6) is told["exact"]


def test_comfyui_is_given_sigma_over_alpha_of_other_models():
    told = export_sigmas(by_hand("dpmpp_2m", VP), "comfyui")
    assert (told["sampler"], told["exact"], told["notes"]) == ("dpmpp_2m", True, [])
    assert [float(text) for text in told["sigmas"].split(", ")] == pytest.approx(LEVELS, rel=1e-8)


@pytest.mark.parametrize(
    ("options", "name", "notes"),
    [
        ({}, "uni_pc_bh2", 2),
        ({"order": 3}, "uni_pc_bh2", 1),
        ({"order": 3, "variant": "bh1"}, "uni_pc", 1),
    ],
)
def test_what_comfyui_does_otherwise_is_said(options, name, notes):
    told = export_sigmas(by_hand("unipc", VP, **options), "comfyui")
    assert (told["sampler"], told["exact"], len(told["notes"])) == (name, False, notes)


# ---- what is refused -------------------------------------------------------------------------


def learned() -> Plan:
    """A plan as learning leaves it: levels and mixing weights of its own."""
    grid = fs.Grid.from_ratios(VP, LEVELS)

    def tuned(tape: fs.Tape, grid: fs.Grid, base: str, tuned_for: dict[str, Any]) -> fs.Vector:
        first, second, *_ = grid.levels
        a = tape.denoise(tape.start, first)
        r = second.sigma / first.sigma
        x = r * tape.start + (second.alpha - r * first.alpha) * a
        return 1.25 * tape.denoise(x, second) - 0.25 * a

    return fs.plan(tuned, grid, base="unipc", tuned_for={"model": "digits"})


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "k-diffusion"])
def test_learned_and_stochastic_plans_are_refused_with_the_reason(to):
    with pytest.raises(InvalidInputError, match="mixing weights of its own.*fewstep sample MODEL"):
        export_sigmas(learned(), to)
    with pytest.raises(InvalidInputError, match="draws noise"):
        export_sigmas(by_hand("euler_ancestral", VP), to)
    with pytest.raises(InvalidInputError, match="no sampler that makes the picture of deis"):
        export_sigmas(by_hand("deis", VP), to)


def test_a_plan_that_is_not_what_its_name_says_is_refused():
    """Coefficients decide, not the name: a table changed by 1 part in 1000 is no longer DDIM."""
    data = by_hand("ddim", VP).to_dict()
    export_sigmas(Plan.from_dict(data), "comfyui")
    changed = json.loads(json.dumps(data))
    denoised = [row for row in changed["instructions"] if row[0] == "combine"][-2]
    denoised[2] = [[register, c * 1.001] for register, c in denoised[2]]
    changed["inexact"] = ["signal", "noise"]
    with pytest.raises(InvalidInputError, match="mixing weights of its own"):
        export_sigmas(Plan.from_dict(changed), "comfyui")


def test_options_of_tuning_do_not_hide_the_sampler():
    data = by_hand("dpmpp_2m", VP).to_dict()
    data["options"]["tuned_for"] = {"model": "digits"}
    assert export_sigmas(Plan.from_dict(data), "comfyui")["sampler"] == "dpmpp_2m"
    data["options"] = {}  # the default options are those of the plan
    assert export_sigmas(Plan.from_dict(data), "diffusers")["config"]["solver_type"] == "midpoint"


@pytest.mark.parametrize(
    ("plan", "to", "message"),
    [
        (by_hand("unipc", VP, variant="bh1"), "diffusers", "divides by zero"),
        (fs.plan("unipc", fs.Grid.from_times(FLOW, TIMES)), "diffusers", "divides by zero"),
        (by_hand("ddim", EDM), "diffusers", "process edm"),
        (by_hand("heun", VP), "diffusers", "no sampler that makes"),
        (by_hand("unipc", VP), "k-diffusion", "no sampler that makes"),
        (by_hand("unipc", FLOW), "comfyui", "no sampler that makes"),
        (by_hand("ttm", VP, eta=0.0), "comfyui", "no sampler that makes"),
        (by_hand("euler_cfg_pp", VP), "comfyui", "no sampler that makes"),
        (fs.plan("ddim", fs.Grid.from_ratios(VP, [9, 1])), "diffusers", "ends with noise"),
        (fs.plan("ddim", fs.Grid.from_times(FLOW, [1, 0.5])), "k-diffusion", "pure noise"),
    ],
)
def test_what_a_program_cannot_run_is_refused(plan, to, message):
    with pytest.raises(InvalidInputError, match=message):
        export_sigmas(plan, to)


def test_an_end_in_noise_is_fine_where_a_list_may_end_anywhere():
    plan = fs.plan("ddim", fs.Grid.from_ratios(VP, [9, 1]))
    assert export_sigmas(plan, "comfyui")["sigmas"] == "9, 1"


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_any_table_is_told_to_diffusers(zero_terminal_snr):
    peers = pytest.importorskip("diffusers").schedulers
    betas = [0.01 + 0.0003 * k for k in range(100)]
    for process in (
        fs.process.vp_from_betas(betas, zero_terminal_snr),
        fs.process.vp_sigmoid(zero_terminal_snr=zero_terminal_snr),
        fs.process.vp_scaled_linear(zero_terminal_snr=zero_terminal_snr),
    ):
        plan = fs.plan("ddim", fs.Grid.from_ratios(process, [3.0, 1.0, 0.0]))
        told = as_text(export_sigmas(plan, "diffusers"))
        made = getattr(peers, told["scheduler"])(**told["config"])
        times = torch.arange(process.training_steps - 1, dtype=torch.float64)
        alphas = made.alphas_cumprod[:-1].double().sqrt()
        torch.testing.assert_close(alphas, process.alpha(times), rtol=2e-4, atol=1e-6)


def test_every_name_is_one_that_the_registry_knows():
    from fewstep.integrations.sigmas import _SCHEDULERS, FUNCTIONS

    for name in (*FUNCTIONS, *_SCHEDULERS, "uni_pc_bh1", "uni_pc_bh2"):
        SAMPLERS.find(name)


def test_an_unknown_program_is_refused_with_all_there_are():
    with pytest.raises(UnknownNameError, match="comfyui, diffusers, k-diffusion"):
        export_sigmas(by_hand("ddim", VP), "comfy")  # type: ignore[arg-type]
    assert math.isfinite(export_sigmas(by_hand("ddim", VP), "k-diffusion")["start"])
