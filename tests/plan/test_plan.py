"""A Plan refuses programs that are malformed or wrong, and survives JSON bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.errors import FewstepError, InvalidInputError
from fewstep.plan import Combine, Denoise, Draw, Plan
from fewstep.samplers import SAMPLERS

TRACED = [entry.name for entry in SAMPLERS if not entry.eager]

EDM = fs.process.edm()
FAR, NEAR, CLEAN = (EDM.level(5.0), EDM.level(1.0), EDM.clean)


def make(*program: Any, result: int, levels: Any = (FAR, CLEAN), **fields: Any) -> Plan:
    return Plan(tuple(program), result, tuple(levels), EDM, **fields)


def test_a_right_program_is_accepted() -> None:
    plan = make(Denoise(1, 0, FAR), result=1)
    assert (plan.calls, plan.draws, plan.name) == (1, 0, "custom/custom-1")
    assert str(plan) == "custom/custom-1: 1 network calls, 0 noise draws"


@pytest.mark.parametrize(
    ("program", "result", "message"),
    [
        ([Denoise(1, 7, FAR)], 1, "instruction 0 reads register 7 before it is written"),
        ([Combine(1, ((1, 1.0),))], 1, "reads register 1 before"),
        ([Denoise(0, 0, FAR)], 0, "instruction 0 writes register 0 again"),
        ([Denoise(1, 0, FAR), Denoise(1, 0, FAR)], 1, "instruction 1 writes register 1 again"),
        ([Denoise(1, 0, FAR)], 2, "result register 2 is never written"),
        ([Denoise(1, 0, FAR), Combine(2, ())], 2, "instruction 1 adds up nothing"),
        ([Denoise(1, 0, FAR), Combine(2, ((1, math.nan),))], 2, "coefficient nan"),
        ([Denoise(1, 0, FAR), Combine(2, ((1, math.inf),))], 2, "coefficient inf"),
        ([Denoise(1, 0, FAR), Combine(2, ((1, 1.01),))], 2, "breaks the signal rule"),
        ([Combine(1, ((0, 0.5),)), Denoise(2, 1, NEAR)], 2, "breaks the signal rule"),
        (
            [Denoise(1, 0, FAR), Draw(2, FAR, CLEAN), Combine(3, ((1, 1.0), (2, 0.01)))],
            3,
            "breaks the noise rule",
        ),
    ],
)
def test_a_wrong_program_is_refused(program: list[Any], result: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(*program, result=result)


@pytest.mark.parametrize(
    "level", [fs.Level(0.0, 1.0, math.inf), fs.Level(0.0, math.nan, 1.0), fs.Level(0.0, 1.0, -1.0)]
)
def test_impossible_levels_are_refused(level: fs.Level) -> None:
    with pytest.raises(InvalidInputError, match="finite alpha and sigma >= 0"):
        make(Denoise(1, 0, FAR), result=1, levels=(level, CLEAN))


def test_too_few_levels_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 2 levels"):
        make(Denoise(1, 0, FAR), result=1, levels=(FAR,))


def test_a_rule_that_is_declared_may_be_broken_and_only_that_one() -> None:
    def weak(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        tape.declare_inexact("signal")
        return 0.9 * tape.denoise(tape.start, grid.levels[0])

    grid = fs.Grid(EDM, (FAR, CLEAN))
    assert fs.plan(weak, grid).inexact == ("signal",)

    def noisy(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        tape.declare_inexact("signal")
        return tape.denoise(tape.start, grid.levels[0]) + tape.noise(*grid.levels)

    with pytest.raises(InvalidInputError, match=r"noise rule.*declare_inexact\('noise'\)"):
        fs.plan(noisy, grid)


def test_rounding_left_of_the_start_is_not_noise() -> None:
    def rearranged(tape: fs.Tape, grid: fs.Grid) -> fs.Vector:
        t = grid.levels[0]
        d = tape.denoise(tape.start, t)
        thirds = (tape.start - d) / (3 * t.sigma)
        return tape.start - t.sigma * (thirds + thirds + thirds)

    for ratio in (5.0, 77.7, 123.4):
        fs.plan(rearranged, fs.Grid.from_ratios(EDM, [ratio, 0.0]))


@pytest.mark.parametrize(
    "fault",
    [
        lambda tape, grid: tape.start / (grid.levels[-1].sigma),
        lambda tape, grid: tape.start * (1 / grid.levels[-1].ratio),
        lambda tape, grid: tape.start * math.exp(1e4),
    ],
)
def test_arithmetic_faults_of_a_sampler_are_explained(fault) -> None:
    with pytest.raises(InvalidInputError, match="cannot run on this grid .*divides by zero"):
        fs.plan(fault, fs.Grid(EDM, (FAR, CLEAN)))


@pytest.mark.parametrize("name", TRACED)
def test_levels_that_rounding_cannot_tell_apart_are_refused_or_run(name: str) -> None:
    one = 1.0
    grid = fs.Grid.from_ratios(EDM, [2.0, math.nextafter(one, 2.0), one, 0.5, 0.0])
    try:
        plan = fs.plan(name, grid)
    except InvalidInputError:
        return
    assert all(
        math.isfinite(c) for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms
    )


@pytest.mark.parametrize("grid", [[1.0, 0.0], None, "karras", EDM])
def test_a_grid_must_be_a_grid(grid: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be a fewstep.Grid.*from_ratios"):
        fs.plan("euler", grid)


def random_grid(seed: int, pure: bool, clean: bool) -> fs.Grid:
    rng = random.Random(seed)
    process = rng.choice(
        [
            fs.process.vp_linear(),
            fs.process.vp_cosine(),
            fs.process.vp_continuous(),
            fs.process.ve(),
            EDM,
            fs.process.flow(),
            fs.process.vp_from_betas([0.1, 1 / 3, 0.2, 0.7]),
        ]
    )
    ratios = sorted(
        {math.exp(rng.uniform(-6, 6)) for _ in range(rng.randint(2, 20))}, reverse=True
    )
    pure = pure and process.name not in ("ve", "edm")
    return fs.Grid.from_ratios(process, [math.inf] * pure + ratios + [0.0] * clean)


@given(
    st.integers(0, 2**32),
    st.sampled_from(TRACED),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60)
def test_json_gives_back_the_same_plan_bit_for_bit(
    seed: int, sampler: str, pure: bool, clean: bool
) -> None:
    plan = fs.plan(sampler, random_grid(seed, pure, clean))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.process == plan.process
    assert again.to_json() == plan.to_json()
    assert [(hex_(c)) for c in numbers(again)] == [hex_(c) for c in numbers(plan)]


def hex_(value: float) -> str:
    return value.hex() if math.isfinite(value) else str(value)


def numbers(plan: Plan) -> list[float]:
    of_levels = [v for level in plan.levels for v in (level.t, level.alpha, level.sigma)]
    return of_levels + [c for i in plan.instructions if isinstance(i, Combine) for _, c in i.terms]


def test_json_keeps_everything(tmp_path: Path) -> None:
    grid = fs.schedulers.karras(fs.process.ve(), 4, rho=5.0)
    plan = fs.plan("euler_ancestral", grid, eta=0.3, s_noise=1.003)
    assert plan.levels[-1].t == -math.inf
    path = tmp_path / "plan.json"
    text = plan.to_json(path)
    for again in (Plan.from_json(path), Plan.from_json(str(path)), Plan.from_json("\n " + text)):
        assert again == plan
        assert again.name == "euler_ancestral/karras-4"
        assert again.options == {"eta": 0.3, "s_noise": 1.003}
        assert again.scheduler_options == {"rho": 5.0, "tail": "zero"}
        assert again.inexact == ("noise",)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_loaded_plan_runs_the_same(tmp_path: Path) -> None:
    grid = fs.schedulers.karras(fs.process.vp_linear(), 6)
    denoiser = fs.exact.GaussianMixture(torch.ones(1, 3), 0.5, process=grid.process)
    x = fs.Noise([1, 2], (3,)).initial()
    plan = fs.plan("unipc", grid)
    assert Plan.from_json(plan.to_json()).run(denoiser, x).equal(plan.run(denoiser, x))


GOOD = fs.plan("heun", fs.schedulers.karras(fs.process.ve(), 3)).to_dict()


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


MALFORMED: list[Any] = [
    *(without(key) for key in GOOD if key != "calls"),
    {**GOOD, "format": "other"},
    {**GOOD, "version": 99},
    {**GOOD, "levels": [[1.0, 1.0]]},
    {**GOOD, "levels": [["a", 1.0, 1.0]]},
    {**GOOD, "levels": 3},
    {**GOOD, "grid": [0]},
    {**GOOD, "grid": [0, 99]},
    {**GOOD, "grid": [0, -1]},
    {**GOOD, "grid": None},
    {**GOOD, "grid": ["x"]},
    {**GOOD, "result": "x"},
    {**GOOD, "result": 999},
    {**GOOD, "instructions": [["denoise", 1, 0]]},
    {**GOOD, "instructions": [["denoise", 1, 0, -1]]},
    {**GOOD, "instructions": [["jump", 1, 0]]},
    {**GOOD, "instructions": [["combine", 1, [[0, None]]]]},
    {**GOOD, "instructions": [["combine", 1, [[0]]]]},
    {**GOOD, "instructions": [["combine", 1, []]]},
    {**GOOD, "instructions": [["combine", 1, [[0, math.nan]]]]},
    {**GOOD, "instructions": [3]},
    {**GOOD, "instructions": None},
    {**GOOD, "process": {"name": "nothing"}},
    {**GOOD, "process": {"name": "ve", "sigma": 3}},
    {**GOOD, "process": {"name": "ve", "sigma_min": "x"}},
    {**GOOD, "process": "ve"},
    {**GOOD, "options": [1]},
    {**GOOD, "scheduler_options": 3},
    {**GOOD, "inexact": 3},
    {},
]


@pytest.mark.parametrize("data", MALFORMED, ids=lambda d: json.dumps(d)[-60:])
def test_malformed_plans_are_refused_in_words(data: Any) -> None:
    with pytest.raises(InvalidInputError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("data", [None, [], [1], "text", 3])
def test_data_that_is_no_object_is_refused(data: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a plan"):
        Plan.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidInputError, match="not a plan"):
        Plan.from_json(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "not JSON"),
        ('{"format": ', "not JSON"),
        ("missing.json", "cannot read"),
        ("", "cannot read"),
        ("a\0b", "cannot read"),
        ("x" * 5000, "cannot read"),
    ],
)
def test_text_that_is_no_plan_is_refused(source: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Plan.from_json(source)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InvalidInputError, match="cannot read"):
        Plan.from_json(path)


@given(st.data())
@settings(max_examples=150)
def test_any_damage_to_the_text_gives_a_plan_or_an_error_of_ours(data: st.DataObject) -> None:
    text = json.dumps(GOOD)
    start = data.draw(st.integers(1, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    damaged = text[:start] + data.draw(st.text('{}[]",:0159-.eN ', max_size=4)) + text[end:]
    try:
        plan = Plan.from_json(damaged)
    except FewstepError:
        return
    assert isinstance(plan, Plan)


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    plan = fs.plan("euler", fs.schedulers.karras(EDM, 2))
    with pytest.raises(InvalidInputError, match="cannot write .*missing"):
        plan.to_json(tmp_path / "missing" / "plan.json")
    for value in (math.inf, object()):
        with pytest.raises(InvalidInputError, match="cannot be saved"):
            dataclasses.replace(plan, options={"value": value}).to_json()


# ---- mutations -------------------------------------------------------------------------------


def slopes(
    plan_of_steps: Any, denoiser: fs.Denoiser, x: torch.Tensor, truth: torch.Tensor
) -> float:
    errors = [float((plan_of_steps(n).run(denoiser, x) - truth).abs().max()) for n in (160, 320)]
    return math.log2(errors[0] / errors[1])


SEVEN_STEPS = fs.schedulers.karras(fs.process.vp_linear(), 7)
RULED = [
    name
    for name in TRACED
    if not fs.plan(name, SEVEN_STEPS).inexact
    and "differentiable network" not in SAMPLERS.find(name).needs
]
"""Samplers whose every coefficient the rules can see: not those of derivatives, which vanish on one point."""


@pytest.mark.parametrize("name", RULED)
def test_every_single_coefficient_is_needed(name: str) -> None:
    """Change one coefficient by 1 %, and the Plan's own rules refuse it."""
    plan = fs.plan(name, SEVEN_STEPS)
    survivors = []
    for k, instruction in enumerate(plan.instructions):
        if not isinstance(instruction, Combine):
            continue
        for j, (register, c) in enumerate(instruction.terms):
            if abs(c) < 1e-5:  # a hundredth of it is too little for the rules to tell
                continue
            terms = list(instruction.terms)
            terms[j] = (register, 1.01 * c)
            program = list(plan.instructions)
            program[k] = Combine(instruction.out, tuple(terms))
            try:
                dataclasses.replace(plan, instructions=tuple(program))
            except InvalidInputError:
                continue
            survivors.append((k, register, c))
    assert not survivors


def shifted_split(plan: Plan, share: float) -> Plan:
    """Move a share of each step's newest output to the one before it, which no rule of a Plan can see."""
    outputs = {i.out for i in plan.instructions if isinstance(i, Denoise)}
    program: list[Any] = []
    for instruction in plan.instructions:
        if isinstance(instruction, Combine):
            terms = dict(instruction.terms)
            used = sorted(r for r in terms if r in outputs)
            if len(used) > 1:
                moved = share * terms[used[-1]]
                terms[used[-1]] -= moved
                terms[used[-2]] += moved
                instruction = Combine(instruction.out, tuple(terms.items()))
        program.append(instruction)
    return dataclasses.replace(plan, instructions=tuple(program))


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_a_wrong_split_between_outputs_passes_the_rules_but_not_the_order(
    name: str, order: int
) -> None:
    denoiser = fs.exact.GaussianMixture(
        torch.tensor([[0.5]], dtype=torch.float64), 0.6, process=EDM
    )
    x = torch.tensor([[8.0]], dtype=torch.float64)
    # data N(m, w^2): the ODE keeps (x - m) / sqrt(w^2 + sigma^2)
    truth = 0.5 + 7.5 * math.sqrt((0.36 + 0.1**2) / (0.36 + 10.0**2)) * torch.ones_like(x)

    def plan(n: int) -> Plan:
        ratios = torch.linspace(10.0 ** (1 / 7), 0.1 ** (1 / 7), n + 1, dtype=torch.float64) ** 7
        return fs.plan(name, fs.Grid.from_ratios(EDM, ratios.tolist()))

    assert slopes(plan, denoiser, x, truth) == pytest.approx(order, abs=0.2)
    broken = slopes(lambda n: shifted_split(plan(n), 0.05), denoiser, x, truth)
    assert broken < order - 0.2
