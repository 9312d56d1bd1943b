from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fewstep import process as processes
from fewstep.checkpoints import load_tensors, save_tensors
from fewstep.errors import CheckpointError, InvalidInputError, UnknownNameError
from fewstep.models import Model, ModelConfig, bundled_models, load
from fewstep.networks import UNetConfig

CONFIG = ModelConfig(
    network=UNetConfig(
        in_channels=1, channels=(8, 8), blocks=1, group_width=4, head_width=8, num_classes=3
    ),
    process=processes.vp_linear().to_dict(),
    shape=(1, 8, 8),
    class_names=("a", "b", "c"),
    name="tiny",
    recommended={"sampler": "ddim"},
    training={"step": 3},
)

pytestmark = pytest.mark.global_rng


@pytest.fixture
def model() -> Model:
    network = CONFIG.build_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return Model(network, CONFIG)


def prediction(model: Model) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    conditioned = model.with_conditions(labels=torch.tensor([0, 2]))
    return conditioned(x, model.process.level(300.0))


def test_a_model_is_a_denoiser_with_a_shape_and_classes(model):
    assert (model.shape, model.num_classes, model.class_names) == ((1, 8, 8), 3, ("a", "b", "c"))
    assert (model.name, model.predicts, model.process) == ("tiny", "noise", processes.vp_linear())
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    assert "tiny" in repr(model)


def test_conditions_leave_the_model_as_it_is(model):
    conditioned = model.with_conditions(labels=torch.tensor([1]))
    assert isinstance(conditioned, Model)
    assert conditioned.shape == model.shape
    assert model.conditions == {}


def test_round_trip_is_exact(model, tmp_path):
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(prediction(again), prediction(model))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_half_precision_weights_load_as_float32(model, tmp_path):
    model.save(tmp_path / "m", dtype=torch.float16)
    stored = load_tensors(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = load(tmp_path / "m")
    for name, weight in again.network.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.network.state_dict()[name].half().float())
    torch.testing.assert_close(prediction(again), prediction(model), rtol=0.02, atol=0.02)


def test_other_types_are_refused(model, tmp_path):
    with pytest.raises(InvalidInputError, match="float16"):
        model.save(tmp_path / "m", dtype=torch.bfloat16)


def test_weights_are_channels_last(model, tmp_path):
    model.save(tmp_path / "m")
    weight = load(tmp_path / "m").network.get_parameter("down.0.residual.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_the_configuration_is_readable(model, tmp_path):
    model.save(tmp_path / "m")
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert content["format"] == "fewstep-model"
    assert content["process"]["name"] == "vp_linear"
    assert content["network"]["class"] == "unet"
    assert ModelConfig.from_dict(content) == CONFIG


def test_raw_weights_need_a_checkpoint(model, tmp_path):
    model.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="weights='ema'"):
        load(tmp_path / "m", weights="raw")
    raw = {name: 2 * w for name, w in model.network.state_dict().items()}
    save_tensors(tmp_path / "m" / "raw.safetensors", raw)
    weight = load(tmp_path / "m", weights="raw").network.state_dict()["conv_out.bias"]
    assert torch.equal(weight, raw["conv_out.bias"])
    with pytest.raises(UnknownNameError, match="ema, raw"):
        load(tmp_path / "m", weights="emma")


def test_a_run_gives_its_newest_checkpoint(model, tmp_path):
    run = tmp_path / "run"
    for step in (5, 12, 9):
        config = dataclasses.replace(CONFIG, training={"step": step})
        Model(model.network, config).save(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / ".tmp-1f-step-00000013").mkdir()
    assert load(run).config.training["step"] == 12


def test_a_run_without_checkpoint_says_so(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        load(tmp_path / "run")


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown model 'digts'"):
        load("digts")
    with pytest.raises(CheckpointError, match="not a model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda w: w.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias has shape \(9,\)"),
    ],
)
def test_weights_that_do_not_fit(model, tmp_path, change, words):
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_tensors(path)
    change(weights)
    save_tensors(path, weights)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors.*{words}.*copy"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format="other"),
        lambda c: c.update(version=2),
        lambda c: c.pop("process"),
        lambda c: c.update(process={"name": "vp_liner"}),
        lambda c: c.update(shape=[1, 8]),
        lambda c: c.update(shape="wide"),
        lambda c: c["network"].update({"class": "resnet"}),
        lambda c: c["network"].update(chanels=3),
        lambda c: c["network"].pop("class"),
    ],
)
def test_a_wrong_configuration_names_the_file(model, tmp_path, change):
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path / "m")


def test_a_truncated_model_names_the_file(model, tmp_path):
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path / "m")


def test_bundled_models_can_be_loaded():
    for name, folder in bundled_models().items():
        assert load(name).config == load(folder).config


def test_saving_never_replaces_what_is_no_model(model, tmp_path):
    for held in ("photos/a.png", "run/checkpoints/step-00000001/config.json"):
        (tmp_path / held).parent.mkdir(parents=True)
        (tmp_path / held).write_text("mine")
        with pytest.raises(InvalidInputError, match="would be lost"):
            model.save(tmp_path / held.partition("/")[0])
        assert (tmp_path / held).read_text() == "mine"
    for _ in range(2):  # a model is replaced by a model
        model.save(tmp_path / "model")
