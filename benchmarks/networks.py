"""Three small networks with other habits than the packaged one, on MNIST: what the studies of real networks run on.

- `flow`: a rectified flow, velocity, uniform t.
- `shifted`: the same with the times of training shifted by 3, t = 3 u / (1 + 2 u), as large flow models are.
- `clipped`: a DDPM with 100 levels (beta from 1e-3 to 0.2), epsilon, x_0 clipped to [-1, 1] at each call.

What is missing in runs/networks is trained, some 10 minutes each on 2 cores. It is not part of the package.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from common import RUNS, command
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.ema import ema_model
from fastsde.training.networks import small_unet

FOLDER = RUNS / "networks"
NAMES = ("flow", "shifted", "clipped")
WIDTHS = (16, 32, 48)
SHIFT = 3.0


def unread(name: str) -> torch.nn.Module:
    """The network with random weights."""
    torch.manual_seed(NAMES.index(name))
    return small_unet(28, 1, None, widths=WIDTHS)


def read(name: str, network: torch.nn.Module) -> fastsde.ScoreModel:
    """The network as it was trained: process, prediction and times."""
    network = network.eval()
    if name == "clipped":
        sde = fastsde.DiscreteVPSDE(torch.linspace(1e-3, 0.2, 100, dtype=torch.float64))
        model = fastsde.ScoreModel(
            network, sde, "epsilon", event_shape=(1, 28, 28), data_range=(-1, 1), timestep=lambda t: 100 * t - 1
        )
        return fastsde.score.Clipped(model)
    sde = fastsde.RectifiedFlow()
    return fastsde.ScoreModel(
        network, sde, "flow_prediction", event_shape=(1, 28, 28), data_range=(-1, 1), timestep=lambda t: 1000 * t
    )


def load(name: str, device: str = "cpu") -> fastsde.ScoreModel:
    """A trained network of these.

    Raises:
        FileNotFoundError: if it is not trained yet.
    """
    file = FOLDER / f"{name}.safetensors"
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing: python benchmarks/networks.py --data FOLDER trains it.")
    network = unread(name)
    network.load_state_dict(load_file(file))
    return read(name, network.to(device))


def loss(name: str, network: torch.nn.Module, x: Tensor) -> Tensor:
    """Mean squared error of what the network predicts, at random times of its training."""
    noise, u = torch.randn_like(x), ((torch.rand(()) + torch.arange(len(x)) / len(x)) % 1).to(x.device)
    if name == "clipped":
        level = (100 * u).long().clamp(max=99)
        kept = (1 - torch.linspace(1e-3, 0.2, 100, dtype=torch.float64)).cumprod(0).float().to(x.device)
        kept = kept[level, None, None, None]
        x_t, t, target = kept.sqrt() * x + (1 - kept).sqrt() * noise, level.float(), noise
    else:
        t = u if name == "flow" else SHIFT * u / (1 + (SHIFT - 1) * u)
        s = t[:, None, None, None]
        x_t, t, target = (1 - s) * x + s * noise, 1000 * t, noise - x
    return (network(x_t, t).sample - target).square().mean()


def train(name: str, images: Tensor, steps: int, batch: int, folder: Path, device: str) -> None:
    """Trains a network and keeps its averaged weights."""
    network = unread(name).to(device).train()
    average = ema_model(network, 0.999)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3, (0.9, 0.99))
    bar = tqdm(range(steps), name, unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        value = loss(name, network, images[torch.randint(len(images), (batch,))].to(device))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        bar.set_postfix(loss=f"{float(value.detach()):.4f}", refresh=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in average.module.state_dict().items()}, folder / f"{name}.safetensors")


@command(None, steps=2, only=["flow"], folder=RUNS / "quick_networks")
def main(
    data: Path,
    only: tuple[str, ...] = NAMES,
    steps: int = 2000,
    batch: int = 32,
    folder: Path = FOLDER,
    device: str = "cpu",
) -> None:
    """Trains the networks that are missing."""
    images = to_unit_range(load_images(data)[0])
    for name in only:
        if not (folder / f"{name}.safetensors").exists():
            train(name, images, steps, batch, folder, device)


if __name__ == "__main__":
    main()
