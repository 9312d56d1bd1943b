"""What a network is called with, and what is made of its answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep.denoisers import BaseDenoiser, Wrapper
from fewstep.process import Level

VP = fs.process.vp_linear()
LEVEL = VP.level(321.5)


class Recorder:
    """A network that keeps what it was called with."""

    def __init__(self, answer=None):
        self.calls, self.answer = [], answer

    def __call__(self, x, t, **conditions):
        self.calls.append((x, t, conditions))
        return torch.zeros_like(x) if self.answer is None else self.answer


class Affine(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25], dtype=dtype))
        self.seen = []

    def forward(self, x, t, labels=None):
        self.seen.append((x.dtype, t.dtype))
        return x * self.weight + t[:, None].to(x.dtype) / 1000


def test_time_has_one_entry_per_image_and_conditions_are_passed():
    network = Recorder()
    labels = torch.arange(5)
    fs.Denoiser(network, VP, conditions={"labels": labels, "size": 7})(torch.ones(5, 2), LEVEL)
    x, t, conditions = network.calls[0]
    assert t.shape == (5,) and t.dtype == torch.float32 and bool((t == 321.5).all())
    assert x.shape == (5, 2)
    assert conditions["labels"] is labels and conditions["size"] == 7


def test_a_float64_state_has_a_float64_time():
    network = Recorder()
    t = VP.time(ratio=0.1)
    result = fs.Denoiser(network, VP)(torch.ones(1, 2, dtype=torch.float64), VP.level(t))
    assert network.calls[0][1].dtype == torch.float64 and network.calls[0][1].item() == t
    assert result.dtype == torch.float64


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
def test_a_module_computes_in_its_own_type_and_never_sees_a_coarse_time(own, state):
    network = Affine(own)
    x = torch.linspace(-1, 1, 6, dtype=state).view(3, 2)
    output = fs.Denoiser(network, VP, "data").output(x, LEVEL)
    time = torch.float64 if own == torch.float64 else torch.float32
    assert network.seen == [(own, time)]
    assert output.dtype == state
    expected = x * torch.tensor([0.5, -0.25], dtype=state) + 0.3215
    error = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-7}[own]
    torch.testing.assert_close(output, expected, rtol=0, atol=error)


def test_a_module_may_be_converted_after_it_was_wrapped():
    network = Affine(torch.float32)
    denoiser = fs.Denoiser(network, VP)
    denoiser(torch.ones(1, 2), LEVEL)
    network.to(torch.bfloat16)
    denoiser(torch.ones(1, 2), LEVEL)
    assert [x for x, _ in network.seen] == [torch.float32, torch.bfloat16]


def test_the_state_stays_float32_around_a_bfloat16_network():
    network = Affine(torch.bfloat16)
    denoiser = fs.Denoiser(network, fs.process.flow(), "flow")
    level = fs.process.flow().level(0.25)
    x = torch.tensor([[1 / 3, 2 / 3]])
    expected = x - 0.25 * network(x.bfloat16(), torch.full((1,), 0.25)).float()
    torch.testing.assert_close(denoiser(x, level), expected, rtol=1e-6, atol=0)


def test_device_is_that_of_the_weights():
    assert fs.Denoiser(Affine(torch.float32), VP).device == torch.device("cpu")
    assert fs.Denoiser(Affine(torch.float32).to("meta"), VP).device == torch.device("meta")
    assert fs.Denoiser(Recorder(), VP).device is None


def test_learned_variance_is_left_aside():
    output = torch.arange(2 * 6 * 4, dtype=torch.float32).view(2, 6, 2, 2)
    denoiser = fs.Denoiser(Recorder(output), VP)
    x = torch.ones(2, 3, 2, 2)
    assert torch.equal(denoiser.output(x, LEVEL), output[:, :3])
    expected = (x - LEVEL.sigma * output[:, :3]) / LEVEL.alpha
    torch.testing.assert_close(denoiser(x, LEVEL), expected)


@pytest.mark.parametrize("shape", [(2, 3, 2, 1), (2, 9, 2, 2), (2, 1, 2, 2), (1, 3, 2, 2), (2,)])
def test_another_shape_names_both(shape):
    denoiser = fs.Denoiser(Recorder(torch.zeros(shape)), VP)
    with pytest.raises(fs.errors.InvalidInputError) as error:
        denoiser(torch.ones(2, 3, 2, 2), LEVEL)
    assert str(shape) in str(error.value) and "(2, 3, 2, 2)" in str(error.value)


def test_points_without_channels_have_no_learned_variance():
    assert fs.Denoiser(Recorder(), VP)(torch.ones(4), LEVEL).shape == (4,)
    with pytest.raises(fs.errors.InvalidInputError, match=r"\(8,\).*\(4,\)"):
        fs.Denoiser(Recorder(torch.zeros(8)), VP)(torch.ones(4), LEVEL)


def test_an_output_that_is_no_tensor_has_a_remedy():
    denoiser = fs.Denoiser(lambda x, t: {"sample": x}, VP)
    with pytest.raises(fs.errors.InvalidInputError, match="gave a dict.*wrap it"):
        denoiser(torch.ones(1, 2), LEVEL)


def test_with_conditions_adds_without_altering_the_original():
    network = Recorder()
    plain = fs.Denoiser(network, VP, conditions={"a": 1})
    more = plain.with_conditions(b=2).with_conditions(a=3)
    assert plain.conditions == {"a": 1} and more.conditions == {"a": 3, "b": 2}
    plain(torch.ones(1, 2), LEVEL)
    more(torch.ones(1, 2), LEVEL)
    assert [c for _, _, c in network.calls] == [{"a": 1}, {"a": 3, "b": 2}]


def test_the_given_conditions_are_copied():
    given = {"a": 1}
    denoiser = fs.Denoiser(Recorder(), VP, conditions=given)
    given["a"] = 2
    assert denoiser.conditions == {"a": 1}


@pytest.mark.parametrize("network", [Affine(torch.float32), lambda x, t, labels=None: x])
def test_a_condition_that_the_network_does_not_know_is_refused_at_once(network):
    denoiser = fs.Denoiser(network, VP)
    assert denoiser.with_conditions(labels=torch.tensor([1])).conditions
    with pytest.raises(fs.errors.UnknownNameError, match="'label'.*'labels'"):
        denoiser.with_conditions(label=torch.tensor([1]))
    with pytest.raises(fs.errors.UnknownNameError, match="'label'.*'labels'"):
        fs.Denoiser(network, VP, conditions={"label": 1})


def test_process_network_and_prediction_are_checked():
    with pytest.raises(fs.errors.InvalidInputError, match="fewstep.process.vp_linear"):
        fs.Denoiser(Recorder(), "vp_linear")  # type: ignore[arg-type]
    with pytest.raises(fs.errors.InvalidInputError, match="callable"):
        fs.Denoiser("net.pt", VP)  # type: ignore[arg-type]
    with pytest.raises(fs.errors.UnknownNameError, match="Known: data"):
        fs.Denoiser(Recorder(), VP, "eps")


def test_pure_noise_is_refused_before_the_network_is_called():
    network = Recorder()
    with pytest.raises(fs.errors.InvalidInputError, match="alpha > 0"):
        fs.Denoiser(network, VP)(torch.ones(1, 2), Level(999.0, 0.0, 1.0))
    assert network.calls == []


def test_a_wrapper_that_changes_nothing_is_the_denoiser_inside():
    class Plain(Wrapper):
        def __call__(self, x, level):
            return self.inner(x, level)

    denoiser = fs.Denoiser(Affine(torch.float32), VP)
    wrapper = Plain(Plain(denoiser))
    assert isinstance(wrapper, BaseDenoiser)
    assert wrapper.parameterisation is None  # so that the executor calls the wrapper itself
    assert (wrapper.process, wrapper.device, wrapper.passes) == (VP, denoiser.device, 1)
    assert wrapper.name == "Plain(Plain(Denoiser))"
    assert wrapper.for_run() is wrapper and wrapper.with_conditions() is not None
    bound = wrapper.with_conditions(labels=torch.tensor([1]))
    assert "labels" in bound.conditions and "labels" not in wrapper.conditions
    with pytest.raises(fs.errors.InvalidInputError, match="wrap a network first"):
        Plain(Affine(torch.float32))  # type: ignore[arg-type]
