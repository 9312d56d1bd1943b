"""Checkpoints of other codes: as models of ours they give the outputs that they gave there."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewstep as fs
from command_line import run
from denoising_diffusion import denoising_diffusion
from fewstep.errors import CheckpointError, InvalidInputError
from fewstep.integrations import import_checkpoint, import_process
from fewstep.integrations.scheduler_config import SCHEDULERS
from fewstep.models import Model
from original_ddpm import evaluate, random_weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WHOLE_TIMES = torch.tensor([0, 999])
CIFAR: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}
"""The options of google/ddpm-cifar10-32 on a narrow network."""

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
RESIDUAL: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10": CIFAR,
    "defaults": SMALL,
    "heads of 8": {**SMALL, "attention_head_dim": 8},
    "scale_shift": {**SMALL, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "residual": {**SMALL, **RESIDUAL},
    "no middle attention": {**SMALL, "add_attention": False},
    "grey, learned variance": {**SMALL, "in_channels": 1, "out_channels": 2},
    "oblong": {**SMALL, "sample_size": (8, 16)},
}


def twin(**options: Any) -> Any:
    """A network of diffusers with random weights that all matter."""
    unet_2d = pytest.importorskip("diffusers.models.unets.unet_2d")
    with torch.random.fork_rng():
        net = unet_2d.UNet2DModel(**options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            spread = 0.3 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(0.0, spread, generator=generator)
    return net


def images(model: Model) -> Tensor:
    return torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(2))


def assert_same(model: Model, other: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = images(model)
    with torch.no_grad():
        got, expected = model.network(x, WHOLE_TIMES), other(x, WHOLE_TIMES)
    assert expected.std() > 0.1  # not something that anything would equal
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small network of diffusers, to be spoilt."""
    twin(**SMALL).save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def change(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


# ---- diffusers -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_networks_of_diffusers_keep_their_outputs(options: dict[str, Any], tmp_path: Path) -> None:
    net = twin(**options)
    net.save_pretrained(tmp_path / "net")
    model = import_checkpoint(tmp_path / "net")
    assert_same(model, lambda x, t: net(x, t).sample)
    size = options["sample_size"]
    assert model.shape[1:] == (size if isinstance(size, tuple) else (size, size))
    assert model.config.predicts == "noise" and model.process.name == "vp_linear"
    assert len(model.config.training["imported"]["assumed"]) == 2


def test_times_between_the_entries_are_the_same(tmp_path: Path) -> None:
    net = twin(**CIFAR)
    net.save_pretrained(tmp_path)
    model, t = import_checkpoint(tmp_path), torch.tensor([0.25, 731.5])
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model.network(x, t), net(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("null_class", ["mean", "last"])
def test_classes(null_class: Any, tmp_path: Path) -> None:
    net = twin(**SMALL, num_class_embeds=5)
    net.save_pretrained(tmp_path)
    model = import_checkpoint(tmp_path, null_class=null_class)
    assert model.num_classes == (5 if null_class == "mean" else 4)
    assert model.class_names == tuple("01234"[: model.num_classes])
    labels, x = torch.tensor([3, 4]), images(model)
    with torch.no_grad():
        theirs = net(x, WHOLE_TIMES, class_labels=labels).sample
        assert_close = torch.testing.assert_close
        if null_class == "last":
            assert_close(model.network(x, WHOLE_TIMES, labels), theirs, rtol=1e-5, atol=1e-5)
            assert_close(model.network(x, WHOLE_TIMES)[1], theirs[1], rtol=1e-5, atol=1e-5)
        else:
            assert_close(model.network(x, WHOLE_TIMES, labels), theirs, rtol=1e-5, atol=1e-5)
            net.class_embedding.weight[4] = net.class_embedding.weight.mean(0)
            theirs = net(x, WHOLE_TIMES, class_labels=torch.tensor([4, 4])).sample
            assert_close(model.network(x, WHOLE_TIMES), theirs, rtol=1e-5, atol=1e-5)
    assert fs.sample(model, labels=[0, 1], guidance=2.0, steps=2).images.isfinite().all()


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "v": {"prediction_type": "v_prediction"},
    "data": {"prediction_type": "sample"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "few": {"num_train_timesteps": 50, "beta_end": 0.2},
    "trained": {"trained_betas": [0.01 * (1 + k) for k in range(20)]},
}
PREDICTS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data"}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_a_pipeline_brings_its_process(options: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**options)
    net = twin(**CIFAR)
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(tmp_path / "pipeline")
    model = import_checkpoint(tmp_path / "pipeline")
    assert_same(model, lambda x, t: net(x, t).sample)
    assert model.config.predicts == PREDICTS[options.get("prediction_type", "epsilon")]
    assert_same_levels(model.process, scheduler)
    assert model.config.training["imported"]["kind"] == "a DDPMPipeline of diffusers"
    assert not model.config.training["imported"]["assumed"]
    read, predicts = import_process(tmp_path / "pipeline")
    assert (read.to_dict(), predicts) == (model.process.to_dict(), model.config.predicts)


def assert_same_levels(process: fs.Process, scheduler: Any) -> None:
    alphas = torch.tensor(
        [process.alpha(float(t)) for t in range(process.training_steps)], dtype=torch.float64
    )
    torch.testing.assert_close(
        alphas, scheduler.alphas_cumprod.double().sqrt(), rtol=2e-4, atol=2e-6
    )


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_fields_that_are_left_out_take_the_defaults_of_the_class(kind: str) -> None:
    schedulers = pytest.importorskip("diffusers").schedulers
    try:
        scheduler = getattr(schedulers, kind)()
    except ImportError as error:
        pytest.skip(str(error))
    process, predicts = fs.integrations.scheduler_config.process_from_scheduler(
        {"_class_name": kind}
    )
    assert_same_levels(process, scheduler)
    assert predicts == "noise"


def test_the_layout_and_the_names_of_the_first_pipelines(tmp_path: Path) -> None:
    """One flat folder, pickled weights, and attentions with query, key, value and proj_attn."""
    net = twin(**CIFAR)
    net.save_pretrained(tmp_path)
    new = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    old = {}
    for name, weight in new.items():
        for today, before in names.items():
            name = name.replace(today, before)
        old[name] = weight
    assert old.keys() != new.keys()
    torch.save(old, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    scheduler = {"_class_name": "DDPMScheduler", "beta_end": 0.01, "predict_epsilon": False}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    model = import_checkpoint(tmp_path, name="first")
    assert_same(model, lambda x, t: net(x, t).sample)
    assert model.name == "first" and model.config.predicts == "data"
    assert model.process.options["beta_end"] == 0.01


def test_heads_that_the_oldest_files_leave_out_are_told(folder: Path) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    assert len(import_checkpoint(folder).config.training["imported"]["assumed"]) == 2
    del fields["attention_head_dim"]
    path.write_text(json.dumps(fields))
    model = import_checkpoint(folder)
    assumed = model.config.training["imported"]["assumed"]
    assert len(assumed) == 3 and "attention heads of width 8" in assumed[0]
    net = pytest.importorskip("diffusers").UNet2DModel.from_pretrained(folder)
    assert_same(model, lambda x, t: net(x, t).sample)


def test_averaged_weights_of_a_training_are_preferred(tmp_path: Path) -> None:
    net, averaged = twin(**SMALL), twin(**SMALL)
    with torch.no_grad():
        averaged.conv_in.weight.mul_(0.5)
    net.save_pretrained(tmp_path / "unet")
    averaged.save_pretrained(tmp_path / "unet_ema")
    for weights, other, told in (("ema", averaged, "averaged"), ("raw", net, "raw")):
        model = import_checkpoint(tmp_path, weights=weights)
        assert_same(model, lambda x, t, other=other: other(x, t).sample)
        assert model.config.training["imported"]["weights"] == told


def test_half_precision_weights(tmp_path: Path) -> None:
    net = twin(**SMALL).half()
    net.save_pretrained(tmp_path)
    model = import_checkpoint(tmp_path)
    assert_same(model, lambda x, t: net.float()(x, t).sample)


REFUSED: list[dict[str, Any]] = [
    {"time_embedding_type": "fourier"},
    {"time_embedding_dim": 100},
    {"center_input_sample": True},
    {"act_fn": "gelu"},
    {"class_embed_type": "timestep"},
    {"mid_block_type": None},
    {"mid_block_scale_factor": 1.5},
    {"downsample_padding": 2},
    {"downsample_type": "none"},
    {"resnet_time_scale_shift": "spatial"},
    {"attn_norm_num_groups": 4},
    {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
    {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
    {"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"], "upsample_type": "resnet"},
    {"a_new_field": 3},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: next(iter(fields)))
def test_what_has_no_counterpart_is_refused_by_name(fields: dict[str, Any], folder: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        import_checkpoint(change(folder, **fields))
    name, value = next(iter(fields.items()))
    shown = value if not isinstance(value, list) or "Skip" not in value[0] else value[0]
    assert f"{name} = {shown!r} of this UNet2DModel has no counterpart" in str(caught.value)


def test_scale_shift_without_groups_in_attention_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="attn_norm_num_groups = None of this UNet2DModel"):
        import_checkpoint(change(folder, resnet_time_scale_shift="scale_shift"))


def test_mixed_resampling_is_refused(tmp_path: Path) -> None:
    options = {
        **CIFAR,
        "down_block_types": (
            "DownBlock2D",
            "ResnetDownsampleBlock2D",
            "DownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
    }
    twin(**options).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="one kind of resampling for all"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "unknown scheduler class 'FlowMatchE",
        ),
        ({}, "unknown scheduler class 'None'"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "laplace"},
            "beta_schedule = 'laplace'",
        ),
        (
            {"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"},
            "prediction_type",
        ),
        ({"_class_name": "DDPMScheduler", "beta_end": 2.0}, "betas must be"),
    ],
)
def test_unknown_processes(scheduler: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.raises(InvalidInputError, match=message):
        import_checkpoint(folder)
    process = {"name": "vp_cosine", "steps": 100}
    model = import_checkpoint(folder, process=process, predicts="velocity")
    assert model.process.name == "vp_cosine" and model.config.predicts == "velocity"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"block_out_channels": 16}),
        ("config.json", {"block_out_channels": []}),
        ("config.json", {"down_block_types": [1, 2]}),
        ("config.json", {"norm_num_groups": "8"}),
        ("config.json", {"sample_size": "large"}),
        ("config.json", {"num_class_embeds": [1]}),
        ("config.json", {"_fewstep": 3, "sample_size": None}),
        ("scheduler_config.json", {"_class_name": "DDPMScheduler", "beta_end": "x"}),
        ("scheduler_config.json", {"_class_name": "DDPMScheduler", "num_train_timesteps": 1.5}),
        ("scheduler_config.json", {"_class_name": "DDPMScheduler", "trained_betas": {"a": 1}}),
        ("scheduler_config.json", {"_class_name": ["DDPMScheduler"]}),
    ],
)
def test_nonsense_in_configurations(file: str, content: dict[str, Any], folder: Path) -> None:
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}))
    with pytest.raises(InvalidInputError):
        import_checkpoint(folder)


def test_weights_that_are_missing_unknown_or_misshapen_are_listed(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    some = {name: weight for name, weight in whole.items() if "mid_block" not in name}
    for weights, message in (
        (some, "weights of net are missing: mid_block.resnets.0.norm1.weight, .*, .*, \\.\\.\\."),
        ({**whole, "more": torch.ones(1)}, "1 weights of net are unknown: more;"),
        (
            {**whole, "conv_out.bias": torch.ones(4)},
            r"another shape .*: conv_out.bias \(4,\) instead of \(3,\)",
        ),
    ):
        save_file(weights, path)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(folder)


# ---- the networks of DDPM and DDIM -----------------------------------------------------------

ORIGINAL = random_weights((32, 64, 64), 2, (1,))


def as_noise(weights: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: evaluate(weights, x, t)


@pytest.mark.parametrize("convolve", [True, False])
@pytest.mark.parametrize("attends", [(1,), (), (0, 2)])
def test_original_networks_keep_their_outputs(
    attends: tuple[int, ...], convolve: bool, tmp_path: Path
) -> None:
    weights = random_weights((32, 64, 32), 1, attends, convolve)
    torch.save(weights, tmp_path / "model-790000.ckpt")
    model = import_checkpoint(tmp_path / "model-790000.ckpt", size=16)
    assert model.config.network.to_dict()["attention"] == list(attends)
    assert not any("images" in line for line in model.config.training["imported"]["assumed"])
    assert_same(model, as_noise(weights))


def test_the_size_follows_from_where_it_attends(tmp_path: Path) -> None:
    torch.save(ORIGINAL, tmp_path / "model.ckpt")
    model = import_checkpoint(tmp_path / "model.ckpt")
    assert model.shape == (3, 32, 32) and model.name == "model"
    assert model.config.predicts == "noise"
    assert model.config.process == fs.process.vp_linear().to_dict()
    assert_same(model, as_noise(ORIGINAL))
    save_file(random_weights((32, 32), 1, ()), tmp_path / "model.safetensors")
    with pytest.raises(
        InvalidInputError, match="does not tell how large its images are; give size"
    ):
        import_checkpoint(tmp_path / "model.safetensors")
    assert import_checkpoint(tmp_path / "model.safetensors", size=8).shape == (3, 8, 8)


def test_a_list_of_network_optimiser_epoch_step_and_averages(tmp_path: Path) -> None:
    averages = {name: 0.9 * weight for name, weight in ORIGINAL.items()}
    parallel = {f"module.{name}": weight for name, weight in ORIGINAL.items()}
    optimiser = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
    path = tmp_path / "ckpt.pth"
    torch.save([parallel, optimiser, 3, 1000, averages], path)
    for weights, expected, told in (("ema", averages, "averaged"), ("raw", ORIGINAL, "raw")):
        model = import_checkpoint(path, weights=weights, size=16)
        assert_same(model, as_noise(expected))
        assert model.config.training["imported"]["weights"] == told
    torch.save([{**parallel, "module.logvar": torch.zeros(1000)}, optimiser, 3, 1000], path)
    model = import_checkpoint(path, size=16)
    assert_same(model, as_noise(ORIGINAL))
    assert model.config.training["imported"]["weights"] == "raw"


def test_original_files_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({k: v for k, v in ORIGINAL.items() if "mid.attn_1.k" not in k}, path)
    with pytest.raises(CheckpointError, match=re.escape("are missing: mid.attn_1.k.weight, mid")):
        import_checkpoint(path)
    torch.save({k: v for k, v in ORIGINAL.items() if "conv_in" not in k}, path)
    with pytest.raises(CheckpointError, match="conv_in.weight is missing"):
        import_checkpoint(path)
    torch.save(ORIGINAL, path)
    with pytest.raises(InvalidInputError, match="one set of weights"):
        import_checkpoint(path, weights="raw")
    with pytest.raises(InvalidInputError, match="the network has no classes"):
        import_checkpoint(path, null_class="mean")


# ---- denoising-diffusion-pytorch -------------------------------------------------------------


@pytest.mark.global_rng
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(
    ("objective", "predicts"),
    [("pred_noise", "noise"), ("pred_x0", "data"), ("pred_v", "velocity")],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
def test_its_process_and_prediction_are_read(
    schedule: str, objective: str, predicts: str, cut: bool, tmp_path: Path
) -> None:
    peer = denoising_diffusion()
    net = peer.Unet(8, dim_mults=(1, 2), flash_attn=False)
    diffusion = peer.GaussianDiffusion(
        net,
        image_size=8,
        timesteps=200,
        objective=objective,
        beta_schedule=schedule,
        min_snr_loss_weight=cut,
    )
    path = tmp_path / "model-3.pt"
    torch.save({"step": 3, "model": diffusion.state_dict(), "version": "2.3.4"}, path)
    process, told = import_process(path)
    assert (process.name, process.training_steps, told) == (f"vp_{schedule}", 200, predicts)
    assert_same_levels(process, diffusion)
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 60)
    with torch.no_grad():
        estimate = fs.Denoiser(net.eval(), process, told)(x, process.level(60.0))
        expected = diffusion.model_predictions(x, t).pred_x_start
    torch.testing.assert_close(estimate, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidInputError) as caught:
        import_checkpoint(path)
    for part in ("RMS norms", "linear attention", f"vp_{schedule} with 200", predicts):
        assert part in str(caught.value)


@pytest.mark.global_rng
def test_betas_of_their_own_and_networks_alone(tmp_path: Path) -> None:
    peer = denoising_diffusion()
    net = peer.Unet(8, dim_mults=(1, 2), flash_attn=False)
    odd = {"start": -2}
    diffusion = peer.GaussianDiffusion(net, image_size=8, timesteps=100, schedule_fn_kwargs=odd)
    torch.save({"model": diffusion.state_dict()}, tmp_path / "odd.pt")
    process, _ = import_process(tmp_path / "odd.pt")
    assert process.name == "vp_from_betas"
    assert_same_levels(process, diffusion)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(InvalidInputError, match="holds a network without its process"):
        import_process(tmp_path / "net.pt")
    with pytest.raises(InvalidInputError, match="of denoising-diffusion-pytorch"):
        import_checkpoint(tmp_path / "net.pt")


# ---- bad files -------------------------------------------------------------------------------


def test_sources_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pt")
    torch.save(twin(**SMALL).state_dict(), tmp_path / "bare.pt")
    fs.load("digits").save(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"architectures": ["ViT"]}')
    for name, error, message in (
        ("nowhere", InvalidInputError, "there is no file or folder"),
        ("empty", InvalidInputError, "is no checkpoint that can be imported"),
        ("text.txt", CheckpointError, "is no file of weights"),
        ("other.pt", InvalidInputError, "entries such as a"),
        ("bare.pt", InvalidInputError, "without its configuration"),
        ("ours", InvalidInputError, "fewstep.load reads models of ours"),
        ("theirs", InvalidInputError, "is no checkpoint that can be imported"),
    ):
        with pytest.raises(error, match=message):
            import_checkpoint(tmp_path / name)


class Opens:
    """Something that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    for extra in (Opens(traces), argparse.Namespace(lr=1)):
        torch.save([ORIGINAL, extra], tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match="would run code .*safetensors.torch.save_file"):
            import_checkpoint(tmp_path / "bad.pth")
    assert not traces.exists()


@pytest.mark.parametrize(
    "content", [b"", b"hello, this is text", b"\x80\x02}q\x00.", b"PK\x03\x04"]
)
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises((CheckpointError, InvalidInputError), match="a.pt"):
        import_checkpoint(path)
    torch.save(ORIGINAL, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short, damaged"):
        import_checkpoint(path)


def test_folders_with_gaps(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights: neither"):
        import_checkpoint(folder)
    with pytest.raises(InvalidInputError, match="has no scheduler"):
        import_process(folder)
    change(folder, _class_name="UNet2DConditionModel")
    with pytest.raises(InvalidInputError, match="is of a 'UNet2DConditionModel'"):
        import_checkpoint(folder)
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    with pytest.raises(CheckpointError, match="has no network"):
        import_checkpoint(folder)


# ---- the command -----------------------------------------------------------------------------


def test_the_command_writes_a_model_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    net = twin(**CIFAR)
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDIMPipeline(net, scheduler).save_pretrained(tmp_path / "pipe")
    capsys.readouterr()
    out = tmp_path / "mine"
    assert run(monkeypatch, "import", str(tmp_path / "pipe"), "--out", str(out)) == 0
    told = capsys.readouterr().out
    for part in ("a DDIMPipeline of diffusers", "parameters", "vp_linear, 1000", "velocity"):
        assert part in told
    model = fs.load(out)
    assert model.name == "pipe" and model.shape == (3, 16, 16)
    assert_same(model, lambda x, t: net(x, t).sample)
    grid = str(tmp_path / "grid.png")
    assert run(monkeypatch, "sample", str(out), "--n", "1", "--steps", "2", "--out", grid) == 0
    assert run(monkeypatch, "info", str(out)) == 0
    before = (out / "config.json").read_bytes()
    assert run(monkeypatch, "import", str(tmp_path / "pipe"), "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before


def test_the_command_says_what_it_took_for_granted_and_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(ORIGINAL, tmp_path / "cifar.ckpt")
    words = (
        "import",
        str(tmp_path / "cifar.ckpt"),
        "--out",
        str(tmp_path / "m"),
        "--name",
        "ddpm",
    )
    assert run(monkeypatch, *words, "--process", '{"name": "vp_linear", "steps": 500}') == 0
    told = capsys.readouterr().out
    assert (
        "Taken for granted: images of 32x32, for such networks attend at 16x16" in told
        and "vp_linear, 500 steps" in told
    )
    assert fs.load(tmp_path / "m").name == "ddpm"
    assert run(monkeypatch, "import", str(tmp_path / "no"), "--out", str(tmp_path / "n")) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("fewstep: there is no file") and captured.count("\n") == 1
    assert not (tmp_path / "n").exists()


def test_the_command_to_train_further_starts_from_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    twin(**CIFAR).save_pretrained(tmp_path / "net")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    out, data = str(tmp_path / "m"), str(tmp_path / "images.npz")
    assert run(monkeypatch, "import", str(tmp_path / "net"), "--out", out) == 0
    told = capsys.readouterr().out.splitlines()[-1].removeprefix("Train it further: fewstep ")
    words = [data if word == "IMAGES" else word for word in shlex.split(told)]
    short = ("--steps", "1", "--batch-size", "2", "--sample-every", "0", "--out")
    assert run(monkeypatch, *words, *short, str(tmp_path / "run")) == 0
    captured = capsys.readouterr()
    for warning in ("the network is another", "do not fit", "have to learn anew"):
        assert warning not in captured.out + captured.err
    options = json.loads(words[words.index("--network-options") + 1])
    options.pop("pad_after")
    words[words.index("--network-options") + 1] = json.dumps(options)
    assert run(monkeypatch, *words, *short, str(tmp_path / "other")) == 0
    captured = capsys.readouterr()
    assert "(pad_after: True there, False here)" in captured.out + captured.err
