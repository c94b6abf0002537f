"""The HTTP interface: the images of `sample`, errors in sentences, and requests that leave when their client does."""

import base64
import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import Image
from tiny_pipelines import PIPELINES

import fastsde
from fastsde import ScoreModel
from fastsde.serve import Limits, ModelService, PipelineService, TokenService, create_app
from fastsde.serve.service import picture_of
from fastsde.tokens import ExactTokens

uvicorn = pytest.importorskip("uvicorn")
VP = fastsde.VPSDE()
EVENT = (1, 4, 6)
LABELS = ("dark", "light")


def network(x, t, class_labels):
    """The exact score of two Gaussians, one for each class; also of their number 2, between them."""
    mean = torch.tensor([-0.5, 0.5, 0.0])[class_labels].reshape(-1, 1, 1, 1).to(x)
    level = VP.level(t.double())
    alpha, sigma = (v.to(x).reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    return (alpha * mean - x) / (0.04 * alpha**2 + sigma**2)


def images(x):
    return ((x + 1) / 2).clamp(0, 1)


def service(model=None, limits=None, **options):
    model = model or ScoreModel(network, VP, event_shape=EVENT, default_cond={"class_labels": torch.tensor(2)})
    return ModelService("two-gaussians", model, images, limits or Limits(), {"made_by": "tests"}, LABELS, **options)


@pytest.fixture
def client():
    with TestClient(create_app(service(nfe=6))) as client:
        yield client


class Gate(torch.nn.Module):
    """A network that waits while it is shut."""

    def __init__(self):
        super().__init__()
        self.open, self.called, self.calls = threading.Event(), threading.Event(), 0

    def forward(self, x, t):
        self.calls += 1
        self.called.set()
        assert self.open.wait(20)
        return -x


def gated(**options):
    gate = Gate()
    return gate, service(ScoreModel(gate, VP, event_shape=EVENT), **options)


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def expected(n, seed, label=2, **how):
    model = ScoreModel(network, VP, event_shape=EVENT)
    drawn = fastsde.sample(model, n=n, seed=seed, cond={"class_labels": torch.full((n,), label)}, **how)
    return drawn, (images(drawn.samples[:, 0].double()) * 255).round().numpy().astype(np.uint8)


def events(lines):
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(
    ("asked", "how", "label"),
    [
        ({"prompt": "light", "nfe": 9}, {"nfe": 9}, 1),
        ({"prompt": "0", "rtol": 0.1}, {"rtol": 0.1}, 0),
        ({"eta": 1.0, "nfe": 7, "size": "6x4"}, {"solver": fastsde.ExponentialPC(eta=1.0), "nfe": 7}, 2),
        ({"solver": "ExtrapolatedEM", "rtol": 0.5}, {"solver": fastsde.ExtrapolatedEM(), "rtol": 0.5}, 2),
        ({"response_format": "b64_json", "model": "two-gaussians", "quality": "hd"}, {"nfe": 6}, 2),
    ],
    ids=["nfe", "rtol", "eta", "solver", "the server's own"],
)
def test_images_are_those_of_sample_and_say_how_they_were_made(client, asked, how, label):
    answer = client.post("/v1/images/generations", json={"n": 3, "seed": 5, **asked})
    assert answer.status_code == 200
    drawn, levels = expected(3, 5, label, **how)
    made = answer.json()
    for k, picture in enumerate(made["data"]):
        # A batch of another size may round a level the other way.
        assert np.abs(pixels(picture["b64_json"]).astype(int) - levels[k]).max() <= 1
        told = json.loads(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).text["fastsde"])
        assert (told["seed"], told["index"], told["nfe"]) == (5, k, int(drawn.nfe[k]))
        assert told["made_by"] == "tests"
    assert made["fastsde"]["nfe"] == drawn.nfe.tolist()
    assert made["fastsde"]["status"] == ["SUCCESS"] * 3


def test_a_seed_is_drawn_and_told(client):
    one = client.post("/v1/images/generations", json={}).json()
    again = client.post("/v1/images/generations", json={"seed": one["fastsde"]["seed"]}).json()
    assert one["data"][0]["b64_json"] != client.post("/v1/images/generations", json={}).json()["data"][0]["b64_json"]
    assert (pixels(one["data"][0]["b64_json"]) == pixels(again["data"][0]["b64_json"])).all()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"n": 0}, "n: "),
        ({"n": 17}, "n must be at most 16"),
        ({"nfe": 500}, "nfe must be at most 250"),
        ({"rtol": 1e-9}, "rtol must be at least 0.005"),
        ({"nfe": 5, "rtol": 0.1}, "not both"),
        ({"prompt": "house"}, "prompt must be a class of two-gaussians: dark, light; got 'house'"),
        ({"size": "9x9"}, "size must be 6x4"),
        ({"size": "wide"}, "WIDTHxHEIGHT"),
        ({"solver": "os.system"}, "solver must be one of"),
        ({"solver": "DDIM", "eta": 0.5}, "number of steps"),
        ({"response_format": "url"}, "response_format"),
        ({"guidance_scale": 3.0}, "takes no guidance_scale"),
        ({"image": "zz"}, "image must be a PNG"),
        ({"mask": "zz"}, "takes no mask"),
        ({"unknown": 1}, "unknown"),
        ([1], "the body"),
    ],
    ids=range(16),
)
def test_bad_requests_get_the_sentence(client, asked, says):
    for path in ("/v1/images/generations", "/v1/samples"):
        answer = client.post(path, json=asked)
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]


def test_progress_comes_as_events(client):
    with client.stream("POST", "/v1/samples", json={"n": 2, "seed": 3, "nfe": 12}) as answer:
        told = list(events(answer.iter_lines()))
    assert told[0][0] == "queued"
    assert told[0][1]["seed"] == 3
    name, done = told[-1]
    assert name == "done"
    drawn, levels = expected(2, 3, nfe=12)
    assert done["nfe"] == drawn.nfe.tolist()
    assert np.abs(pixels(done["images"][1]).astype(int) - levels[1]).max() <= 1
    steps = [data for name, data in told if name == "progress"]
    assert steps
    assert all(step["index"] == [0, 1] and len(step["images"]) == 2 for step in steps)
    assert [step["nfe"][0] for step in steps] == sorted({step["nfe"][0] for step in steps})


def test_a_picture_is_edited_inside_its_mask_only(client):
    generator = np.random.default_rng(0)
    known, mask = generator.integers(90, 160, (4, 6), np.uint8), np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 255

    def sent(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    asked = {"image": sent(known), "mask": sent(mask), "n": 2, "seed": 1, "nfe": 12}
    answer = client.post("/v1/images/generations", json=asked)
    for picture in answer.json()["data"]:
        made = pixels(picture["b64_json"])
        assert np.abs(made[mask == 0].astype(int) - known[mask == 0]).max() <= 1
        assert (made[mask > 0] != known[mask > 0]).any()
    asked = {"image": sent(known), "strength": 0.05, "seed": 1, "nfe": 12}
    close = pixels(client.post("/v1/images/generations", json=asked).json()["data"][0]["b64_json"])
    assert 0 < np.abs(close.astype(int) - known).mean() < 25
    asked = {"image": sent(known), "mask": sent(np.full((4, 6), 255, np.uint8))}
    assert "mask must have white parts" in client.post("/v1/images/generations", json=asked).json()["error"]["message"]


def test_pictures_are_read_as_they_are_seen():
    def seen(picture, **options):
        file = io.BytesIO()
        picture.save(file, options.pop("format", "PNG"), **options)
        return np.asarray(picture_of("image", base64.b64encode(file.getvalue()).decode()).convert("L"))

    deep = Image.fromarray(np.linspace(0, 65535, 6, dtype=np.uint16).reshape(1, 6))
    assert np.abs(seen(deep)[0].astype(int) - np.linspace(0, 255, 6)).max() <= 1
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    half = Image.fromarray(np.repeat([[0, 255]], 8, 0).astype(np.uint8).repeat(4, 1))
    assert seen(half, format="JPEG", exif=turned)[0].mean() < 10
    assert (seen(Image.new("RGBA", (2, 2), (0, 0, 0, 0))) == 255).all()
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((0, 0), (0, 0, 0, 0))
    file = io.BytesIO()
    mask.save(file, "PNG")
    drawn = picture_of("mask", base64.b64encode(file.getvalue()).decode(), mask=True)
    assert np.asarray(drawn.convert("L")).tolist() == [[255, 0]]


def test_what_is_not_used_is_not_sent_back(client):
    for value in ("x" * 1000, ["a"], {"b": 1}):
        assert client.post("/v1/images/generations", json={"quality": value}).status_code == 400
    made = client.post("/v1/images/generations", json={"quality": "hd", "user": "me"}).json()
    assert not {"quality", "user"} & made["fastsde"]["record"].keys()
    many = {f"{k:x}": 0 for k in range(10_000)}
    assert "fields of the description" in client.post("/v1/images/generations", json=many).text
    text = {"content": "{}", "headers": {"Content-Type": "text/plain"}}
    assert "Content-Type" in client.post("/v1/images/generations", **text).text


def test_adaptive_solvers_end_at_the_most_calls():
    with TestClient(create_app(service(limits=Limits(nfe=40)))) as client:
        made = client.post("/v1/images/generations", json={"solver": "ExtrapolatedEM", "rtol": 0.005}).json()
    assert made["fastsde"]["status"] == ["MAX_NFE"]
    assert made["fastsde"]["nfe"][0] <= 40


def test_a_decoder_that_fails_is_told():
    def broken(x):
        raise ArithmeticError("no picture today")

    model = ScoreModel(slowly, VP, event_shape=EVENT)
    app = create_app(ModelService("broken", model, broken, Limits(), {}, nfe=3, decoded=True))
    with TestClient(app) as client, client.stream("POST", "/v1/samples", json={}) as answer:
        assert list(events(answer.iter_lines()))[-1] == ("failed", {"message": "no picture today"})


def test_a_token_is_asked_for():
    served = service(nfe=4)
    with TestClient(create_app(served, token="secret")) as client:
        for path in ("/v1/images/generations", "/v1/samples"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
                answer = client.post(path, json={}, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == client.get("/v1/about").status_code == 401
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        right = {"Authorization": "Bearer secret"}
        assert client.post("/v1/images/generations", json={}, headers=right).status_code == 200
    for token in ("", "  ", "geheim\u00e4"):
        with pytest.raises(ValueError, match="token must be"):
            create_app(served, token=token)


def test_other_hosts_and_long_bodies_are_refused():
    with TestClient(create_app(service(limits=Limits(body=1000)), hosts=["localhost"])) as client:
        assert client.get("/healthz").status_code == 400
        here = {"Host": "localhost"}
        assert client.get("/healthz", headers=here).status_code == 200
        for content in (b" " * 1001, (part for part in [b" " * 600] * 2)):
            answer = client.post(
                "/v1/images/generations", content=content, headers={**here, "Content-Type": "application/json"}
            )
            assert answer.status_code == 413


def test_a_full_queue_and_a_late_answer():
    gate, served = gated(limits=Limits(seconds=0.5), batch_size=1, max_waiting=2, nfe=3)
    with TestClient(create_app(served)) as client:
        first = served.sampler.submit()
        assert gate.called.wait(20)
        waiting = [served.sampler.submit() for _ in range(2)]
        answer = client.post("/v1/images/generations", json={})
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert "no room for 1 more" in answer.json()["error"]["message"]
        waiting[0].cancel()
        assert client.post("/v1/images/generations", json={}).status_code == 504
        gate.open.set()
        for request in (first, waiting[1]):
            request.result(20)
        until(lambda: client.post("/v1/images/generations", json={}).status_code == 200)  # 0.5 s may be short
    ended = served.sampler.stats().requests
    assert ended["finished"] >= 3
    assert ended["cancelled"] >= 2


@contextlib.contextmanager
def listening(served):
    """The address of a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(create_app(served), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(20)


def slowly(x, t):
    """A network whose 250 calls take more than a second."""
    time.sleep(0.005)
    return -x


def until(condition):
    """Waits for it, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_cancelling_by_its_id():
    served = service(ScoreModel(slowly, VP, event_shape=EVENT))
    with listening(served) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", timeout=20) as client:
        assert client.delete("/v1/samples/unknown").status_code == 404
        with client.stream("POST", "/v1/samples", json={"nfe": 250}) as answer:
            told = events(answer.iter_lines())
            name, data = next(told)
            assert name == "queued"
            assert client.delete(f"/v1/samples/{data['id']}").status_code == 204
            assert list(told)[-1] == ("failed", {"message": "cancelled."})
        assert client.delete(f"/v1/samples/{data['id']}").status_code == 404


def test_a_client_that_goes_away_cancels_its_request():
    served = service(ScoreModel(slowly, VP, event_shape=EVENT))
    with listening(served) as address:
        for count, path in enumerate(("/v1/images/generations", "/v1/samples"), 1):
            body = b'{"nfe": 250}'
            head = (
                f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            with socket.create_connection(address) as client:
                client.sendall(f"{head}\r\n\r\n".encode() + body)
                until(lambda: served.sampler.stats().running == 1)
            until(lambda count=count: served.sampler.stats().requests == {"cancelled": count})


def test_metrics_are_those_of_the_sampler(client):
    for nfe in (4, 4, 9):
        client.post("/v1/images/generations", json={"n": 2, "nfe": nfe})
    stats = client.app.state.service.sampler.stats()
    text = client.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found["fastsde_calls_count"]) == stats.finished == 6
    assert float(found['fastsde_calls_bucket{le="4"}']) == 4
    assert float(found["fastsde_calls_sum"]) == 4 * 4 + 2 * 9
    assert float(found["fastsde_rows_total"]) == stats.rows
    assert float(found['fastsde_requests_total{outcome="finished"}']) == 3
    assert client.get("/v1/about").json()["nfe"] == {"4": 4, "9": 2}


def test_pipelines_take_prompts():
    pipe, _ = PIPELINES["StableDiffusionPipeline"]()
    alone = fastsde.sample_pipeline(pipe, "a red cat", seed=2, nfe=8, progress=False, height=32, width=32)
    with TestClient(create_app(PipelineService("tiny", pipe, Limits(), {}, batch_size=2))) as client:
        asked = {"prompt": "a red cat", "seed": 2, "nfe": 8, "size": "32x32"}
        answer = client.post("/v1/images/generations", json=asked)
        assert answer.status_code == 200
        assert np.abs(pixels(answer.json()["data"][0]["b64_json"]).astype(int) - np.asarray(alone.images[0])).max() <= 1
        assert "at most" in client.post("/v1/images/generations", json={**asked, "size": "9000x9000"}).text


def test_tokens_are_drawn_as_images():
    joint = torch.rand(3, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ExactTokens(joint / joint.sum())

    def decoded(tokens):
        return tokens.double().reshape(-1, 1, 2, 2) / 2

    with TestClient(create_app(TokenService("joint", model, decoded, Limits(), {}))) as client:
        answer = client.post("/v1/images/generations", json={"n": 3, "seed": 4, "nfe": 2}).json()
        drawn = fastsde.sample(model, n=3, seed=4, nfe=2).samples
        for picture, tokens in zip(answer["data"], drawn, strict=True):
            assert (pixels(picture["b64_json"]) == (tokens.reshape(2, 2) * 127.5).round().numpy()).all()
        assert "takes no solver" in client.post("/v1/images/generations", json={"solver": "DDIM"}).text


def test_models_without_images_are_refused():
    flat = ScoreModel(slowly, VP, event_shape=(3,))
    with pytest.raises(ValueError, match="models of images"):
        ModelService("flat", flat, images, Limits(), {})


def test_the_client_of_openai_draws():
    openai = pytest.importorskip("openai")
    with listening(service()) as (host, port):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["two-gaussians"]
        answer = client.images.generate(prompt="light", n=2, size="6x4", extra_body={"seed": 5, "nfe": 9})
        _, levels = expected(2, 5, 1, nfe=9)
        assert np.abs(pixels(answer.data[1].b64_json).astype(int) - levels[1]).max() <= 1
        with pytest.raises(openai.BadRequestError, match="prompt must be a class"):
            client.images.generate(prompt="house")
        with pytest.raises(openai.NotFoundError):
            client.images.generate(prompt="", model="another")


def test_the_description_of_the_interface_holds():
    schemathesis = pytest.importorskip("schemathesis")
    # What is more than the description says: a label that there is not, a size that the model has not.
    accepted = schemathesis.checks.load_all_checks() or schemathesis.checks.CHECKS.get_by_names(
        ["positive_data_acceptance"]
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service(nfe=3, limits=Limits(n=3))))
    tried = 0
    for operation in schema.get_all_operations():

        @settings(max_examples=15, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def holds(case):
            nonlocal tried
            case.call_and_validate(excluded_checks=accepted)
            tried += 1

        holds()
    assert tried > 30


def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, "-m", "fastsde", "serve", "fashion-mnist", "--port", "0", "--nfe", "3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        said = server.stderr.readline()
        address = re.search(r"http://127.0.0.1:\d+", said)[0]
        until(lambda: _answers(address))
        answer = httpx.post(f"{address}/v1/images/generations", json={"prompt": "bag", "seed": 1}, timeout=60).json()
        assert answer["fastsde"]["nfe"] == [3]
        assert re.fullmatch("[0-9a-f]{64}", answer["fastsde"]["record"]["weights_sha256"])
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert "Traceback" not in server.stderr.read()
    taken = subprocess.run([*command[:-4], "--host", "256.0.0.1"], capture_output=True, text=True, check=False)
    assert taken.returncode == 1
    assert "cannot listen at 256.0.0.1" in taken.stderr


def _answers(address):
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False
