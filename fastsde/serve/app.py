"""The HTTP application: images in the shape of OpenAI's interface, samples with progress, metrics and a page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import io
import json
import re
import reprlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import fastapi
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

import fastsde
from fastsde.job import EngineState
from fastsde.lane import Request
from fastsde.result import Status
from fastsde.serve.metrics import SamplerCollector
from fastsde.serve.service import Generation, Service

_BEARER = HTTPBearer(auto_error=False)
_PAGE = Path(__file__).parent / "page"
_ALIVE = 15.0
"""Seconds after which a stream without events says that it lives."""
_SHOWN = 0.1
"""Seconds between two events of progress of a request, at least."""
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": Generation.model_json_schema()}}}}


async def _read(http: fastapi.Request) -> Generation:
    """The body of a request, read in a thread: a long one would keep all other clients waiting."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(400, "the body must be JSON, with Content-Type: application/json.")
    try:
        body = await http.body()
    except ClientDisconnect as error:
        raise HTTPException(400, "the body did not come.") from error
    return await anyio.to_thread.run_sync(partial(_parsed, body))


def _parsed(body: bytes) -> Generation:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON.") from error
    if not isinstance(given, dict) or len(given) > 2 * len(Generation.model_fields):
        raise HTTPException(400, "the body must be a JSON object with the fields of the description at /docs.")
    try:
        return Generation.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


class Picture(BaseModel):
    """An image."""

    b64_json: str


class Cost(BaseModel):
    """What the samples of a request cost, and what they were made with."""

    seed: int
    nfe: list[int]
    status: list[str]
    seconds: float
    record: dict[str, Any]


class Generated(BaseModel):
    """Images in the shape of OpenAI's interface, and their cost."""

    created: int
    data: list[Picture]
    fastsde: Cost


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failed(BaseModel):
    """An error in the shape of OpenAI's interface."""

    error: Problem


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Failed} for code in (400, 401, 404, 405, 413, 422, 429, 500, 503, 504)
}


def create_app(service: Service, *, token: str | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application of a served model, for any ASGI server.

    Args:
        service: what is served. It is closed when the application ends.
        token: what clients must send as `Authorization: Bearer TOKEN`; None for anybody.
        hosts: names by which clients may call this server. A server on the loopback should name these alone, so that
            no page of another site reaches it by a name that leads here.
    """
    if token is not None and not (token.strip() and token.isascii()):
        raise ValueError("token must be a text of ASCII characters, and not empty.")
    seconds = service.limits.seconds

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(lambda: service.sampler.close(cancel=True))

    app = FastAPI(title="fastsde", version=fastsde.__version__, lifespan=lifespan, responses=_ERRORS)
    app.state.service = service
    registry = CollectorRegistry()
    registry.register(SamplerCollector(service.sampler))
    took = Histogram("fastsde_http_seconds", "Seconds that requests for samples took.", ["outcome"], registry=registry)

    async def authorized(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        sent = "" if given is None else given.credentials
        if not hmac.compare_digest(sent.encode(), str(token).encode()):
            wants = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "this server wants its token: Authorization: Bearer TOKEN.", wants)

    guarded = [] if token is None else [Depends(authorized)]

    _add_images(app, service, took, guarded)
    _add_samples(app, service, took, guarded)
    _add_information(app, service, registry, guarded)
    for path, file in {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}.items():
        app.add_api_route(path, _sending(_PAGE / file), include_in_schema=False)

    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(Exception, _broken)
    most = service.limits.body if service.edits else min(service.limits.body, 1 << 16)  # without pictures
    app.add_middleware(_Bounded, most=most, seconds=seconds + 30)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


def _add_images(app: FastAPI, service: Service, took: Histogram, guarded: Sequence[Any]) -> None:
    """The route of OpenAI's interface, which answers once."""
    seconds = service.limits.seconds

    @app.post("/v1/images/generations", dependencies=guarded, tags=["images"], openapi_extra=_BODY)
    async def generate(http: fastapi.Request, asked: Annotated[Generation, Depends(_read)]) -> Generated:
        """Draws images; the answer comes when all are there. A client that goes away cancels its request."""
        since = time.perf_counter()
        request = await _submitted(service, asked, None)
        future = asyncio.wrap_future(request)
        away = asyncio.ensure_future(_away(http))
        try:
            await asyncio.wait({future, away}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                outcome = "cancelled" if away.done() else "late"
                took.labels(outcome).observe(time.perf_counter() - since)
                raise HTTPException(504, f"the images were not there after {seconds:g} seconds.")
            drawn, cost = await anyio.to_thread.run_sync(partial(_answer, service, asked, future))
        except CancelledError as error:
            raise HTTPException(503, "the server is closing.") from error
        finally:
            away.cancel()
            request.cancel()
        took.labels("finished").observe(time.perf_counter() - since)
        there = [picture for picture in drawn if picture is not None]
        if len(there) < len(drawn):
            raise HTTPException(500, f"{len(drawn) - len(there)} of {len(drawn)} samples failed: {cost['status']}.")
        data = [Picture(b64_json=picture) for picture in there]
        return Generated(created=int(time.time()), data=data, fastsde=Cost(**cost))


async def _submitted(service: Service, asked: Generation, callback: Callable[[EngineState], None] | None) -> Request:
    """Asks the sampler, in a thread because it prepares steps."""
    if asked.model not in (None, service.name):
        raise HTTPException(404, f"there is no model {asked.model!r} here; this is {service.name}.")
    try:
        return await anyio.to_thread.run_sync(lambda: service.submit(asked, callback))
    except fastsde.SamplerFullError as error:
        raise HTTPException(429, f"{error} Try again later.", {"Retry-After": "1"}) from error
    except (ValueError, TypeError) as error:
        raise HTTPException(400, " ".join(str(error).split())) from error
    except RuntimeError as error:
        raise HTTPException(503, str(error)) from error


def _add_samples(app: FastAPI, service: Service, took: Histogram, guarded: Sequence[Any]) -> None:
    """The routes of requests that tell their progress and can be cancelled by name."""
    seconds = service.limits.seconds
    running: dict[str, Request] = {}

    @app.post(
        "/v1/samples", dependencies=guarded, tags=["samples"], response_class=StreamingResponse, openapi_extra=_BODY
    )
    async def draw(asked: Annotated[Generation, Depends(_read)]) -> StreamingResponse:
        """Draws images and tells the progress, as server-sent events.

        `queued` has the id, the seed and n. `progress` has index, t, nfe and, where the model allows it, images on
        their way. `done` has the images, null for samples that failed, and their cost. `failed` has a message.
        """
        news = _News()
        request = await _submitted(service, asked, news.put)
        name = secrets.token_urlsafe(12)
        running[name] = request
        return StreamingResponse(
            events(asked, request, news, name), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def events(asked: Generation, request: Request, news: _News, name: str) -> AsyncIterator[str]:
        since, outcome = time.perf_counter(), "cancelled"
        future = asyncio.wrap_future(request)
        future.add_done_callback(lambda _: news.wake.set())
        try:
            yield _event("queued", {"id": name, "seed": request.seed, "n": request.n})
            while not future.done():
                left = since + seconds - time.perf_counter()
                if left <= 0:
                    raise TimeoutError(f"the images were not there after {seconds:g} seconds.")
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wake.wait(), min(_ALIVE, left))
                state = news.take()
                if state is not None and not future.done():
                    yield await anyio.to_thread.run_sync(partial(_progress, service, state))
                    await asyncio.wait({future}, timeout=_SHOWN)
                elif not future.done():
                    yield ": waiting\n\n"
            drawn, cost = await anyio.to_thread.run_sync(partial(_answer, service, asked, future))
            outcome = "finished"
            yield _event("done", {"images": drawn, **cost})
        except Exception as error:  # noqa: BLE001 - also of a decoder; the client is told
            outcome = "cancelled" if isinstance(error, CancelledError) else "failed"
            message = "cancelled." if outcome == "cancelled" else str(getattr(error, "detail", error))[:1000]
            yield _event("failed", {"message": message})
        finally:
            request.cancel()
            running.pop(name, None)
            took.labels(outcome).observe(time.perf_counter() - since)

    @app.delete("/v1/samples/{name}", dependencies=guarded, tags=["samples"], status_code=204)
    async def cancel(name: Annotated[str, fastapi.Path(max_length=40)]) -> Response:
        """Cancels a request."""
        request = running.get(name)
        if request is None:
            raise HTTPException(404, "there is no such request; it may have ended.")
        request.cancel()
        return Response(status_code=204)


def _add_information(app: FastAPI, service: Service, registry: CollectorRegistry, guarded: Sequence[Any]) -> None:
    """The routes that draw nothing: what is served, and how the server is."""

    @app.get("/v1/models", dependencies=guarded, tags=["images"])
    async def models() -> dict[str, Any]:
        """The model that is served, in the shape of OpenAI's interface."""
        one = {"id": service.name, "object": "model", "created": 0, "owned_by": "fastsde"}
        return {"object": "list", "data": [one]}

    @app.get("/v1/about", dependencies=guarded, tags=["samples"])
    async def about() -> dict[str, Any]:
        """What the model takes, and how many network calls samples have made so far."""
        stats = service.sampler.stats()
        return {
            "model": service.name,
            "record": service.record,
            "classes": list(service.classes),
            "size": service.size,
            "prompts": service.prompts,
            "edits": service.edits,
            "solvers": list(service.solvers),
            "most_n": service.limits.n,
            "most_nfe": service.limits.nfe,
            "least_rtol": service.limits.rtol,
            "waiting": stats.waiting,
            "running": stats.running,
            "nfe": stats.nfe,
        }

    @app.get("/metrics", dependencies=guarded, tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", tags=["operation"])
    async def healthz() -> dict[str, str]:
        """Whether the model takes requests."""
        if not service.sampler.takes_requests:
            raise HTTPException(503, "the sampler is closed.")
        return {"status": "ok"}


def _answer(
    service: Service, asked: Generation, future: asyncio.Future[Any]
) -> tuple[list[str | None], dict[str, Any]]:
    """The pictures of a request that has ended, each with its record in it, and what they cost."""
    images, result = service.made(_result(future))
    given = asked.model_dump(exclude_none=True)
    given |= {name: True for name in ("image", "mask") if name in given}
    record = {"fastsde": fastsde.__version__, "model": service.name, **service.record, **given}
    each = zip(images, result.index.tolist(), result.nfe.tolist(), strict=True)
    pictures = [
        None if image is None else _png(image, {**record, "seed": result.seed, "index": index, "nfe": nfe})
        for image, index, nfe in each
    ]
    return pictures, {
        "seed": result.seed,
        "nfe": result.nfe.tolist(),
        "status": [Status(k).name for k in result.status.tolist()],
        "seconds": round(result.seconds, 3),
        "record": record,
    }


def _progress(service: Service, state: EngineState) -> str:
    """The event of a state on the way."""
    images = service.previews(state)
    progress = {
        "index": state.index.tolist(),
        "t": [round(t, 6) for t in state.t.tolist()],
        "nfe": state.nfe.tolist(),
        "finished": state.finished,
        "images": None if images is None else [_png(image) for image in images],
    }
    return _event("progress", progress)


class _News:
    """The last state of a request, from the sampler's thread to the event loop."""

    def __init__(self) -> None:
        self.wake, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._state: EngineState | None = None

    def put(self, state: EngineState) -> None:
        self._state = state
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.wake.set)

    def take(self) -> EngineState | None:
        self.wake.clear()
        state, self._state = self._state, None
        return state


class _Bounded:
    """Refuses requests whose body is longer than allowed, before it is read, and ends those that take too long.

    The latter are of clients that do not read their answers.
    """

    def __init__(self, app: Any, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.most:
            await _problem(413, f"the body must be at most {self.most} bytes.")(scope, receive, send)
            return
        read = 0

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:  # sent in pieces, without its length
                raise HTTPException(413, f"the body must be at most {self.most} bytes.")
            return message

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.app(scope, counted, send), self.seconds)


def _result(future: asyncio.Future[Any]) -> Any:
    """What a request has returned; an HTTPException says why it has failed."""
    if future.cancelled():
        raise CancelledError
    error = future.exception()
    if error is not None:
        raise HTTPException(500, f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]) from error
    return future.result()


async def _away(http: fastapi.Request) -> None:
    """Returns when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n"


def _png(image: Image.Image, record: dict[str, Any] | None = None) -> str:
    """A picture as PNG in base64, with its record in it."""
    info = PngInfo()
    if record is not None:
        info.add_text("fastsde", json.dumps(record, allow_nan=False))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return base64.b64encode(file.getvalue()).decode()


def _sending(file: Path) -> Callable[[], Any]:
    async def send() -> FileResponse:
        policy = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
        return FileResponse(file, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    return send


def _problem(code: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
    kind = _TYPES.get(code, "invalid_request_error" if code < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": str(code)}
    return JSONResponse({"error": error}, code, headers=headers)


async def _told(http: fastapi.Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail), headers=error.headers)


async def _refused(http: fastapi.Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:80]
    came = re.sub(r"\s+", " ", reprlib.repr(first.get("input")))
    return _problem(400, f"{where or 'the body'}: {first['msg']}; got {came}.", where or None)


async def _broken(http: fastapi.Request, error: Exception) -> Response:
    return _problem(500, f"{type(error).__name__}: {error}"[:1000])
