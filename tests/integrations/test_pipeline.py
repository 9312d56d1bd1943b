"""Our models as pipelines of diffusers: diffusers loads them and makes the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fewstep as fs
from command_line import run
from fewstep.errors import InvalidInputError
from fewstep.integrations import export_pipeline, import_checkpoint
from fewstep.models import Model, ModelConfig
from fewstep.networks import DiTConfig, UNetConfig
from tiny_model import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BASE: dict[str, Any] = {"channels": (16, 32), "blocks": 1, "attention": (1,), "groups": 8}
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "original": {"pad_after": True, "frequency_shift": 1, "norm_epsilon": 1e-6},
    "scale-shift": {"condition": "scale-shift", "head_width": 8},
    "residual": {"resample": "residual", "dropout": 0.1},
    "heads": {"heads": 4},
    "no attention": {"attention": (), "middle_attention": False},
    "grey": {"in_channels": 1, "blocks": 2, "attention": (0, 1)},
    "blocks of each": {"blocks": (2, 2)},
    "augmented": {"augment_width": 9},
}


def ours(process: fs.Process | None = None, predicts: str = "noise", **options: Any) -> Model:
    """A model with random weights whose predictions are near those of data of small variance."""
    network = UNetConfig(**{**BASE, **options})
    config = ModelConfig(
        network=network,
        process=(process or fs.process.vp_linear()).to_dict(),
        shape=(network.in_channels, 8, 8),
        predicts=predicts,
        class_names=("ant", "bee", "cat")[: network.num_classes],
        name="mine",
    )
    with torch.random.fork_rng():
        net = config.build_network()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            spread = 0.2 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
        net.conv_out.weight.mul_(0.3)
    return Model(net, config)


def theirs(folder: Path) -> Any:
    pipeline = pytest.importorskip("diffusers").DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(model: Model) -> Tensor:
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(5))


def weights(model: Model) -> dict[str, Tensor]:
    assert isinstance(model.network, nn.Module)
    return model.network.state_dict()


def assert_returns(model: Model, folder: Path) -> None:
    """What is imported again is the model, bit for bit."""
    back = import_checkpoint(folder)
    for name, weight in weights(back).items():
        assert torch.equal(weight, weights(model)[name]), name
    x, t = noise(model), torch.tensor([0, 999])
    assert torch.equal(back.network(x, t), model.network(x, t))
    assert (back.name, back.class_names) == (model.name, model.class_names)
    assert back.config.process == model.config.process
    assert (back.config.predicts, back.shape) == (model.config.predicts, model.shape)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_outputs_are_equal_and_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = ours(**options)
    export_pipeline(model, tmp_path / "out")
    unet, x, t = theirs(tmp_path / "out").unet, noise(model), torch.tensor([0, 999])
    with torch.no_grad():
        expected = unet(x, t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(model.network(x, t), expected, rtol=1e-5, atol=1e-5)
    assert_returns(model, tmp_path / "out")


@pytest.mark.parametrize("predicts", ["noise", "velocity", "data"])
def test_the_pipeline_makes_the_pictures_of_ddim(predicts: str, tmp_path: Path) -> None:
    model = ours(fs.process.vp_linear(beta_end=0.002), predicts)
    export_pipeline(model, tmp_path / "out")
    pipeline = theirs(tmp_path / "out")
    generator = torch.Generator().manual_seed(5)  # draws what `noise` draws
    made = pipeline(
        batch_size=2, generator=generator, num_inference_steps=10, output_type="np"
    ).images
    plan = fs.plan("ddim", fs.schedulers.trailing(model.process, steps=10))
    ends = (plan.run(model, noise(model)) / 2 + 0.5).clamp(0, 1)
    inside = ((ends > 0) & (ends < 1)).double().mean()
    assert inside > 0.3  # pictures that are black or white would be equal for nothing
    torch.testing.assert_close(
        torch.from_numpy(made).movedim(-1, 1), ends.float(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "process",
    [
        fs.process.vp_linear(500, 1e-4, 0.03),
        fs.process.vp_scaled_linear(),
        fs.process.vp_cosine(),
        fs.process.vp_linear(zero_terminal_snr=True),
        fs.process.vp_from_betas([0.02 * (1 + k) for k in range(20)]),
    ],
    ids=lambda process: process.name,
)
def test_classes_and_processes(process: fs.Process, tmp_path: Path) -> None:
    """The scheduler and the network of the folder, labels given, make the pictures of `fs.sample`'s ddim."""
    model = ours(process, "velocity", num_classes=3)
    notes = export_pipeline(model, tmp_path / "out")
    assert "class 3 is the null class" in notes[0]
    pipeline = theirs(tmp_path / "out")
    labels = torch.tensor([2, 3])
    x = noise(model)
    pipeline.scheduler.set_timesteps(10)
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(x, t, class_labels=labels).sample
        x = pipeline.scheduler.step(output, t, x).prev_sample
    plan = fs.plan("ddim", fs.schedulers.trailing(process, steps=10))
    made = plan.run(model.with_conditions(labels=labels), noise(model))
    torch.testing.assert_close(x, made.float(), rtol=1e-4, atol=1e-4)
    assert_returns(model, tmp_path / "out")


def test_other_processes_go_as_tables(tmp_path: Path) -> None:
    model = ours(fs.process.vp_sigmoid())
    export_pipeline(model, tmp_path / "out")
    back = import_checkpoint(tmp_path / "out").process
    assert back.name == "vp_from_betas"
    for t in (0.0, 10.0, 500.0, 999.0):
        assert back.alpha(t) == pytest.approx(model.process.alpha(t), rel=1e-9)


def test_what_is_noted_survives_diffusers(tmp_path: Path) -> None:
    model = ours(num_classes=3)
    export_pipeline(model, tmp_path / "out")
    theirs(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert_returns(model, tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_scale": 0.5}, "residual_scale = 0.5"),
        ({"skip_scale": 0.5}, "skip_scale = 0.5"),
        ({"context_width": 4}, "context_width = 4"),
        ({"group_width": 4}, "group_width = 4"),
        ({"time_scale": 1000}, "time_scale = 1000"),
        ({"out_channels": 6}, "out_channels = 6"),
        ({"resample": "plain"}, "resample = 'plain'"),
        ({"blocks": (1, 2)}, r"blocks = \(1, 2\)"),
        ({"heads": 4, "attention": (0,)}, "heads = 4"),
        ({"process": fs.process.flow()}, "the process flow"),
        ({"predicts": "score"}, "predicts = 'score'"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=f"{message} .*has no counterpart"):
        export_pipeline(ours(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_networks_and_other_groups_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(
        network=DiTConfig(width=16, depth=1, heads=1),
        process=fs.process.vp_linear().to_dict(),
        shape=(3, 8, 8),
    )
    with torch.random.fork_rng():
        model = Model(config.build_network(), config)
    with pytest.raises(InvalidInputError, match="only a U-Net can be exported"):
        export_pipeline(model, tmp_path / "out")
    with pytest.raises(InvalidInputError, match="group_width = 16 .*norm_num_groups"):
        export_pipeline(fs.load("digits"), tmp_path / "out")


@pytest.mark.global_rng
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    model.save(tmp_path / "model")
    words = ("export", str(tmp_path / "model"), "--to", "diffusers-pipeline")
    out = tmp_path / "pipe"
    assert run(monkeypatch, *words) == 2
    assert "give it with --out" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "DDIMPipeline.from_pretrained" in captured.out and "null class" in captured.err
    assert (load_file(out / "unet" / "diffusion_pytorch_model.safetensors")).keys()
    assert_returns(model, out)
    assert run(monkeypatch, *words, "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, "export", "plan.json", "--to", "comfyui", "--out", "x") == 2
    assert "leave out --out" in capsys.readouterr().err


def test_an_export_never_replaces_what_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(InvalidInputError, match="is not a pipeline of diffusers"):
        export_pipeline(ours(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["photo.png"]
