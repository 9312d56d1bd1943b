"""The executor does what the instructions say, keeps its promises about tensors, and names what went wrong."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep as fs
from fewstep.errors import InvalidInputError, NonFiniteError
from fewstep.plan import Combine, Denoise, Draw, Instruction, Plan, Progress
from fewstep.plan.instructions import reads
from fewstep.plan.lowering import Evaluate, lower

SAMPLER_NAMES = [
    "ddpm",
    "ddim",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "unipc",
    "lms",
    "dpmpp_3m_sde",
    "sa_solver",
]
"""Of every shape that a program can have."""

KINDS = ["noise", "data", "velocity", "flow", "score", "edm"]
PROCESSES = {
    "vp": fs.process.vp_linear(),
    "ve": fs.process.ve(),
    "edm": fs.process.edm(),
    "flow": fs.process.flow(),
}


# ---- a made-up plan against a naive interpreter ----------------------------------------------


def random_plan(seed: int, size: int = 25) -> Plan:
    """Any program at all: no sampler would do this, so nothing but the instructions can be followed."""
    rng = random.Random(seed)
    process = fs.process.vp_linear()
    times = sorted({rng.uniform(1, 998) for _ in range(5)}, reverse=True)
    levels = process.levels(times)
    program: list[Instruction] = []
    registers = [0]
    for out in rng.sample(range(1, 1000), size):
        kind = rng.random()
        if kind < 0.5:
            chosen = rng.sample(registers, min(len(registers), rng.randint(1, 4)))
            c = [rng.choice([1.0, rng.uniform(-1, 1)]) for _ in chosen]
            program.append(Combine(out, tuple(zip(chosen, c, strict=True))))
        elif kind < 0.85:
            program.append(Denoise(out, rng.choice(registers), rng.choice(levels)))
        else:
            program.append(Draw(out, *rng.sample(levels, 2)))
        registers.append(out)
    return Plan(
        tuple(program), rng.choice(registers), tuple(levels), process, inexact=("signal", "noise")
    )


class Recorder:
    """A denoiser that says where it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, fs.Level]] = []

    def __call__(self, x: Tensor, level: fs.Level) -> Tensor:
        self.calls.append((x.numpy().copy(), level))
        return torch.from_numpy(mock(x.numpy(), level))


def mock(x: np.ndarray, level: fs.Level) -> np.ndarray:
    return np.tanh(level.sigma * x + level.alpha) - 0.3 * x


def fixed_noise(start: fs.Level, end: fs.Level) -> Tensor:
    rng = np.random.default_rng(abs(hash((start.t, end.t))) % 2**32)
    return torch.from_numpy(rng.standard_normal((2, 3)))


def interpret(plan: Plan, x: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, fs.Level]]]:
    """What the instructions mean, word for word."""
    values = {0: x}
    calls = []
    for i in plan.instructions:
        if isinstance(i, Combine):
            values[i.out] = np.sum([c * values[r] for r, c in i.terms], axis=0)
        elif isinstance(i, Denoise):
            calls.append((values[i.point], i.level))
            values[i.out] = mock(values[i.point], i.level)
        else:
            values[i.out] = fixed_noise(i.start, i.end).numpy()
    return values[plan.result], calls


@given(st.integers(0, 2**32))
@settings(max_examples=100)
def test_a_made_up_plan_is_followed_word_for_word(seed: int) -> None:
    plan = random_plan(seed)
    x = np.random.default_rng(seed).standard_normal((2, 3))
    recorder = Recorder()
    result = plan.run(recorder, torch.from_numpy(x.copy()), fixed_noise)
    expected, calls = interpret(plan, x)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert [level for _, level in recorder.calls] == [level for _, level in calls]
    for (got, _), (wanted, _) in zip(recorder.calls, calls, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**32), st.sampled_from(KINDS))
@settings(max_examples=100)
def test_folding_a_made_up_plan_changes_nothing(seed: int, kind: str) -> None:
    plan = random_plan(seed)
    denoiser = fs.Denoiser(lambda x, t: torch.tanh(x + 0.001 * t[:, None]), plan.process, kind)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 3)))
    folded = plan.run(denoiser, x, fixed_noise)
    plain = plan.run(lambda x, level: denoiser(x, level), x, fixed_noise)
    torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-10)


# ---- lowering --------------------------------------------------------------------------------


def network(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * torch.sin(x) + 0.1 * torch.cos(t / 200).view(-1, 1)


def grid_of(process: fs.Process, steps: int, clean: bool = True) -> fs.Grid:
    top, bottom = 20.0 ** (1 / 3), 0.02 ** (1 / 3)
    ratios = (np.linspace(top, bottom, steps + (not clean)) ** 3).tolist()
    return fs.Grid.from_ratios(process, ratios + [0.0] * clean)


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "noisy"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_folding_changes_no_sampler(
    sampler: str, kind: str, process: fs.Process, clean: bool
) -> None:
    grid = grid_of(process, 7, clean)
    plan = fs.plan(sampler, grid)
    denoiser = fs.Denoiser(network, process, kind)
    noise = fs.Noise([3, 4], (5,), dtype=torch.float64)
    x = grid.levels[0].sigma * noise.initial()
    folded = plan.run(denoiser, x, noise)
    plain = plan.run(lambda x, level: denoiser(x, level), x, noise)
    torch.testing.assert_close(folded, plain, rtol=1e-10, atol=1e-10)


class OperationCount(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(plan: Plan, denoiser: Any) -> int:
    x = torch.ones(2, 5, dtype=torch.float64)
    plan.lowered(getattr(denoiser, "parameterisation", None))
    with OperationCount() as counter:
        plan.run(denoiser, x, lambda start, end: x)
    return counter.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_folding_saves_tensor_operations(sampler: str, kind: str) -> None:
    process = fs.process.vp_linear()
    plan = fs.plan(sampler, grid_of(process, 10))
    output = torch.ones(2, 5, dtype=torch.float64)
    denoiser = fs.Denoiser(lambda x, t: output, process, kind)
    plain = operations(plan, lambda x, level: denoiser(x, level))
    # even if the estimate were written out with two operations in place of the denoiser's three
    assert operations(plan, denoiser) <= plain - plan.calls


@pytest.mark.parametrize("form", [None, *KINDS])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_memory_does_not_grow_with_the_number_of_steps(sampler: str, form: str | None) -> None:
    process = fs.process.vp_linear()
    counts = set()
    for steps in (10, 200):
        plan = fs.plan(sampler, grid_of(process, steps))
        parameterisation = fs.denoisers.Parameterisation(form) if form else None
        counts.add(plan.lowered(parameterisation).slots)
    assert len(counts) == 1
    assert counts.pop() <= 8


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_tensors_are_freed_when_they_are_last_used(sampler: str) -> None:
    process = fs.process.vp_linear()
    most = []
    for steps in (20, 200):  # the guard keeps the outputs of its last eight calls
        made: list[weakref.ref[Tensor]] = []
        alive = []

        def denoiser(x: Tensor, level: fs.Level, made: Any = made, alive: Any = alive) -> Tensor:
            made.append(weakref.ref(x))
            out = 0.5 * x
            made.append(weakref.ref(out))
            alive.append(sum(ref() is not None for ref in made))
            return out

        x = torch.ones(1, 2)
        fs.plan(sampler, grid_of(process, steps)).run(denoiser, x, lambda a, b: torch.ones(1, 2))
        most.append(max(alive))
    assert most[0] == most[1]


@given(st.integers(0, 2**32))
@settings(max_examples=50)
def test_no_slot_is_written_while_its_tensor_is_still_needed(seed: int) -> None:
    plan = random_plan(seed)
    program = lower(plan.instructions, plan.result, None)
    held: dict[int, int | None] = {0: 0}
    for operation in program.operations:
        assert not isinstance(operation.what, Evaluate)
        slots = [operation.first, *(slot for slot, _ in operation.rest)]
        if not isinstance(operation.what, Draw):
            assert {held[slot] for slot in slots} == set(reads(operation.what))
        held[operation.out] = operation.what.out
    assert held[program.result] == plan.result
    assert max(held) < program.slots


# ---- tensors: types, and nothing changed in place --------------------------------------------


def simple_plan(sampler: str = "dpmpp_2m", steps: int = 6) -> Plan:
    return fs.plan(sampler, grid_of(fs.process.vp_linear(), steps))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given_type", "kept_type"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize(
    "output_type", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_state_is_float32_or_better_whatever_the_network_gives(
    given_type: torch.dtype, kept_type: torch.dtype, output_type: torch.dtype, wrapped: bool
) -> None:
    plan = simple_plan("euler_ancestral")
    seen = set()

    def give(x: Tensor, *_: Any) -> Tensor:
        seen.add(x.dtype)
        return torch.full_like(x, 0.3).to(output_type)

    def noise(start: fs.Level, end: fs.Level) -> Tensor:
        return torch.full((2, 3), 0.7, dtype=torch.float16)

    steps: list[Progress] = []
    denoiser: Any = fs.Denoiser(give, plan.process, "data") if wrapped else give
    result = plan.run(denoiser, ONES.to(given_type), noise, steps.append)
    assert result.dtype == kept_type
    assert seen == {kept_type}
    assert {s.x.dtype for s in steps} | {s.denoised.dtype for s in steps} == {kept_type}


def test_a_bfloat16_network_does_not_round_the_state() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == self.weight.dtype
            return self.weight * x

    process = fs.process.vp_linear()
    plan, x = simple_plan(), torch.linspace(-1, 1, 6).view(2, 3)
    exact = plan.run(fs.Denoiser(Net(), process, "noise"), x)
    half = plan.run(fs.Denoiser(Net().bfloat16(), process, "noise"), x)
    assert half.dtype == torch.float32
    assert not half.equal(half.bfloat16().float())
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficients_carry_float64_precision(dtype: torch.dtype) -> None:
    plan = simple_plan("unipc", 20)
    denoiser = fs.exact.GaussianMixture(
        torch.tensor([[0.4]], dtype=torch.float64), 0.5, process=plan.process
    )
    x = torch.full((1, 1), 1.3, dtype=torch.float64)
    exact = interpret_with(plan, denoiser, x)
    error = abs(float(plan.run(denoiser, x.to(dtype)).double() - exact))
    assert error < (3e-6 if dtype == torch.float32 else 1e-14)


def interpret_with(plan: Plan, denoiser: fs.Denoiser, x: Tensor) -> Tensor:
    values = {0: x}
    for i in plan.instructions:
        if isinstance(i, Combine):
            values[i.out] = torch.stack([c * values[r] for r, c in i.terms]).sum(0)
        elif isinstance(i, Denoise):
            values[i.out] = denoiser(values[i.point], i.level)
    return values[plan.result]


@pytest.mark.parametrize("x", [torch.ones(2, dtype=torch.int64), None, [1.0], np.ones(2)])
def test_x_must_be_a_floating_point_tensor(x: Any) -> None:
    with pytest.raises(InvalidInputError, match="x must be a floating-point tensor"):
        simple_plan().run(lambda x, level: x, x)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_nothing_of_the_user_is_changed_in_place(sampler: str, kind: str | None) -> None:
    """x, the network's output (here one and the same tensor each time), the noise, and what callbacks keep."""
    plan = fs.plan(sampler, grid_of(fs.process.vp_linear(), 6, clean=False))
    x, cached, z = (torch.full((2, 3), v) for v in (1.0, 0.25, 0.5))
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(step: Progress) -> None:
        kept.extend((v, v.clone()) for v in (step.x, step.denoised))

    seen: list[tuple[Tensor, Tensor]] = []

    def give(point: Tensor, *_: Any) -> Tensor:
        seen.append((point, point.clone()))
        return cached

    denoiser: Any = give if kind is None else fs.Denoiser(give, plan.process, kind)
    result = plan.run(denoiser, x, lambda a, b: z, keep)
    assert x.equal(torch.full((2, 3), 1.0))
    assert cached.equal(torch.full((2, 3), 0.25))
    assert z.equal(torch.full((2, 3), 0.5))
    assert all(value.equal(then) for value, then in kept + seen)
    assert len({value.data_ptr() for value, _ in seen} | {result.data_ptr()}) == len(seen) + 1


def test_running_makes_no_graph_for_gradients() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    result = simple_plan().run(lambda x, level: 0.1 * weight * x, x)
    assert not result.requires_grad


# ---- progress --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_on_step_gets_every_call_with_its_level_and_preview(
    sampler: str, kind: str | None
) -> None:
    process = fs.process.flow()
    plan = fs.plan(sampler, grid_of(process, 9))
    calls: list[tuple[Tensor, fs.Level]] = []
    inner = fs.Denoiser(network, process, kind or "noise")

    class Recording(fs.Denoiser):
        def outputs(self, x: Tensor, levels: Sequence[fs.Level]) -> Callable[[Tensor], Tensor]:
            output, coming = super().outputs(x, levels), iter(levels)

            def recorded(point: Tensor) -> Tensor:
                calls.append((point, next(coming)))
                return output(point)

            return recorded

    recording = Recording(network, process, kind or "noise")
    denoiser: Any = (lambda x, level: recording(x, level)) if kind is None else recording
    steps: list[Progress] = []
    noise = fs.Noise([0, 1], (4,), dtype=torch.float64)
    plan.run(denoiser, plan.levels[0].sigma * noise.initial(), noise, steps.append)
    assert [s.call for s in steps] == list(range(1, plan.calls + 1))
    assert {s.calls for s in steps} == {plan.calls}
    planned = [i.level for i in plan.instructions if isinstance(i, Denoise)]
    assert [s.level for s in steps] == planned == [level for _, level in calls]
    for step, (x, level) in zip(steps, calls, strict=True):
        assert step.x.equal(x)
        torch.testing.assert_close(step.denoised, inner(x, level), rtol=1e-10, atol=1e-10)


def test_an_error_in_a_callback_reaches_the_caller() -> None:
    class Stopped(Exception):
        pass

    def stop(step: Progress) -> None:
        if step.call == 3:
            raise Stopped

    with pytest.raises(Stopped):
        simple_plan().run(lambda x, level: x, ONES, on_step=stop)


# ---- noise -----------------------------------------------------------------------------------


def test_noise_that_is_needed_and_missing_is_asked_for() -> None:
    with pytest.raises(InvalidInputError, match=r"draws noise 5 times; give noise=fewstep.Noise"):
        simple_plan("ddpm").run(lambda x, level: x, ONES)


def test_a_deterministic_plan_asks_for_no_noise() -> None:
    def never(start: fs.Level, end: fs.Level) -> Tensor:
        raise AssertionError

    simple_plan("ddim").run(lambda x, level: x, ONES, never)


def test_noise_is_asked_for_each_step_of_the_grid() -> None:
    plan = simple_plan("ddpm")
    asked = []

    def noise(start: fs.Level, end: fs.Level) -> Tensor:
        asked.append((start, end))
        return torch.zeros(2, 3)

    plan.run(lambda x, level: x, ONES, noise)
    steps = list(zip(plan.levels, plan.levels[1:], strict=False))
    assert asked == steps[:-1]


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 4), torch.zeros(3), torch.zeros(1, 3), torch.zeros(()), None, 0.0]
)
def test_noise_of_another_shape_is_refused(z: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"noise source gave .* state's shape \(2, 3\)"):
        simple_plan("ddpm").run(lambda x, level: x, ONES, lambda a, b: z)


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (), (2, 3, 1)])
def test_estimates_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidInputError, match=r"denoiser gave the shape .* point of shape \(2, 3\)"
    ):
        simple_plan().run(lambda x, level: torch.zeros(shape), ONES)


# ---- values that are not finite --------------------------------------------------------------


def breaks_at(call: int, bad: float) -> Callable[..., Tensor]:
    """A network that breaks once, at a call of its whole life, and never again."""
    count = iter(range(1, 10**6))

    def give(x: Tensor, *_: Any) -> Tensor:
        out = 0.5 * x
        if next(count) == call:
            out[0, -1] = bad
        return out

    return give


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, 3, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("kind", [None, "noise", "edm"])
def test_the_call_and_level_of_a_bad_output_are_named(
    call: int, bad: float, kind: str | None
) -> None:
    plan = simple_plan("heun", 10)
    assert plan.calls == 19
    level = [i.level for i in plan.instructions if isinstance(i, Denoise)][call - 1]
    give = breaks_at(call, bad)
    denoiser: Any = give if kind is None else fs.Denoiser(give, plan.process, kind)
    with pytest.raises(NonFiniteError) as caught:
        plan.run(denoiser, ONES)
    message = str(caught.value)
    assert f"the network's output at call {call} of 19, level {level}," in message
    assert "float32 or bfloat16" in message
    assert "check_denoiser" in message


def test_the_first_of_several_bad_outputs_is_named() -> None:
    plan = simple_plan("dpmpp_2m", 20)
    third = plan.levels[2].ratio
    with pytest.raises(NonFiniteError, match="at call 3 of 20"):
        plan.run(lambda x, level: x / (level.ratio > third), ONES)


def test_a_bad_start_is_named() -> None:
    x = ONES.clone()
    x[1, 1] = math.nan
    with pytest.raises(NonFiniteError, match="the starting point x holds a NaN or infinity"):
        simple_plan().run(lambda x, level: x, x)


def test_bad_noise_is_named() -> None:
    plan = simple_plan("ddpm")

    def noise(start: fs.Level, end: fs.Level) -> Tensor:
        return torch.full((2, 3), math.nan if start == plan.levels[2] else 0.0)

    with pytest.raises(NonFiniteError, match="the noise drawn after call 3, .*noise source"):
        plan.run(lambda x, level: 0.1 * x, ONES, noise)


def test_a_half_precision_start_too_large_for_it_is_named() -> None:
    with pytest.raises(NonFiniteError, match="starting point"):
        simple_plan().run(lambda x, level: x, (1e6 * ONES).half())


# ---- threads ---------------------------------------------------------------------------------


def test_threads_that_share_a_plan_and_a_model_get_what_each_gets_alone() -> None:
    process = fs.process.vp_linear()
    model = fs.Denoiser(network, process, "noise")
    jobs = [
        (fs.plan(sampler, grid_of(process, steps)), seed)
        for sampler in ("ddpm", "unipc", "heun")
        for steps in (3, 10, 25)
        for seed in (0, 1)
    ]
    shared = fs.Noise([5, 6], (4,))

    def run(job: tuple[Plan, int], noise: fs.Noise | None = None) -> Tensor:
        plan, seed = job
        noise = noise or fs.Noise([seed, seed + 1], (4,))
        return plan.run(model, plan.levels[0].sigma * noise.initial(), noise)

    def both(job: tuple[Plan, int]) -> tuple[Tensor, Tensor]:
        return run(job), run(job, shared)

    fresh = [(run(job), run(job, fs.Noise([5, 6], (4,)))) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, alone in zip(pool.map(both, jobs), fresh, strict=True):
                assert got[0].equal(alone[0])
                assert got[1].equal(alone[1])


def test_a_plan_gives_the_same_twice() -> None:
    plan = simple_plan("unipc", 12)
    assert plan.run(lambda x, level: x.sin(), ONES).equal(plan.run(lambda x, level: x.sin(), ONES))
