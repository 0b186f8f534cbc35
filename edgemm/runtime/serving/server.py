"""The process: both protocols on their ports, signals, bundles exchanged while it runs, a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn
import uvloop

from edgemm.errors import EdgemmError, InputError
from edgemm.runtime.serving import grpc_service, http_app
from edgemm.runtime.serving.connection import guarded
from edgemm.runtime.serving.options import ControlMode
from edgemm.runtime.serving.service import Service

POLL_S = 1.0
log = structlog.get_logger("edgemm.serve")


class Http(uvicorn.Server):
    """uvicorn, which leaves signals to us, and says when it listens.

    grpc   address of the other protocol
    """

    grpc: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        addresses = [":".join(map(str, s.getsockname()[:2])) for s in sockets or []]
        log.info("listening", http=addresses[0], grpc=self.grpc)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(service: Service, host: str, port: int, grpc_port: int | None, control: ControlMode, version: str) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted by then is answered. SIGHUP reads every bundle anew.

    port, grpc_port  0 takes a free one; without grpc_port there is no gRPC
    control          none; poll: a bundle that changes is loaded; explicit: by the repository calls of the protocol
    Raises InputError when a port can't be had.
    """
    log_as_json()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = _listen(host, port)
    with contextlib.closing(listener):
        uvloop.run(_serve(service, listener, host, grpc_port, control, version))


async def _serve(
    service: Service, listener: socket.socket, host: str, grpc_port: int | None, control: ControlMode, version: str
) -> None:
    limits, loop = service.limits, asyncio.get_running_loop()
    await loop.run_in_executor(None, service.load)
    http = Http(
        uvicorn.Config(
            http_app.build(service, version, control),
            http=guarded(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=limits.idle_s,
            timeout_graceful_shutdown=round(limits.drain_s),
        )
    )
    rpc = None
    if grpc_port is not None:
        rpc = grpc_service.build(service, version, control)
        try:
            http.grpc = f"{host}:{rpc.add_insecure_port(f'{host}:{grpc_port}')}"
        except RuntimeError as e:
            raise InputError(f"cannot listen on {host}:{grpc_port}: {e}", fix="give another --grpc-port") from e
        await rpc.start()

    def stop() -> None:
        log.info("stopping", pending=service.scheduler.pending)
        service.stopping = True
        service.scheduler.hurry()
        http.should_exit = True

    def reload_all() -> None:
        for name in list(service.models):
            loop.run_in_executor(None, _reload, service, name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload_all)
    poll = loop.create_task(_poll(service)) if control == "poll" else None
    await http.serve(sockets=[listener])
    if poll:
        poll.cancel()
    if rpc:
        await rpc.stop(limits.drain_s)
    await loop.run_in_executor(None, service.close)
    log.info("stopped")


def _reload(service: Service, name: str) -> None:
    """On a signal or a change, where a bundle that can't be used is logged and nothing else."""
    with contextlib.suppress(EdgemmError):
        service.reload(name)


async def _poll(service: Service) -> None:
    """Load a bundle when its file, directory, or a link on the way there has changed."""
    seen = {name: _state(model.path) for name, model in service.models.items()}
    while True:
        await asyncio.sleep(POLL_S)
        for name, before in list(seen.items()):
            seen[name] = _state(service.models[name].path)
            if seen[name] not in (before, None):
                await asyncio.get_running_loop().run_in_executor(None, _reload, service, name)


def _state(path: Path) -> tuple[str, int, int, int] | None:
    try:
        real = path.resolve(strict=True)
        info = real.stat()
    except OSError:  # for a moment nothing is there
        return None
    return str(real), info.st_ino, info.st_mtime_ns, info.st_size


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as e:
        raise InputError(f"cannot listen on {host}:{port}: {e}", fix="give another --host or --port") from e
    return listener


def log_as_json() -> None:
    """One JSON object a line on stderr, from us and from the libraries."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared)
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
