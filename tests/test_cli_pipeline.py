"""`fastsde sample --pipeline`: files in, files out, records, refusals."""

import json
import wave

import diffusers
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_parts import IMAGE
from tiny_pipelines import PIPELINES

import fastsde
from fastsde.cli.main import main
from fastsde.cli.media import read_value
from fastsde.files import sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of texts and images."""
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    tiny.stable_diffusion().save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["sample", *(str(a) for a in arguments)])


def drawn(out, *arguments):
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return json.loads((out / "samples.json").read_text())


def saved(name, path):
    pipe, arguments = PIPELINES[name]()
    pipe.save_pretrained(path)
    return fastsde.diffusers.load(path)[0], arguments


def pixels(path):
    return np.asarray(Image.open(path))


def test_images_are_those_of_sample_pipeline(folder, tmp_path):
    options = ["--nfe", 6, "-n", 3, "--seed", 3, "--batch-size", 2, "--negative-prompt", "dog"]
    record = drawn(tmp_path, "--pipeline", folder, "--prompt", "a cat", "--prompt", "b", *options)
    pipe, _ = fastsde.diffusers.load(folder)
    prompts = ["a cat", "b", "a cat"]
    r = fastsde.sample_pipeline(pipe, prompts, negative_prompt="dog", nfe=6, seed=3, batch_size=2, progress=False)
    assert record["files"] == [["00000.png"], ["00001.png"], ["00002.png"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("00000.png", "00001.png", "00002.png"),
        *("grid.png", "samples.json"),
    ]
    for (name,), image in zip(record["files"], r.images, strict=True):
        assert np.array_equal(pixels(tmp_path / name), np.asarray(image))
    assert record["nfe"] == r.result.nfe.tolist() == [6, 6, 6]
    assert record["forwards"] == r.forwards
    assert record["class"] == "StableDiffusionPipeline"
    assert record["arguments"] == {"prompt": ["a cat", "b"], "negative_prompt": "dog"}
    assert len(record["weights_sha256"]) == 64
    assert record["versions"]["diffusers"] == diffusers.__version__


def test_another_class_takes_an_image_from_a_file(folder, tmp_path):
    IMAGE.save(tmp_path / "in.png")
    sets = ["--set", f"image=@{tmp_path / 'in.png'}", "--set", "strength=0.5"]
    kind = "StableDiffusionImg2ImgPipeline"
    record = drawn(
        tmp_path / "out", "--pipeline", folder, "--class", kind, "--prompt", "a cat", *sets, "--nfe", 6, "--seed", 1
    )
    pipe, _ = fastsde.diffusers.load(folder)
    pipe = getattr(diffusers, kind)(**pipe.components, requires_safety_checker=False)
    r = fastsde.sample_pipeline(pipe, "a cat", image=IMAGE, strength=0.5, nfe=6, seed=1, progress=False)
    assert np.array_equal(pixels(tmp_path / "out" / "00000.png"), np.asarray(r.images[0]))
    told = {"file": str(tmp_path / "in.png"), "sha256": sha256((tmp_path / "in.png").read_bytes())}
    assert record["arguments"] == {"prompt": "a cat", "image": told, "strength": 0.5}


def test_a_video_is_written_with_its_rate(tmp_path):
    pipe, _ = saved("TextToVideoSDPipeline", tmp_path / "video")  # whose frames are an array
    sets = ["--set", "height=16", "--set", "width=16", "--set", "num_frames=3"]
    options = ["--prompt", "a", "--nfe", 6, "-n", 2, "--seed", 0, "--fps", 5]
    record = drawn(tmp_path / "out", "--pipeline", tmp_path / "video", *sets, *options)
    assert record["files"] == [["00000.webp"], ["00001.webp"]]
    with Image.open(tmp_path / "out" / "00001.webp") as video:
        video.load()
        assert (video.n_frames, video.info["duration"]) == (3, 200)
    size = {"height": 16, "width": 16, "num_frames": 3}
    r = fastsde.sample_pipeline(pipe, "a", n=2, **size, nfe=6, seed=0, progress=False)
    sheet = pixels(tmp_path / "out" / "grid.png")
    scale = sheet.shape[0] // (16 + 4)
    for k, output in enumerate(r.outputs):
        left = 2 + k * 18
        first = sheet[2 * scale : 18 * scale : scale, left * scale : (left + 16) * scale : scale]
        assert np.array_equal(first, np.round(output.frames[0][0] * 255).astype(np.uint8))


def test_the_frames_of_a_folder_belong_together_also_where_there_are_as_many_as_samples(tmp_path):
    pipe, arguments = saved("AnimateDiffVideoToVideoPipeline", tmp_path / "video")
    frames = arguments["video"]
    (tmp_path / "in").mkdir()
    for k, frame in enumerate(frames):
        frame.save(tmp_path / "in" / f"{k}.png")
    sets = [f"video=@{tmp_path / 'in'}", *(f"{k}={v}" for k, v in arguments.items() if k not in ("video", "prompt"))]
    options = ["--prompt", arguments["prompt"], "--nfe", 4, "-n", len(frames), "--seed", 0]
    record = drawn(
        tmp_path / "out", "--pipeline", tmp_path / "video", *options, *(p for s in sets for p in ("--set", s))
    )
    assert len(record["arguments"]["video"]) == len(frames) == record["n"]
    alone = fastsde.sample_pipeline(pipe, **arguments, nfe=4, seed=0, index=[1], progress=False)
    with Image.open(tmp_path / "out" / "00001.webp") as video:
        assert video.n_frames == len(alone.frames[0])


def test_sound_is_written_in_16_bits_at_its_rate(tmp_path):
    pipe, arguments = saved("AceStepPipeline", tmp_path / "sound")
    sets = [
        part for key, value in arguments.items() if key != "prompt" for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    options = ["--prompt", arguments["prompt"], "--nfe", 4, "--seed", 0]
    record = drawn(tmp_path / "out", "--pipeline", tmp_path / "sound", *sets, *options)
    assert record["files"] == [["00000.wav"]]
    r = fastsde.sample_pipeline(pipe, **arguments, nfe=4, seed=0, progress=False)
    sound = r.outputs[0].audios[0].numpy()
    with wave.open(str(tmp_path / "out" / "00000.wav")) as file:
        assert file.getframerate() == pipe.vae.config.sampling_rate
        assert (file.getnchannels(), file.getnframes()) == sound.shape
        levels = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, len(sound)).T
    # Half a level of 16 bits, and the rounding of float32.
    assert np.abs(levels / 32767 - sound.clip(-1, 1)).max() <= 0.51 / 32767


def test_arrays_and_a_second_run_in_the_same_folder(folder, tmp_path):
    common = ["--pipeline", folder, "--prompt", "a", "--nfe", 4, "--seed", 2]
    drawn(tmp_path, *common, "-n", 3)
    (tmp_path / "00009.png").write_text("of the user")
    np.save(tmp_path / "start.npy", torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).numpy())
    sets = ["--set", "output_type=latent", "--set", f"latents=@{tmp_path / 'start.npy'}"]
    record = drawn(tmp_path, *common, *sets)
    assert record["files"] == [["samples.npz"]] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00009.png", "samples.json", "samples.npz", "start.npy"]
    pipe, _ = fastsde.diffusers.load(folder)
    start = torch.from_numpy(np.load(tmp_path / "start.npy"))
    r = fastsde.sample_pipeline(pipe, "a", latents=start, output_type="latent", nfe=4, seed=2, progress=False)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["images"], r.images.numpy())


def test_classes_and_no_prompt_at_all(tmp_path):
    tiny.dit_pipeline().save_pretrained(tmp_path / "dit")
    tiny.ddpm().save_pretrained(tmp_path / "ddpm")
    record = drawn(tmp_path / "a", "--pipeline", tmp_path / "dit", "--set", "class_labels=[3, 7, 7]", "--nfe", 4)
    assert record["files"] == [["00000.png"], ["00001.png"], ["00002.png"]]
    other = drawn(tmp_path / "b", "--pipeline", tmp_path / "dit", "--set", "class_labels=[5]", "--nfe", 4)
    assert other["n"] == 1
    assert not np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "b" / "00000.png"))
    record = drawn(tmp_path / "c", "--pipeline", tmp_path / "ddpm", "-n", 2, "--solver", "DDIM", "--steps", 3)
    assert record["solver"] == repr(fastsde.DDIM(steps=3))
    assert record["nfe"] == [4, 4]  # and one to denoise


def test_json_on_standard_output_is_the_record(folder, tmp_path):
    result = run("--pipeline", folder, "--prompt", "a", "--set", "num_inference_steps=3", "--json", "--out", tmp_path)
    assert json.loads(result.stdout) == json.loads((tmp_path / "samples.json").read_text())
    assert json.loads(result.stdout)["nfe"] == [8]  # four evaluations, as in the loop of PNDM, guided


def test_an_unknown_argument_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    result = run("--pipeline", tmp_path, "--prompt", "a", "--set", "image=1", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "StableDiffusionPipeline takes no image; its call takes prompt, height, width" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "height"], "--set must be KEY=VALUE"),
        (["--set", "height=8", "--set", "height=16"], "height is given twice"),
        (["--set", "prompt=b"], "prompt is given twice: --set prompt and --prompt"),
        (["--set", "generator=1"], "--seed says the noise"),
        (["--set", "batch_size=2"], "-n says how many"),
        (["--set", "controller=2"], "this is fastsde's, not the pipeline's"),
        (["--set", "latents=@none.npy"], "--set latents: no file none.npy"),
        (["--class", "Magic"], "--class Magic: diffusers"),
        (["--class", "FluxPipeline"], "needs text_encoder_2, tokenizer_2, transformer, which"),
        (["--model", "fashion-mnist"], "give either --model or --pipeline"),
        (
            ["--shard-size", "2", "--grid", "karras"],
            "without --grid, --shard-size. Jobs of shards are for --model",
        ),
        (["--solver", "DDIM"], "--solver DDIM walks a grid: say how many steps"),
        (["--solver", "AnnealedLangevin", "--steps", "3"], "takes no number of steps"),
        (["--steps", "3", "--nfe", "3"], "give either --steps, which fixes the grid, or --nfe"),
        (["--rtol", "0"], "rtol must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_are_refused_by_name(folder, tmp_path, monkeypatch, arguments, message):
    def called(*args, **kwargs):
        raise AssertionError("the network was called")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", called)
    result = run("--pipeline", folder, "--prompt", "a", *arguments, "--out", tmp_path)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "samples.json").exists()


@pytest.mark.parametrize(("calls", "finished"), [(0, 0), (5, 1)])
def test_ctrl_c_keeps_what_is_finished(folder, tmp_path, monkeypatch, calls, finished):
    forward, made = diffusers.UNet2DConditionModel.forward, []

    def interrupted(*args, **kwargs):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", interrupted)
    # Both halves of guidance are one forward: three for a sample.
    options = ["--pipeline", folder, "--prompt", "a", "-n", 3, "--nfe", 6, "--batch-size", 1, "--out", tmp_path]
    result = run(*options)
    assert result.exit_code == 1
    assert "interrupted" in result.output
    assert len(list(tmp_path.glob("0*.png"))) == finished
    if finished:
        record = json.loads((tmp_path / "samples.json").read_text())
        assert record["status"] == ["SUCCESS", "PENDING", "PENDING"]
    else:
        assert "nothing was written" in result.output


def test_a_failing_decoder_leaves_the_latents(folder, tmp_path, monkeypatch):
    options = ["--pipeline", folder, "--prompt", "a", "-n", 2, "--nfe", 4]
    drawn(tmp_path, *options, "--set", "output_type=latent")
    with np.load(tmp_path / "samples.npz") as arrays:
        latents = arrays["images"]

    def fail(*args, **kwargs):
        raise RuntimeError("no memory to decode")

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", fail)
    result = run(*options, "--out", tmp_path)
    assert result.exit_code == 1
    assert "no memory to decode" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latents.npz", "samples.json"]
    with np.load(tmp_path / "latents.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], latents)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["errors"].keys() == {"0", "1"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512", 512),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("a cat", "a cat"),
        ("NaN", "NaN"),
        ('"@home"', "@home"),
        ("", ""),
    ],
)
def test_values_are_json_or_text(text, value):
    assert read_value(text) == (value, value)


def test_files_come_in_as_what_they_hold(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", tensor.numpy())
    np.savez(tmp_path / "a.npz", tensor.numpy())
    safetensors.torch.save_file({"x": tensor}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.npz", "a.safetensors"):
        assert torch.equal(read_value(f"@{tmp_path / name}")[0], tensor)
    (tmp_path / "a.txt").write_text("ein Käfer\n", encoding="utf-8")
    assert read_value(f"@{tmp_path / 'a.txt'}")[0] == "ein Käfer"

    colours = [Image.new("RGB", (4, 2), colour) for colour in ("red", "lime", "blue")]
    first, *rest = colours
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, lossless=True)
    (tmp_path / "frames").mkdir()
    for k, image in enumerate(colours):
        image.save(tmp_path / "frames" / f"{k}.png")
    for name in ("a.gif", "a.webp", "frames"):
        frames = read_value(f"@{tmp_path / name}")[0]
        assert [np.array_equal(a, b) for a, b in zip(frames, colours, strict=True)] == [True] * 3
    assert [told["file"] for told in read_value(f"@{tmp_path / 'frames'}")[1]] == [
        str(tmp_path / "frames" / f"{k}.png") for k in range(3)
    ]

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    first.save(tmp_path / "turned.png", exif=exif)
    Image.new("L", (4, 2), 9).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 2), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    assert read_value(f"@{tmp_path / 'turned.png'}")[0].size == (2, 4)
    assert read_value(f"@{tmp_path / 'grey.png'}")[0].getpixel((0, 0)) == (9, 9, 9)
    assert read_value(f"@{tmp_path / 'clear.png'}")[0].mode == "RGBA"


def test_files_that_cannot_be_read_are_named(tmp_path):
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=1, b=2)
    (tmp_path / "no.png").write_text("no image")
    (tmp_path / "a.mp4").write_text("")
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "pickle.npy": "cannot be read",
        "two.npz": "must hold one array; it holds a, b",
        "no.png": "cannot be read",
        "a.mp4": "is none of the files that are read here",
        "deep.png": "it is not 8 bits a channel",
        "empty": "holds no images",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read_value(f"@{tmp_path / name}")
