"""A training step and a forward pass of our U-Net beside diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet.

`python bench/networks.py [--out FILE] [--rounds N] [--sizes small ...]`: three sizes at 32x32 RGB, each as near in
parameters as the three codes allow, float32 and bfloat16 (autocast), on the processor. Every code has a process of its
own, and the processes take turns, so that a busy machine slows all alike; shown are medians.

- Training step: loss of the noise prediction, gradient, AdamW. Ours is the library's own step, with the clipped
  gradient, the check for NaN and the running average of the weights, which the others are spared.
- Forward pass: without gradients, of the whole batch at once. "In parts" gives ours to `fewstep.threads.spread`, as
  tuning does, a part of the batch to each thread; the others, which have no such thing, run as before.
- Peers are tried in both memory orders, contiguous and channels-last, and the faster one counts.
- Peak memory: how far the resident memory of the process rises above what it had with the network built.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import report

EDGE = 32
OURS, DIFFUSERS, LUCIDRAINS = "fewstep", "diffusers", "denoising-diffusion-pytorch"
CODES = (OURS, DIFFUSERS, LUCIDRAINS)
TARGETS = {"train": 1.3, "forward": 1.5, "forward in parts": 1.5}
WARM_UP, SETTLE = 2, 0.3
"""Runs before the first that counts, and seconds in which a code's threads come to rest before another's turn."""


@dataclass(frozen=True)
class Size:
    """One size of network in the three codes, and the batch it is measured with."""

    channels: tuple[int, ...]
    attention: tuple[int, ...]
    batch: int
    dim: int
    multiples: tuple[int, ...]
    blocks: int = 2


SIZES = {
    "1.6M": Size((32, 64, 64), (1, 2), 64, 28, (1, 2, 2, 2)),
    "6M": Size((48, 96, 144), (1, 2), 64, 58, (1, 2, 3)),
    "35.7M": Size((128, 256, 256, 256), (1,), 16, 112, (1, 2, 2, 4)),
    "36M": Size((112, 224, 224, 448), (1,), 16, 112, (1, 2, 2, 4), blocks=1),
}
"""35.7M is the network of DDPM; 36M has the widths that denoising-diffusion-pytorch has in both."""


def build(code: str, size: Size) -> nn.Module:
    """The network of a code."""
    if code == OURS:
        from fewstep.networks import UNet, UNetConfig

        return UNet(
            UNetConfig(
                channels=size.channels,
                attention=size.attention,
                group_width=16,
                blocks=size.blocks,
            )
        )
    if code == DIFFUSERS:
        from diffusers import UNet2DModel

        attends = [level in size.attention for level in range(len(size.channels))]
        return UNet2DModel(
            sample_size=EDGE,
            layers_per_block=size.blocks,
            block_out_channels=size.channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            attention_head_dim=None,
            norm_num_groups=16,
        )
    return lucidrains().Unet(dim=size.dim, dim_mults=size.multiples)


def lucidrains() -> ModuleType:
    """The module of denoising-diffusion-pytorch, which asks for torchvision and more that its network never uses."""
    absent = ("torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_fid")
    names = [*absent, "pytorch_fid.inception", "pytorch_fid.fid_score"]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        import denoising_diffusion_pytorch.denoising_diffusion_pytorch as module
    return module


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    code: str
    size: str
    bfloat16: bool
    channels_last: bool
    task: str
    device: str = "cpu"
    batch: int | None = None
    compiled: bool = False

    @property
    def images(self) -> int:
        """The batch: that of the size, if there is no other."""
        return self.batch or SIZES[self.size].batch


class Subject:
    """A network of one code with what its task needs, ready to be timed."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        size = SIZES[case.size]
        order = torch.channels_last if case.channels_last else torch.contiguous_format
        self.case = case
        network = build(case.code, size).train(case.task == "train")
        self.network = network.to(case.device, memory_format=order)  # pyright: ignore[reportCallIssue]
        if case.compiled:
            self.network.compile()
        x = torch.randn(case.images, 3, EDGE, EDGE)
        self.x = x.to(case.device, memory_format=order)
        self.noise = torch.randn_like(self.x)
        self.t = torch.randint(0, 1000, (case.images,), device=case.device)
        if case.task == "train":
            self.run = self._our_training() if case.code == OURS else self._their_training()
        else:
            in_parts = case.code == OURS and case.task == "forward in parts"
            self.run = self._forward_in_parts if in_parts else self._forward

    def _output(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(self.case.device, dtype=torch.bfloat16, enabled=self.case.bfloat16):
            found = self.network(x, t)
            return found.sample if self.case.code == DIFFUSERS else found

    def _forward_in_parts(self) -> None:
        from fewstep.threads import spread

        count = torch.get_num_threads()
        parts = zip(self.x.tensor_split(count), self.t.tensor_split(count), strict=True)
        with torch.no_grad():
            list(spread(lambda part: self._output(*part), parts, self.x.device))

    def _forward(self) -> None:
        with torch.no_grad():
            self._output(self.x, self.t)

    def _our_training(self) -> Callable[[], object]:
        from fewstep.training import TrainingConfig
        from fewstep.training.batches import Batch
        from fewstep.training.gradients import Gradients, usual_parts
        from fewstep.training.state import TrainingState

        case = self.case
        whole = case.device != "cpu" or case.compiled
        parts = 1 if whole else usual_parts(self.network, case.images)
        config = TrainingConfig(data="mnist-1000")
        objective, state = config.objective(), TrainingState(self.network, config)
        batch = Batch(self.x, self.noise, self.t.double().cpu(), None)

        def loss(part: Batch) -> Tensor:
            return objective(self._output, part.x0, part.noise, part.t)

        gradients = Gradients(self.network, loss, parts, threaded=True)
        gradients.__enter__()  # for as long as the process lives
        return lambda: state.update(gradients(batch))

    def _their_training(self) -> Callable[[], object]:
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-4)

        def step() -> None:
            F.mse_loss(self._output(self.x, self.t).float(), self.noise).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step


def serve(pipe: Connection, case: Case) -> None:
    """Time the task once for each message; tell of parameters and memory at the end."""
    subject = Subject(case)
    parameters = sum(w.numel() for w in subject.network.parameters())
    gc.collect()
    before = _peak()
    while pipe.recv() == "go":
        pipe.send(report.seconds(subject.run))
    pipe.send((parameters, _peak() - before))


def _peak() -> int:
    """The most resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Measured:
    """What one code came to."""

    images_per_second: float
    parameters: int
    memory: int


class Runner:
    """A process that measures a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve, args=(theirs, case), daemon=True)
        self.process.start()
        self.times: list[float] = []

    def go(self) -> float:
        """Time the task once."""
        self.pipe.send("go")
        taken = self.pipe.recv()
        time.sleep(SETTLE)
        return taken

    def end(self) -> Measured:
        """End the process and say what was found."""
        self.pipe.send("end")
        parameters, memory = self.pipe.recv()
        self.process.join()
        return Measured(self.case.images / statistics.median(self.times), parameters, memory)


def contest(size: str, bfloat16: bool, task: str, rounds: int) -> dict[str, Measured]:
    """Measure the codes in turns; of a peer's two memory orders the faster one stays."""
    runners = []
    for code in CODES:
        orders = (True,) if code == OURS else (True, False)
        candidates = [Runner(Case(code, size, bfloat16, order, task)) for order in orders]
        tried = {runner: min(runner.go() for _ in range(WARM_UP)) for runner in candidates}
        best = min(tried, key=lambda runner: tried[runner])
        runners.append(best)
        for runner in candidates:
            if runner is not best:
                runner.process.kill()
    for _ in range(rounds):
        for runner in runners:
            runner.times.append(runner.go())
    return {runner.case.code: runner.end() for runner in runners}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=7, help="times that each code has its turn")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    given = parser.parse_args()
    lines = report.header(
        "Networks: training steps and forward passes beside other codes",
        f"python bench/networks.py --rounds {given.rounds} --sizes {' '.join(given.sizes)}",
        ("torch", "diffusers", "denoising-diffusion-pytorch"),
    )
    lines += [
        "Images a second at 32x32 RGB; the ratio is ours to the better peer. Memory is what the run needs above the",
        "built network and its data, in MB; the ratio there is ours to the thriftier peer. d-d-p is",
        "denoising-diffusion-pytorch.",
        "",
        "| parameters (each) | batch | task | type | ours | diffusers | d-d-p | ratio | target | met |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    memory = [
        "",
        "| parameters | type | task | ours MB | diffusers MB | d-d-p MB | ratio | target | met |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name in given.sizes:
        for bfloat16 in (False, True):
            kind = "bfloat16" if bfloat16 else "float32"
            for task, target in TARGETS.items():
                found = contest(name, bfloat16, task, given.rounds)
                ours, *peers = (found[code] for code in CODES)
                ratio = ours.images_per_second / max(peer.images_per_second for peer in peers)
                counts = " / ".join(f"{found[code].parameters / 1e6:.2f}M" for code in CODES)
                speeds = " | ".join(f"{found[code].images_per_second:.1f}" for code in CODES)
                lines.append(
                    f"| {counts} | {SIZES[name].batch} | {task} | {kind} | {speeds} | {ratio:.2f} | >= {target} | "
                    f"{'yes' if ratio >= target else 'NO'} |"
                )
                print(lines[-1], flush=True)
                share = ours.memory / min(peer.memory for peer in peers)
                used = " | ".join(f"{found[code].memory / 1e6:.0f}" for code in CODES)
                memory.append(
                    f"| {name} | {kind} | {task} | {used} | {share:.2f} | <= 1 | "
                    f"{'yes' if share <= 1 else 'NO'} |"
                )
                print(memory[-1], flush=True)
    text = "\n".join([*lines, *memory, ""])
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
