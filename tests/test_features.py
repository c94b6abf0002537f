"""From images to features to reference statistics: every source, every network, every refusal."""

import hashlib
import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from test_training import write_split

import fastsde
from fastsde.evaluation.classifier import WEIGHTS, Classifier, accuracy, load_classifier, train_classifier
from fastsde.evaluation.features import PACKAGED, Features, inception_features, open_features
from fastsde.evaluation.images import open_images, to_uint8
from fastsde.evaluation.jobs import ShardedJob
from fastsde.evaluation.measure import measure
from fastsde.evaluation.reference import Reference, packaged_reference
from fastsde.evaluation.statistics import Moments, frechet_distance
from fastsde.training.checkpoint import save_checkpoint


def pictures(n, side=4, channels=1, seed=0):
    """uint8 with shape (n, H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def flat(channels=1, **options):
    return Features(lambda x: x.flatten(1), "pixels", channels, (0.0,), (1.0,), **options)


def in_folder(images, folder):
    folder.mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{k:03d}.png")
    return folder


def in_npz(images, folder):
    folder.mkdir()
    np.savez(folder / "x.npz", arr_0=images)
    return folder / "x.npz"


def in_idx(images, folder):
    folder.mkdir()
    write_split(folder, "train", images[:, :, :, 0], np.zeros(len(images)))
    return folder


def in_job(images, folder):
    job = ShardedJob.begin(folder, len(images), 3, {})
    list(job.run(lambda indices: {"arr_0": images[list(indices)], "status": np.ones(len(indices), np.int64)}))
    return folder


def in_dataset(images, folder):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [Image.fromarray(i[:, :, 0]) for i in images]}, kinds)
    data.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("store", [in_folder, in_npz, in_idx, in_job, in_dataset])
def test_every_source_gives_the_same_images_in_any_parts(store, tmp_path):
    images = pictures(10)
    found = open_images(store(images, tmp_path / "x"))
    assert (found.n, found.shape) == (10, (1, 4, 4))
    for size in (1, 3, 4, 10, 99):
        assert torch.equal(torch.cat(list(found.batches(size))), torch.from_numpy(images.transpose(0, 3, 1, 2)))


def test_colour_images_keep_their_channels(tmp_path):
    images = pictures(3, channels=3)
    assert torch.equal(
        open_images(in_folder(images, tmp_path / "x")).read(0, 3), torch.from_numpy(images.transpose(0, 3, 1, 2))
    )


def with_stray_file(folder):
    (in_folder(pictures(3), folder) / "notes.txt").write_text("x")


def with_another_size(folder):
    Image.fromarray(pictures(1, side=5)[0, :, :, 0]).save(in_folder(pictures(3), folder) / "zzz.png")


def with_a_broken_picture(folder):
    (in_folder(pictures(3), folder) / "002.png").write_bytes(b"\x89PNG no")


def unfinished(folder):
    job = ShardedJob.begin(folder, 9, 3, {})
    next(job.run(lambda indices: {"arr_0": pictures(3)}))


def with_a_broken_shard(folder):
    in_job(pictures(6), folder)
    (folder / "samples-00001.npz").write_bytes(b"PK no")


def with_lost_samples(folder):
    job = ShardedJob.begin(folder, 6, 3, {})
    list(job.run(lambda indices: {"arr_0": pictures(2), "status": np.array([1, 4, 1])}))


def with_deep_pixels(folder):
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(in_folder(pictures(3), folder) / "deep.png")


def with_holes(folder):
    Image.fromarray(pictures(1, channels=4)[0], "RGBA").save(in_folder(pictures(3), folder) / "holes.png")


def with_a_copied_shard(folder):
    job = ShardedJob.begin(folder, 6, 3, {})

    def draw(numbers):
        return {"arr_0": pictures(3), "status": np.ones(3, np.int64), "index": np.array(numbers)}

    list(job.run(draw))
    job.path(1).write_bytes(job.path(0).read_bytes())


def with_damaged_pixels(folder):
    job = ShardedJob.load(in_job(np.concatenate([pictures(60, side=16)] * 2), folder))
    content = bytearray(job.path(1).read_bytes())
    content[300:400] = bytes(100)
    job.path(1).write_bytes(content)


def with_missing_samples(folder):
    folder.mkdir()
    np.savez(folder / "samples.npz", arr_0=pictures(3))
    (folder / "samples.json").write_text('{"n": 4}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_stray_file, r"notes\.txt, which is no image"),
        (with_another_size, r"zzz\.png has shape \(5, 5, 1\)"),
        (with_a_broken_picture, r"002\.png cannot be read"),
        (unfinished, "2 of 3 shards are missing, the first 1"),
        (with_a_broken_shard, "damaged.*Delete it and run the job again"),
        (with_lost_samples, "2 of 6 samples are not finite"),
        (lambda folder: folder.mkdir(), "holds no images"),
        (lambda folder: None, "neither a file nor a folder"),
        (lambda folder: np.savez(folder, arr_0=np.full((2, 4, 4, 1), np.nan)), "float64.*not finite"),
        (lambda folder: np.savez(folder, other=1), "has no arr_0; it has other"),
        (lambda folder: folder.with_suffix(".npz").write_bytes(b"no"), r"no \.npz file of plain arrays"),
        (with_deep_pixels, r"deep\.png cannot be read as an image: it is not 8 bits"),
        (with_holes, r"holes\.png cannot be read as an image: it is transparent"),
        (with_a_copied_shard, "not shard 1 of this job: it holds other samples than 3 to 5"),
        (with_damaged_pixels, "is damaged"),
        (with_missing_samples, "1 of 4 samples are not finite or missing"),
    ],
)
def test_what_is_no_set_of_images_is_refused_by_name(make, message, tmp_path):
    make(tmp_path / "x")
    path = tmp_path / "x.npz" if (tmp_path / "x.npz").exists() else tmp_path / "x"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(open_images(path).batches())


def test_the_default_dtype_of_the_process_changes_nothing(tmp_path):
    """From pictures to every figure, through a feature network that is opened, trained or resizes: the same bits."""
    source, other = (in_npz(pictures(140, 28, seed=k), tmp_path / f"{k}") for k in (0, 1))
    images, labels = torch.from_numpy(pictures(160, 8).transpose(0, 3, 1, 2)), torch.arange(160) % 3

    def everything():
        features = open_features("fashion-mnist")
        reference = Reference.build(open_images(source), features)
        figures = measure(*features.of(open_images(other)), reference, draws=3)
        small, _ = Features(lambda x: x.flatten(1), "small", 1, size=5)(open_images(other).read(0, 3))
        trained = train_classifier(images, labels, epochs=1, bf16=False).head.weight
        model, _ = fastsde.pretrained("fashion-mnist")
        weights = torch.cat([p.flatten() for p in model.network.parameters()])
        return figures, reference.mean, reference.feats, small, trained, weights

    expected = everything()
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            found = everything()
        finally:
            torch.set_default_dtype(torch.float32)
        assert found[0] == expected[0]
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_folder_of_several_data_sets_is_refused_and_of_one_is_read(tmp_path):
    """As torchvision makes them, ROOT/NAME/raw: which one is meant?"""
    images = pictures(10)
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name).mkdir()
        in_idx(images, tmp_path / name / "raw")
        if name == "MNIST":
            assert open_images(tmp_path).n == 10
    assert open_images(tmp_path / "MNIST").n == 10
    with pytest.raises(ValueError, match=r"several data sets: .*FashionMNIST.* and .*MNIST.*\. Choose one"):
        open_images(tmp_path)


def test_a_split_where_there_is_none_is_refused(tmp_path):
    for source in (in_npz(pictures(3), tmp_path / "a"), in_folder(pictures(3), tmp_path / "b"), tmp_path / "c"):
        if not source.exists():
            in_job(pictures(3), source)
        with pytest.raises(ValueError, match="has no splits; leave 'test' out"):
            open_images(source, split="test")


def test_hidden_folders_do_not_count_and_opaque_colour_stays(tmp_path):
    images = pictures(3, channels=3)
    folder = in_folder(images, tmp_path / "x")
    in_folder(images, folder / ".thumbs")
    opaque = np.concatenate([images[0], np.full((4, 4, 1), 255, np.uint8)], 2)
    Image.fromarray(opaque, "RGBA").save(folder / "zz.png")
    found = open_images(folder)
    assert (found.n, found.shape) == (4, (3, 4, 4))
    assert torch.equal(found.read(3, 4), found.read(0, 1))
    with pytest.raises(ValueError, match="has no splits"):
        open_images(folder, split="test")


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    """Ten clusters in order: a set cut to its first rows would know the first clusters alone."""
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.arange(10.0).repeat_interleave(100)[:, None]
    reference = centres + torch.randn(1000, 2, generator=generator)
    x = centres[::5] + torch.randn(200, 2, generator=generator)
    moments = Moments.of(reference)
    found = measure(x, None, Reference(moments.mean, moments.covariance, reference, {}), draws=2)
    assert found["coverage"] > 0.9
    assert found["precision"] > 0.8


def test_samples_that_are_not_finite_have_no_level():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 samples are not finite, the first at 1"):
        to_uint8(x, (-1.0, 1.0))


def test_a_network_sees_normalised_single_precision():
    seen = []
    features = Features(lambda x: seen.append(x) or x.flatten(1), "x", 3, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    features(images)
    grey = torch.tensor([0.0, 0.2, 1.0])
    expected = torch.stack([(grey - m) / s for m, s in ((0.5, 0.5), (0.4, 0.2), (0.3, 0.1))])
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0][0, :, 0], expected)


def test_resizing_keeps_constants_and_the_size_asked_for():
    features = flat(size=8)
    out, _ = features(torch.full((2, 1, 5, 5), 51, dtype=torch.uint8))
    torch.testing.assert_close(out, torch.full((2, 64), 0.2))


@pytest.mark.parametrize(
    ("shape", "images", "message"),
    [
        ((1, 4, 4), torch.zeros(2, 1, 4, 4), "8-bit images"),
        ((1, 4, 4), torch.zeros(2, 1, 5, 4, dtype=torch.uint8), r"are of images \(1, 4, 4\); these are \(1, 5, 4\)"),
        (None, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "images of 1 channels"),  # colour never becomes grey
    ],
)
def test_images_that_a_network_was_not_made_for(shape, images, message):
    with pytest.raises(ValueError, match=message):
        flat(shape=shape)(images)


def test_the_packaged_classifier_its_card_and_its_reference_belong_together():
    network, card = load_classifier(PACKAGED / "fashion-mnist")
    reference = packaged_reference("fashion-mnist")
    assert card["weights_sha256"] == hashlib.sha256((PACKAGED / "fashion-mnist" / WEIGHTS).read_bytes()).hexdigest()
    assert card["metrics"]["test_accuracy"] > 0.92
    reference.check(open_features("fashion-mnist"), (1, 28, 28))
    assert network.head.in_features == card["dim"] == len(reference.mean)
    kept = Moments.of(reference.feats)
    # 10,000 of the 60,000 images, in half precision; the test images are at 0.0022.
    distance = frechet_distance(kept.mean, kept.covariance, reference.mean, reference.covariance)
    assert distance < 0.003


def test_training_a_classifier_repeats_resumes_and_learns(tmp_path, monkeypatch):
    """Bright against dark images: a few steps tell them apart."""
    labels = torch.arange(256) % 2
    images = (torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 80).to(torch.uint8)
    images += (labels * 150).to(torch.uint8)[:, None, None, None]
    options = {"epochs": 15, "batch_size": 64, "bf16": False}
    first = train_classifier(images, labels, **options)

    class Stop(Exception):
        pass

    def stop_after_three(*state):
        save_checkpoint(*state)
        if len(state[-1]["loss"]) == 3 * 4:
            raise Stop

    path = tmp_path / "c.safetensors"
    monkeypatch.setattr("fastsde.evaluation.classifier.save_checkpoint", stop_after_three)
    with pytest.raises(Stop):
        train_classifier(images, labels, checkpoint=path, **options)
    second = train_classifier(images, labels, checkpoint=path, resume=True, **options)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train_classifier(images, labels, checkpoint=path, resume=True, seed=1, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert accuracy(first, images, labels) > 0.95
    with pytest.raises(ValueError, match="divisible by 4"):
        train_classifier(images[:, :, :6], labels)
    with pytest.raises(ValueError, match="10 images are fewer than a batch of 128"):
        train_classifier(images[:10], labels[:10])


def test_reference_of_a_set_is_its_mean_and_covariance_and_survives_the_file(tmp_path):
    images = pictures(40, side=2)
    reference = Reference.build(open_images(in_npz(images, tmp_path / "x")), flat(), keep=20)
    x = torch.from_numpy(images.reshape(40, 4)).double() / 255
    assert len(reference.feats) == 20
    torch.testing.assert_close(reference.mean, x.mean(0), rtol=1e-6, atol=0)  # features are in single precision
    torch.testing.assert_close(reference.covariance, x.T.cov(), rtol=1e-5, atol=1e-7)
    assert float(torch.cdist(reference.feats.double(), x).amin(1).max()) < 1e-6  # rows of it, each once
    assert len(reference.feats.unique(dim=0)) == 20
    reference.save(tmp_path / "r.npz")
    again = Reference.load(tmp_path / "r.npz")
    assert torch.equal(again.mean, reference.mean)
    assert torch.equal(again.covariance, reference.covariance)
    assert torch.equal(again.feats, reference.feats)
    assert again.record == reference.record


def test_files_of_other_tools_are_read_and_ours_has_their_names(tmp_path):
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "theirs.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    reference = Reference.load(tmp_path / "theirs.npz")
    assert reference.record == {}
    assert reference.feats is None
    reference.check(flat(), (1, 1, 3))  # it says nothing: the number of features is all that can be compared
    with pytest.raises(ValueError, match="the reference has 3 features, 'pixels' has 4"):
        reference.check(flat(), (1, 2, 2))
    reference.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:
        assert np.array_equal(file["mu"], mean)
        assert np.array_equal(file["sigma"], covariance)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "mu must hold real numbers"),
        ({"mu": np.zeros(1), "sigma": np.eye(1), "record": np.array("[" * 9999)}, "a record that is not JSON"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "sigma is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "record": np.array("[1]")}, "has a record that is none"),
    ],
)
def test_damaged_references_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Reference.load(tmp_path / "r.npz")


def test_a_reference_of_another_network_or_resolution_is_refused(tmp_path):
    reference = Reference.build(open_images(in_npz(pictures(40, side=2), tmp_path / "x")), flat())
    with pytest.raises(ValueError, match=r"other features .*normalisation"):
        reference.check(Features(lambda x: x.flatten(1), "pixels", 1), (1, 2, 2))
    with pytest.raises(ValueError, match="distances between resolutions mean nothing"):
        reference.check(flat(), (1, 1, 4))
    with pytest.raises(ValueError, match="the reference has 4 features, the samples have 5"):
        measure(torch.zeros(20, 5), None, reference)
    with pytest.raises(ValueError, match="4 images are too few for 4 features"):
        Reference.build(open_images(in_npz(pictures(4, side=2), tmp_path / "y")), flat())


def test_a_reference_must_keep_enough_or_none(tmp_path):
    few = Reference.build(open_images(in_npz(pictures(40, side=2), tmp_path / "x")), flat(), keep=3)
    with pytest.raises(ValueError, match="keeps 3 features, more than 5 are needed"):
        few.check(flat(), (1, 2, 2))
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"no \.npz file of plain arrays"):
        Reference.load(tmp_path / "array.npy")


def tiny_dinov2(transformers):
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
    )
    return transformers.Dinov2Model(config), lambda out: out.last_hidden_state[:, 0]


def tiny_clip(transformers):
    config = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7, projection_dim=8
    )
    return transformers.CLIPVisionModelWithProjection(config), lambda out: out.image_embeds


@pytest.mark.parametrize("build", [tiny_dinov2, tiny_clip])
def test_dinov2_and_clip_by_transformers(build, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network, pooled = build(transformers)
    network.eval().save_pretrained(tmp_path, safe_serialization=True)
    settings = {"crop_size": {"height": 14, "width": 14}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    features = open_features(tmp_path)
    images = torch.from_numpy(pictures(3, side=14, channels=3).transpose(0, 3, 1, 2).copy())
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = pooled(network(pixel_values=(images / 255 - mean) / std))
    torch.testing.assert_close(features(images)[0], expected)
    assert features.describe()["resize"] == "bicubic, antialiased, to 14"
    assert len(features.describe()["weights_sha256"]) == 64


class Bad:
    """Runs code when it is unpickled."""

    ran: ClassVar[list] = []

    def __reduce__(self):
        return (Bad.ran.append, (1,))


class FakeInception(torch.nn.Module):
    """The interface of torch-fidelity's network: 8-bit images in, two outputs; unpickles what it is given."""

    def __init__(self, name, wanted, weights=None):
        super().__init__()
        assert wanted == ["2048", "logits_unbiased"]
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.load_state_dict(torch.load(weights, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8
        return x.flatten(1).float() @ self.weight.expand(x[0].numel(), 4), x.flatten(1).float()[:, :2]


@pytest.fixture
def fidelity(monkeypatch):
    inner = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inner.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, inner.__name__, inner)


@pytest.mark.usefixtures("fidelity")
def test_inception_from_a_local_file(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "inception.pth")
    features = inception_features(tmp_path / "inception.pth")
    images = torch.from_numpy(pictures(2, channels=3).transpose(0, 3, 1, 2).copy())
    found, logits = features(images)
    assert torch.equal(found[:, 0], images.flatten(1).float().sum(1))  # the very 8 bits
    assert logits.shape == (2, 2)
    torch.save({"weight": torch.ones(5)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the Inception of FID"):
        inception_features(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        inception_features(tmp_path / "none.pth")


@pytest.mark.usefixtures("fidelity")
def test_code_in_a_weight_file_is_not_run(tmp_path):
    torch.save({"weight": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="no file of plain weights"):
        inception_features(tmp_path / "bad.pth")
    assert Bad.ran == []


def test_inception_without_its_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="torch-fidelity's, which cannot be imported"):
        inception_features()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "no features 'nothing'"), ("fashion-mnist", "weights are for 'inception'")],
)
def test_unknown_features_are_refused(name, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_features(name, tmp_path / "x" if name == "fashion-mnist" else None)


def test_stats_then_evaluate_finds_the_same_set_at_distance_zero(tmp_path):
    data = in_idx(pictures(300, side=28), tmp_path / "data")  # noise of the packaged network's size
    assert run("stats", "--data", data, "--out", tmp_path / "r.npz").exit_code == 0
    np.savez(tmp_path / "same.npz", arr_0=pictures(300, side=28))
    result = run("evaluate", tmp_path / "same.npz", "--reference", tmp_path / "r.npz", "--json", "--bootstrap", 2)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["fid"] == pytest.approx(0, abs=1e-7)
    assert (record["precision"], record["recall"], record["coverage"]) == (1, 1, 1)
    assert record["reference"]["n"] == record["n"] == 300
    far = run("evaluate", tmp_path / "same.npz", "--json", "--bootstrap", 2)
    assert json.loads(far.stdout)["fid"] > 5  # noise is no garment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "few.npz"], "20 images are too few for 64 features: at least 130"),
        (["evaluate", "large.npz"], "are of images (1, 28, 28); these are (1, 32, 32)"),
        (["evaluate", "few.npz", "--features", "no"], "no features 'no'"),
        (["evaluate", "few.npz", "--reference", "no.npz"], "no reference at no.npz"),
        (["evaluate", "nothing"], "neither a file nor a folder"),
        (["stats", "--data", "nothing", "--out", "r.npz"], "neither a file nor a folder"),
        (["stats", "--data", "large.npz", "--features", "fashion-mnist", "--out", "."], "is a folder; name a file"),
        (["evaluate", "few.npz", "--device", "banana"], "banana"),
    ],
)
def test_bad_evaluations_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("few.npz", arr_0=pictures(20, side=28))
    np.savez("large.npz", arr_0=pictures(200, side=32))
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_train_features_writes_what_features_reads(tmp_path):
    data = in_idx(pictures(300, side=8), tmp_path / "data")
    for split in ("train", "t10k"):
        write_split(data, split, pictures(300, side=8)[:, :, :, 0], np.arange(300) % 3)
    result = run("train-features", "--data", data, "--out", tmp_path / "f", "--epochs", 1, "--classes", "a,b,c")
    assert result.exit_code == 0, result.output
    features = open_features(tmp_path / "f")
    assert features.shape == (1, 8, 8)
    found, logits = features(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert (found.shape, logits.shape) == ((2, 64), (2, 3))
    (tmp_path / "f" / WEIGHTS).write_bytes(b"no")
    with pytest.raises(ValueError, match="no whole feature network"):
        open_features(tmp_path / "f")


def test_the_network_has_the_features_it_says():
    network = Classifier(3, 7, width=4, dim=5).eval()
    found, logits = network(torch.zeros(2, 3, 8, 8))
    torch.testing.assert_close(network.head(found), logits)
    assert bool((found >= 0).all())
