"""Small networks for tokens: a transformer for generators and critics, and a code book that makes images tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from fastsde.checks import check_count


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class TokenTransformer(nn.Module):
    """A transformer that sees all positions, without time: logits for each of them.

    Args:
        vocabulary: K; id K is the mask.
        length: number of positions.
        outputs: logits for each position; K by default, 1 for a critic.
        classes: labels 0 .. classes - 1, and one more for "no label"; None for none.
        width: of the residual stream, divisible by `heads`.
        depth: number of blocks.
        heads: of attention.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        outputs: int | None = None,
        classes: int | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "length": length, "width": width, "depth": depth, "heads": heads}
        for name, value in sizes.items():
            check_count(name, value, 1)
        if width % heads:
            raise ValueError(f"width must be divisible by heads; got {width} and {heads}.")
        self.config = {**sizes, "outputs": outputs, "classes": classes}
        self.tokens, self.places = nn.Embedding(vocabulary + 1, width), nn.Parameter(torch.zeros(length, width))
        self.labels = None if classes is None else nn.Embedding(classes + 1, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs or vocabulary)
        for weight in (self.tokens.weight, self.places, *(() if self.labels is None else (self.labels.weight,))):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Logits with shape (B, *event, outputs) of ids with shape (B, *event)."""
        x = self.tokens(ids.flatten(1)) + self.places
        if self.labels is not None and class_labels is not None:
            x = x + self.labels(class_labels)[:, None]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out.reshape(*ids.shape, -1)


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class CodeBook(nn.Module):
    """An autoencoder whose code is a token for each patch of 4 x 4 pixels.

    The nearest code, with gradients straight through; codes follow the mean of what is encoded to them, with a decay.
    Source: van den Oord et al., https://arxiv.org/abs/1711.00937, sec. 3.2 and app. A.1.

    Args:
        codes: number of codes.
        width: channels.
        code_width: dimensions of a code.
        decay: of the means.

    Raises:
        ValueError: if a number is out of range.
    """

    codes: Tensor
    mass: Tensor

    def __init__(self, codes: int = 64, width: int = 48, code_width: int = 8, decay: float = 0.97) -> None:
        super().__init__()
        sizes = {"codes": codes, "width": width, "code_width": code_width}
        for name, value in sizes.items():
            check_count(name, value, 1)
        self.config, self.decay = sizes, decay
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 4, 4), *(_Residual(width) for _ in range(3)), nn.Conv2d(width, code_width, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_width, width, 3, padding=1),
            *(_Residual(width) for _ in range(3)),
            nn.ConvTranspose2d(width, 16, 4, 4),
            nn.GELU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )
        self.register_buffer("codes", torch.randn(codes, code_width))
        self.register_buffer("mass", torch.ones(codes))

    def _nearest(self, z: Tensor) -> Tensor:
        """Codes of vectors with shape (N, code_width)."""
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens with shape (n, h / 4, w / 4) of images with shape (n, 1, h, w)."""
        z = self.encoder(images).movedim(1, -1)
        return self._nearest(z.flatten(0, -2)).reshape(z.shape[:-1])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images with shape (n, 1, h, w) of tokens with shape (n, h / 4, w / 4)."""
        images: Tensor = self.decoder(self.codes[tokens].movedim(-1, 1))
        return images

    def loss(self, images: Tensor, commitment: float = 0.25) -> Tensor:
        """Squared error of the images plus that of their codes; in training mode the codes move."""
        z = self.encoder(images)
        flat = z.movedim(1, -1).flatten(0, -2)
        chosen = self._nearest(flat.detach())
        quantised = self.codes[chosen].reshape(z.movedim(1, -1).shape).movedim(-1, 1)
        if self.training:
            self._follow(flat.detach(), chosen)
        out = self.decoder(z + (quantised - z).detach())
        return mse_loss(out, images) + commitment * mse_loss(z, quantised)

    @torch.no_grad()
    def _follow(self, z: Tensor, chosen: Tensor) -> None:
        count = torch.bincount(chosen, minlength=len(self.codes)).to(z)
        total = torch.zeros_like(self.codes).index_add_(0, chosen, z)
        self.mass.lerp_(count, 1 - self.decay)
        mean = total / count.clamp(min=1)[:, None]
        # The rate of a running mean of what was encoded to each code.
        rate = (1 - self.decay) * count / self.mass.clamp(min=1e-5)
        self.codes.lerp_(mean, rate.clamp(max=1)[:, None])
        idle = self.mass < 0.02 * self.mass.mean()
        if idle.any():  # codes that nobody uses start again where something is
            places = torch.randint(len(z), (int(idle.sum()),), generator=torch.Generator().manual_seed(int(count[0])))
            self.codes[idle], self.mass[idle] = z[places], self.mass.mean()
