"""Masks of a discriminator's input."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsde
from fastsde.training.adversarial import Adversary
from fastsde.training.gan_losses import wgan
from fastsde.training.masking import CAP, Masking, attention_gini, band_energy, band_of


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def natural(n=40, size=28, slope=1.5):
    """Noise with a spectrum that falls as natural images' does."""
    white = torch.randn(n, 1, size, size, generator=seeded(3))
    radius = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    return torch.fft.irfft2(torch.fft.rfft2(white) / (radius + 0.02) ** slope, s=(size, size))


@given(
    space=st.floats(0.0, 0.9),
    patch=st.integers(1, 9),
    height=st.integers(5, 17),
    width=st.integers(5, 17),
    seed=st.integers(0, 9),
)
@settings(max_examples=15, deadline=None)
def test_every_pixel_and_every_image_is_masked_with_the_share_asked_for(space, patch, height, width, seed):
    n = 4000
    masked = 1 - Masking(space=space, patch=patch).visible(torch.zeros(n, 1, height, width), seeded(seed))
    # The ratio of an image is fixed, to a pixel.
    assert (masked.sum((1, 2, 3)) == round(space * height * width)).all()
    share = round(space * height * width) / (height * width)
    # 5.5 standard errors of a share of n, for up to 289 pixels in 15 examples.
    assert (masked.mean(0) - share).abs().max() <= 5.5 * math.sqrt(share * (1 - share) / n) + 1e-6


@pytest.mark.parametrize("shape", ["square", "block"])
def test_one_region_masks_every_pixel_with_the_share_asked_for(shape):
    n, space = 4000, 0.3
    masked = 1 - Masking(space=space, shape=shape).visible(torch.zeros(n, 1, 12, 16), seeded())
    share = round(space * 12 * 16) / (12 * 16)
    assert (masked.sum((1, 2, 3)) == round(space * 12 * 16)).all()
    # 5.5 standard errors of a share of n, for 192 pixels.
    assert (masked.mean(0) - share).abs().max() <= 5.5 * math.sqrt(share * (1 - share) / n)


def test_a_square_is_one_around_the_edges():
    masked = 1 - Masking(space=49 / 256, shape="square").visible(torch.zeros(20, 1, 16, 16), seeded())
    for image in masked[:, 0]:
        rows, columns = image.any(1), image.any(0)
        assert rows.sum() == columns.sum() == 7
        assert torch.equal(image.bool(), rows[:, None] & columns[None])
        # In one run each, across the edge or not.
        assert all((line != line.roll(1)).sum() == 2 for line in (rows, columns))


def test_a_centre_grid_masks_the_middle_of_every_patch_and_does_not_move():
    seen = Masking(space=0.25, patch=4, shape="grid").visible(torch.zeros(3, 1, 8, 8), seeded())
    expected = torch.ones(4, 4)
    expected[1:3, 1:3] = 0
    assert torch.equal(seen, expected.repeat(2, 2).expand(3, 1, 8, 8))


def test_the_gini_coefficient_of_attention():
    x = torch.randn(4, 2, 6, 5, generator=seeded(), dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(attention_gini(lambda y: y.sum((1, 2, 3)), x), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention_gini(lambda y: y[:, 0, 2, 3], x), zero + 29 / 30, rtol=1e-12, atol=0)
    # Weights 1 .. n: sum_i (2 i - n - 1) i / (n sum_i i) = (n^2 - 1) / (3 n (n + 1)) = (n - 1) / (3 n).
    ramp = torch.arange(1, 31, dtype=torch.float64).reshape(6, 5)
    torch.testing.assert_close(
        attention_gini(lambda y: (ramp * y[:, 0]).sum((1, 2)), x), zero + 29 / 90, rtol=1e-12, atol=0
    )


def test_masks_of_the_score_networks_turn_are_its_own():
    """D sees whole images; the score network's gradient through a linear D is scaled by what it lets through."""
    sde = fastsde.VPSDE()
    weight = torch.nn.Parameter(torch.randn(1, 8, 8, generator=seeded()))

    class Linear(torch.nn.Module):
        def forward(self, x):
            return (x * weight).sum((1, 2, 3))

    shift = torch.nn.Parameter(torch.zeros(()))
    model = fastsde.ScoreModel(lambda x, t: x + shift, sde, "sample", event_shape=(1, 8, 8))
    x_0, noise = torch.randn(2, 400, 1, 8, 8, generator=seeded(1))
    t = torch.full((400,), 0.5, dtype=torch.float64)

    def slope(**masks):
        adversary = Adversary(Linear(), wgan(), weight=0.0, **masks)
        loss = adversary.score_loss(model, x_0, t, noise, {}, seeded(2))
        return float(torch.autograd.grad(loss, shift)[0])

    whole, masked = slope(), slope(score_masking=Masking(space=0.5, spectrum=0.0, patch=2))
    # The mean over 400 masks of half of the weights: 64 weights of size 1 leave a spread of 4 a mask.
    assert masked == pytest.approx(0.5 * whole, abs=5 * 4 / 400**0.5)
    assert slope(masking=Masking(space=0.5, spectrum=0.0, patch=2)) == masked


@pytest.mark.parametrize(("shape", "expected"), [("patches", {0, 1, 2, 3}), ("fixed patches", {0})])
def test_masked_places_are_whole_patches_on_a_grid_that_is_shifted_or_fixed(shape, expected):
    # 6 of 16 patches, so that none is masked in part.
    seen = Masking(space=0.375, patch=4, shape=shape).visible(torch.zeros(50, 1, 16, 16), seeded())
    offsets = set()
    for image in seen[:, 0]:
        rows = {int(k) % 4 for k in (image[1:] != image[:-1]).any(1).nonzero() + 1}
        columns = {int(k) % 4 for k in (image[:, 1:] != image[:, :-1]).any(0).nonzero() + 1}
        assert len(rows) <= 1
        assert len(columns) <= 1
        offsets |= rows
    assert offsets == expected
    assert (1 - seen).sum((1, 2, 3)).unique().tolist() == [96]
    # Five standard errors of a share of 50.
    assert (seen.mean(0) - 0.625).abs().max() <= 5 * (0.625 * 0.375 / 50) ** 0.5


def test_energies_of_bands_sum_to_the_energy_of_the_image():
    for shape in ((5, 3, 28, 28), (5, 1, 9, 13)):
        x = torch.randn(shape, generator=seeded(), dtype=torch.float64)
        energy, _ = band_energy(x, 16)
        torch.testing.assert_close(energy.sum().double(), x.square().sum((1, 2, 3)).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_every_band_below_the_cap_loses_the_same_energy(share):
    data = natural()
    p = Masking(spectrum=share).drop_probabilities(data)
    energy, there = band_energy(data, 64)
    free = there & (p < CAP)
    assert 5 < int(free.sum()) < int(there.sum())
    torch.testing.assert_close(p[there].mean(), torch.tensor(share), rtol=1e-4, atol=0)
    lost = (p * energy)[free]
    torch.testing.assert_close(lost, lost[:1].expand_as(lost), rtol=1e-4, atol=0)
    # Capped bands have less energy than c: they cannot lose it even if dropped half of the time.
    assert ((p * energy)[there & ~free] <= lost[0] * (1 + 1e-4)).all()


@pytest.mark.parametrize("balanced", [True, False])
def test_dropped_bands_are_gone_and_others_unchanged(balanced):
    data = natural(n=400)
    masking = Masking(space=0.0, spectrum=0.25, bands=16, balanced=balanced)
    spectrum, masked = torch.fft.rfft2(data), torch.fft.rfft2(masking(data, data, seeded()))
    band = band_of(28, 28, 16)
    dropped = torch.zeros(400, 16, dtype=torch.bool)
    for b in range(16):
        own, now = spectrum[:, 0, band == b], masked[:, 0, band == b]
        scale = own.abs().amax(1)
        gone, kept = now.abs().amax(1) < 1e-4 * scale, (now - own).abs().amax(1) < 1e-4 * scale
        assert (gone ^ kept).all()
        dropped[:, b] = gone
    expected = masking.drop_probabilities(data) if balanced else torch.full((16,), 0.25)
    # Five standard errors of a share of 400.
    assert ((dropped.float().mean(0) - expected).abs() <= 5 * (expected * (1 - expected) / 400).sqrt() + 1e-6).all()


def test_masks_are_a_function_of_the_generator_and_nothing_is_lost_at_zero():
    x = natural(n=4)
    assert torch.equal(Masking()(x, x, seeded(1)), Masking()(x, x, seeded(1)))
    assert not torch.equal(Masking()(x, x, seeded(1)), Masking()(x, x, seeded(2)))
    assert torch.equal(Masking(space=0.0, spectrum=0.0)(x, x, seeded()), x)


def test_masking_scales_the_gradient_of_a_linear_pooling_discriminator():
    """(1 - p) in expectation (eq. 29 of the paper's supplement)."""
    x = natural(n=1).expand(20_000, -1, -1, -1).clone().requires_grad_()
    weight = torch.tensor(0.7)
    (weight * Masking(space=0.3, spectrum=0.0, patch=6)(x, x, seeded())).mean((1, 2, 3)).sum().backward()
    expected = 0.7 / 784 * (1 - 235 / 784)  # 0.3 of 784 pixels, rounded
    # Five standard errors, sqrt(0.3 / 0.7 / 20000) each, for 784 pixels.
    torch.testing.assert_close(
        x.grad.mean(0), torch.full((1, 28, 28), expected), rtol=5 * math.sqrt(0.3 / 0.7 / 20_000), atol=0
    )


@pytest.mark.parametrize("shape", ["patches", "grid"])
def test_a_patch_given_as_a_share_grows_with_the_image(shape):
    share = Masking(patch=0.25, shape=shape)
    for height, width, side in ((32, 32, 8), (64, 64, 16), (14, 20, 4), (2, 2, 1)):
        x = torch.zeros(3, 1, height, width)
        assert torch.equal(share.visible(x, seeded()), dataclasses.replace(share, patch=side).visible(x, seeded()))


def test_values_out_of_range_are_refused():
    for options, name in (({"space": 1.0}, "space"), ({"spectrum": 0.6}, "spectrum"), ({"patch": 0}, "patch")):
        with pytest.raises(ValueError, match=name):
            Masking(**options)
    with pytest.raises(ValueError, match=r"patch must be a share of the side below 1, or whole pixels; got 2\.5"):
        Masking(patch=2.5)
    with pytest.raises(ValueError, match="patch must be at most the image's side, 4; got 5"):
        Masking(patch=5)(torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 4, 6), seeded())
    with pytest.raises(ValueError, match="images"):
        Masking()(torch.zeros(3, 2), torch.zeros(3, 2), seeded())
