"""Where tuned plans lie, which of them fits, and how `sample` takes it by itself."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep as fs
from fewstep import tuned
from fewstep.data import read_metadata
from fewstep.errors import InvalidInputError, UnknownNameError
from fewstep.models import Model
from fewstep.plan import Plan
from fewstep.tuned import OPTION, Purpose, plan_file, plan_for, plans_folder, plans_of
from tiny_model import tiny_model

VP = fs.process.vp_linear()
RATIOS = [120.0, 6.0, 0.9, 0.0]
PURPOSE = Purpose("tiny", 1.0, "search", 0.1, "ddim/simple-3", 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a class-conditional model of 4x4 pictures, whose network does something."""
    tiny_model().save(tmp_path / "tiny")
    return tmp_path / "tiny"


def made(steps: int = 3, process: fs.Process = VP, **facts: Any) -> Plan:
    """A plan tuned to the tiny model."""
    levels = [*RATIOS[:1], *[6.0 / (k + 1) for k in range(steps - 1)], 0.0]
    plan = fs.plan("ddim", fs.Grid.from_ratios(process, levels))
    assert isinstance(plan, Plan)
    return replace(PURPOSE, **facts).signed(plan)


def put(folder: Path, plan: Plan, name: str | None = None) -> Path:
    """Keep a plan where `fewstep tune` does."""
    guidance = plan.options[OPTION]["guidance"]
    file = plan_file(fs.load(folder), plan.calls, guidance)
    file.parent.mkdir(exist_ok=True)
    file = file if name is None else file.with_name(name)
    plan.to_json(file)
    return file


# ---- what a plan says of itself --------------------------------------------------------------


def test_a_purpose_goes_into_a_plan_and_comes_back():
    plan = made(guidance=2.5)
    assert Purpose.of(Plan.from_json(plan.to_json())) == replace(PURPOSE, guidance=2.5)
    assert Purpose.of(fs.plan("ddim", fs.Grid.from_ratios(VP, RATIOS))) is None
    assert PURPOSE.gain == 2.0 and replace(PURPOSE, error=0.0).gain == math.inf


@pytest.mark.parametrize(
    "told",
    [
        None,
        "cats",
        {},
        {"model": "tiny"},
        {**vars(PURPOSE), "guidance": "three"},
        {**vars(PURPOSE), "error": math.nan},
        {**vars(PURPOSE), "model": 3},
    ],
)
def test_a_purpose_that_makes_no_sense_is_refused(told):
    plan = replace(made(), options={OPTION: told})
    with pytest.raises(InvalidInputError, match="tune the plan again"):
        Purpose.of(plan)
    (mismatch,) = tuned.mismatches(plan, "tiny", 1.0)
    assert "not known what the plan was tuned for" in mismatch


# ---- where they lie --------------------------------------------------------------------------


def test_plans_lie_in_the_folder_of_the_model(folder):
    assert plans_folder(fs.load(folder)) == folder / "plans"
    assert plan_file(fs.load(folder), 5) == folder / "plans" / "tuned-5.json"


def test_plans_of_a_run_lie_beside_its_checkpoints(folder, tmp_path):
    run = tmp_path / "run"
    for step in (10, 20):
        shutil.copytree(folder, run / "checkpoints" / f"step-{step:08d}")
    assert fs.load(run).folder == run / "checkpoints" / "step-00000020"
    for source in (run, run / "checkpoints" / "step-00000010"):
        assert plan_file(fs.load(source), 5, 3) == run / "plans" / "tuned-5-guidance-3.json"
    put(run, made())
    assert plan_for(fs.load(run), 3) == made()


def test_no_two_guidance_scales_share_a_file(folder):
    model = fs.load(folder)
    scales = [1, 3.0, 3.0000001, 3.0000002, 7.5, -1.0, 0.1 + 0.2, 0.3, 1e-7, 1.0000000000000002]
    files = {plan_file(model, 5, scale) for scale in scales}
    assert len(files) == len(scales)
    assert plan_file(model, 5, 1.0) == plan_file(model, 5)


def test_what_cannot_be_written_to_is_told():
    digits = fs.load("digits")
    with pytest.raises(InvalidInputError, match="bundled model digits .* --out tuned-5.json"):
        plan_file(digits, 5)
    loose = Model(digits.network, digits.config)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="model in memory digits"):
        plan_file(loose, 5)
    assert plans_of(loose) == [] and plan_for(loose, 5) is None


# ---- which one fits --------------------------------------------------------------------------


def test_the_plan_is_for_exactly_these_calls_and_this_guidance(folder):
    for steps, guidance in [(3, 1.0), (4, 1.0), (3, 2.0), (3, 2.5)]:
        put(folder, made(steps, guidance=guidance))
    model = fs.load(folder)
    assert plan_for(model, 3) == made(3)
    assert plan_for(model, 3, 2) == made(3, guidance=2.0)
    assert plan_for(model, 4) == made(4)
    assert plan_for(model, 5) is plan_for(model, 4, 2.0) is plan_for(model, 3, 2.2) is None
    entries = plans_of(model)
    assert [(e.plan.calls, e.purpose.guidance) for e in entries] == [
        (3, 1.0),
        (3, 2.0),
        (3, 2.5),
        (4, 1.0),
    ]


def test_calls_count_not_steps_of_the_grid(folder):
    heun = fs.plan("heun", fs.Grid.from_ratios(VP, RATIOS))
    put(folder, PURPOSE.signed(heun))
    assert heun.calls == 5
    assert plan_for(fs.load(folder), 3) is None
    assert plan_for(fs.load(folder), 5).calls == 5


def test_of_several_the_nearest_is_taken(folder):
    put(folder, made(error=0.3), "a.json")
    put(folder, made(error=0.05), "b.json")
    put(folder, made(error=0.1), "c.json")
    assert plan_for(fs.load(folder), 3).options[OPTION]["error"] == 0.05


def test_foreign_plans_are_listed_with_the_reason_and_not_used(folder):
    put(folder, made(model="giant"), "giant.json")
    put(folder, made(process=fs.process.vp_cosine()), "cosine.json")
    plain = fs.plan("ddim", fs.Grid.from_ratios(VP, RATIOS))
    plain.to_json(folder / "plans" / "plain.json")
    replace(plain, options={OPTION: 7}).to_json(folder / "plans" / "seven.json")
    entries = {e.file.name: e.fault for e in plans_of(fs.load(folder))}
    assert "tuned for the model 'giant', not 'tiny'" in entries["giant.json"]
    assert "vp_cosine" in entries["cosine.json"]
    assert "not tuned" in entries["plain.json"]
    assert "tuned_for" in entries["seven.json"]
    assert plan_for(fs.load(folder), 3) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b"null",
        b"[" * 100_000,
        b'{"format": "fewstep-plan", "version": 1}',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"format": "fewstep-plan", "version": 2}',
        None,
    ],
    ids=repr,
)
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_used(folder, content):
    put(folder, made())
    broken = folder / "plans" / "tuned-4.json"
    if content is None:
        broken.mkdir()
    else:
        broken.write_bytes(content)
    model = fs.load(folder)
    good, bad = plans_of(model)
    assert (good.fault, bad.file, bad.plan) == ("", broken, None) and bad.fault
    with pytest.warns(UserWarning, match=r"tuned-4.json is not used: "):
        assert plan_for(model, 3) == made()


def test_any_change_to_a_file_is_a_reason_or_a_plan(folder):
    """Whatever stands in the place of a value, nothing but the reason comes of it."""
    file = put(folder, made())
    model, data = fs.load(folder), made().to_dict()
    for key in data:
        for value in (None, -1, 1e308, 10**400, "x", [], [None], {}, [[1, 2, 3]], True):
            file.write_text(json.dumps({**data, key: value}), encoding="utf-8")
            (entry,) = plans_of(model)
            assert entry.fault or entry.plan is not None


def test_files_that_are_being_written_and_other_files_are_left_alone(folder):
    put(folder, made(), ".tmp-1-tuned-3.json")
    (folder / "plans" / "notes.txt").write_text("mine", encoding="utf-8")
    assert plans_of(fs.load(folder)) == []
    shutil.rmtree(folder / "plans")
    (folder / "plans").write_text("not a folder", encoding="utf-8")
    assert plans_of(fs.load(folder)) == []


# ---- sample ----------------------------------------------------------------------------------


def used(model: fs.Denoiser, **options: Any) -> str:
    record = fs.sample(model, seed=3, **options).record
    return (
        "tuned"
        if OPTION in record["sampler_options"]
        else f"{record['sampler']}/{record['scheduler']}"
    )


def test_sample_takes_the_tuned_plan_by_itself(folder):
    plan = made()
    put(folder, plan)
    model = fs.load(folder)
    samples = fs.sample(model, 2, steps=3, seed=3)
    given = fs.sample(model, 2, plan=plan, seed=3)
    assert samples.images.equal(given.images) and samples.record == given.record
    assert not samples.images.equal(fs.sample(model, 2, sampler="ddim", steps=3, seed=3).images)
    assert used(model, steps=3, sampler="auto", scheduler="auto") == "tuned"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 3}, "tuned"),
        ({"steps": 4}, "dpmpp_2m/trailing"),
        ({}, "dpmpp_2m/trailing"),
        ({"steps": 3, "labels": 1}, "tuned"),
        ({"steps": 3, "labels": 1, "guidance": 2.0}, "dpmpp_2m/trailing"),
        ({"steps": 3, "clip": True}, "dpmpp_2m/trailing"),
        ({"steps": 3, "sampler": "ddim"}, "ddim/trailing"),
        ({"steps": 3, "scheduler": "karras"}, "dpmpp_2m/karras"),
        ({"steps": 3, "scheduler": fs.Grid.from_ratios(VP, RATIOS)}, "dpmpp_2m/custom"),
        ({"steps": 3, "scheduler": fs.schedulers.karras}, "dpmpp_2m/karras"),
        ({"steps": 3, "sampler_options": {"solver_type": "heun"}}, "dpmpp_2m/trailing"),
        ({"steps": 3, "sampler_options": {}}, "tuned"),
        ({"steps": 3, "sampler": "ddim", "scheduler": "karras"}, "ddim/karras"),
    ],
)
def test_when_the_tuned_plan_is_taken(folder, options, expected):
    put(folder, made())
    assert used(fs.load(folder), **options) == expected


def test_options_reach_what_auto_falls_back_to(folder):
    record = fs.sample(fs.load(folder), sampler_options={"solver_type": "heun"}, steps=2).record
    assert record["sampler_options"] == {"solver_type": "heun"}
    with pytest.raises(UnknownNameError, match="option of dpmpp_2m"):
        fs.sample(fs.load(folder), sampler_options={"eta": 1.0}, steps=2)


def test_auto_is_no_sampler(folder):
    assert "auto" not in fs.samplers.SAMPLERS.names()
    assert "auto" not in fs.schedulers.SCHEDULERS.names()
    with pytest.raises(UnknownNameError, match="Known: (?!.*auto)"):
        fs.sample(fs.load(folder), sampler="autoo")
    with pytest.raises(UnknownNameError):
        fs.plan("auto", fs.Grid.from_ratios(VP, RATIOS))


def test_a_wrapper_is_another_model(folder):
    put(folder, made())
    assert used(fs.Clipped(fs.load(folder)), steps=3) == "dpmpp_2m/trailing"
    exact = fs.exact.GaussianMixture(torch.zeros(1, 2), 1.0, process=VP)
    assert used(exact, steps=3) == "dpmpp_2m/trailing"


@pytest.mark.parametrize("steps", [0, -1, 2.5, "three"])
def test_steps_are_checked_before_plans_are_looked_up(folder, steps):
    put(folder, made())
    with pytest.raises(InvalidInputError, match="steps"):
        fs.sample(fs.load(folder), steps=steps)


def test_the_picture_holds_all_that_makes_it_again(folder, tmp_path):
    put(folder, made(guidance=2.0))
    model = fs.load(folder)
    samples = fs.sample(model, 2, labels=[0, 2], guidance=2.0, steps=3, seed=5)
    samples.save(tmp_path / "x.png")
    record = read_metadata(tmp_path / "x.png")
    assert record["sampler_options"][OPTION] == vars(replace(PURPOSE, guidance=2.0))
    plan = Plan.from_dict(record["plan"])
    assert plan == made(guidance=2.0)
    shutil.rmtree(folder / "plans")
    again = fs.sample(
        model,
        plan=plan,
        seed=record["seeds"],
        labels=record["labels"],
        guidance=record["guidance"],
    )
    assert again.images.equal(samples.images)


def test_only_a_tuned_plan_is_kept_in_the_picture(folder):
    assert "plan" not in fs.sample(fs.load(folder), steps=2).record


@pytest.mark.parametrize("calls", [3, 4, 5, 6, 8, 10])
def test_the_bundled_model_comes_with_plans(calls):
    plan = plan_for(fs.load("digits"), calls)
    assert plan is not None and plan.calls == calls
    purpose = Purpose.of(plan)
    assert purpose is not None and purpose.model == "digits" and purpose.gain > 1


def test_a_bundled_plan_is_nearer_than_the_usual_sampler_on_noise_it_never_saw():
    model = fs.load("digits")
    wanted: dict[str, Any] = {"n": 4, "seed": 77, "labels": [3, 1, 4, 5], "batch_size": 4}
    truth = fs.sample(model, **wanted, sampler="unipc", scheduler="exponential", steps=40).images
    ours = fs.sample(model, **wanted, steps=5)
    usual = fs.sample(model, **wanted, sampler="dpmpp_2m", scheduler="trailing", steps=5).images
    assert ours.record["network_calls"] == 5 and ours.record["sampler"] == "tuned"

    def off(images: torch.Tensor) -> float:
        return float((images - truth).square().mean().sqrt())

    assert off(ours.images) < 0.75 * off(usual)
