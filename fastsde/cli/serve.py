"""`fastsde serve`."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor

from fastsde.cli import options as option
from fastsde.cli.models import open_model
from fastsde.cli.output import versions
from fastsde.cli.tokens import is_token_model
from fastsde.tokens import load_tokens

if TYPE_CHECKING:
    from fastsde.serve import Limits, Service

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAMES = (*_LOOPBACK, "[::1]", "[")
"""By which clients may call a server there; older checks of hosts cut "[::1]:8000" at the first colon."""


@click.command()
@click.argument("model")
@click.option("--pipeline", is_flag=True, help="MODEL is a pipeline of diffusers, which runs in its own loop.")
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 for all of this machine's.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="Port to listen at; 0 for any free one.")
@click.option("--token", envvar="FASTSDE_TOKEN", help="What clients must send as a bearer token.", show_default="none")
@click.option("--rtol", type=float, help="Of requests that say neither rtol nor nfe.", show_default="0.05")
@click.option("--nfe", type=click.IntRange(1), help="Network calls, rather than a tolerance.", show_default="none")
@click.option("--batch-size", type=click.IntRange(1, 1 << 20), show_default="64; of a pipeline 8", help="Slots.")
@click.option("--max-waiting", default=256, type=click.IntRange(1), help="Samples that may wait for a slot.")
@click.option("--max-n", default=16, type=click.IntRange(1), help="Samples of a request.")
@click.option("--max-nfe", default=250, type=click.IntRange(1), help="Network calls of a sample.")
@click.option("--min-rtol", default=0.005, type=click.FloatRange(0, min_open=True), help="The smallest tolerance.")
@click.option("--timeout", default=300.0, type=click.FloatRange(0, min_open=True), help="Seconds of a request.")
@option.dtype
@option.device
def serve(host: str, port: int, token: str | None, **asked: Any) -> None:
    """Serve MODEL over HTTP: an interface like OpenAI's for images, samples with progress, metrics, and a page.

    MODEL is a packaged model, a folder of `fastsde train`, or a model or pipeline of diffusers. All requests share one
    batch: a new one takes the next free slot. With the same seed a request gives the same images, whatever else runs.

    \b
      GET  /                       a page to draw with
      POST /v1/images/generations  prompt, n, size, seed; also rtol, nfe, solver, eta
      POST /v1/samples             the same, with progress as server-sent events
      GET  /docs, /metrics, /healthz, /v1/models

    A full queue answers 429. Nothing that a request says is a path or is unpickled. Without --token anybody who
    reaches the port may draw.

    \b
    Examples:
      fastsde serve fashion-mnist
      fastsde serve google/ddpm-cifar10-32 --nfe 12 --device cuda
      FASTSDE_TOKEN=secret fastsde serve stabilityai/stable-diffusion-2-1 --pipeline --host 0.0.0.0 --dtype float16
      curl localhost:8000/v1/images/generations --json '{"prompt": "sneaker", "n": 2, "seed": 1, "nfe": 8}'
    """
    try:
        import uvicorn

        from fastsde.serve import Limits, create_app
    except ImportError as error:
        raise ImportError(
            f"fastsde serve needs FastAPI and uvicorn: pip install 'fastsde[serve]' ({error})."
        ) from error
    if token is not None and not token.strip():
        raise ValueError("--token is empty; leave it out for no token.")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise click.ClickException(f"cannot listen at {host}:{port}: {error.strerror or error}.") from error
    limits = Limits(asked["max_n"], asked["max_nfe"], asked["min_rtol"], seconds=asked["timeout"])
    options = {name: asked[name] for name in ("rtol", "nfe", "max_waiting")}
    options["batch_size"] = asked["batch_size"] or (8 if asked["pipeline"] else 64)
    service = _service(asked["model"], asked["pipeline"], limits, asked["dtype"], asked["device"], options)
    if host not in _LOOPBACK and token is None:
        click.echo(f"Warning: anybody who reaches {host}:{port} may draw; --token asks for a token.", err=True)
    app = create_app(service, token=token, hosts=_NAMES if host in _LOOPBACK else ("*",))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=512)
    )
    name = f"[{host}]" if ":" in host else "localhost" if host == "0.0.0.0" else host
    click.echo(f"{service.name} at http://{name}:{listener.getsockname()[1]}/ (Ctrl-C ends it)", err=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _service(
    name: str, pipeline: bool, limits: Limits, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> Service:
    """What stands behind the server."""
    from fastsde.serve import ModelService, PipelineService, TokenService

    shown = Path(name).name if Path(name).exists() else name  # paths are nobody's business
    record: dict[str, Any] = {"versions": versions()}
    if pipeline:
        from fastsde.diffusers import load

        pipe, _ = load(name, dtype=dtype)
        if not hasattr(pipe, "components"):
            raise ValueError(f"{name} is a network, not a pipeline; leave --pipeline out.")
        pipe.to(device)
        return PipelineService(shown, pipe, limits, record, **options)
    if is_token_model(name):
        folder = load_tokens(Path(name), device)
        classes = [str(k) for k in range(folder.classes)]

        def decoded(tokens: Tensor) -> Tensor:
            return (folder.images(tokens) + 1) / 2

        record |= {"weights_sha256": folder.weights_sha256}
        return TokenService(shown, folder.model, decoded, limits, record, classes, **options)
    opened = open_model(name, device, dtype)
    latent = opened.autoencoder is not None
    record |= {key: value for key, value in opened.source.items() if key != "source"}
    names = opened.names or [str(k) for k in range(opened.classes)]
    return ModelService(shown, opened.model, opened.images, limits, record, names, decoded=latent, **options)
