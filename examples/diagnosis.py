"""A network that is read in the wrong convention: `diagnose` says so, and which one is right.

The network is exact, for a mixture of two Gaussians in 16 dimensions. Its convention is that of the flow_matching
library: noise at time 0, data at time 1, velocity data - noise. If it is read as a flow of diffusers, the samples are
wrong, and there is no error.

Run: python examples/diagnosis.py (it writes diagnosis.png)
"""

import torch

import fastsde

MEANS = torch.stack([torch.full((16,), 0.5), torch.full((16,), -0.3)]).double()
STD = 0.1


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[data - noise | x_t] for x_t = t data + (1 - t) noise."""
    alpha, sigma = t.double()[:, None], 1 - t.double()[:, None]
    apart, variance = x.double()[:, None] - alpha[:, :, None] * MEANS, (alpha * STD) ** 2 + sigma**2
    weights = (-apart.square().sum(2) / (2 * variance)).softmax(1)[..., None]
    data = (weights * (MEANS + (alpha * STD**2 / variance)[:, :, None] * apart)).sum(1)
    return (data - (x - alpha * data) / sigma.clamp(min=1e-9)).float()


model = fastsde.ScoreModel(
    network, fastsde.RectifiedFlow(), "flow_prediction", event_shape=(16,), data_range=(-1.0, 1.0)
)
data = (MEANS[torch.arange(16) % 2] + STD * torch.randn(16, 16)).float()
found = fastsde.diagnose(model, data=data)
print(found)
found.plot("diagnosis.png")  # needs matplotlib
for name, m in (("first reading", model), ("right reading", found.model)):
    samples = fastsde.sample(m, n=500, seed=0).samples  # the first warns that they leave the data range
    distance = (samples[:, None] - MEANS).square().mean(2).min(1).values.mean().sqrt()
    print(f"{name}: {float(distance):.3f} from the nearest mean; 0.1 is right")
