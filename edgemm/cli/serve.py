"""edgemm serve"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer


class ControlMode(str, Enum):
    none = "none"
    poll = "poll"
    explicit = "explicit"


def command(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="One .edgemm file a model.")],
    host: Annotated[str, typer.Option(help="Address to listen on; there is no TLS and no login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Of gRPC; 0 takes a free one, -1 is without.")] = 8001,
    p99_ms: Annotated[float, typer.Option(help="Latency to keep for 99 % of answers: bounds the batches.")] = 100,
    max_batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    max_queue_delay_us: Annotated[int, typer.Option(help="How long a batch may wait to grow.")] = 0,
    max_queue_size: Annotated[int, typer.Option(help="Rows that wait or run; more are rejected.")] = 1024,
    timeout_ms: Annotated[float, typer.Option(help="Of requests that name none; 0 is no limit.")] = 0,
    priority_levels: Annotated[int, typer.Option(help="1 is the most urgent level; 0 ignores priorities.")] = 0,
    default_priority: Annotated[int, typer.Option(help="Level of requests that name none.")] = 1,
    preserve_ordering: Annotated[bool, typer.Option("--preserve-ordering", help="Answer in order of arrival.")] = False,
    streams: Annotated[int, typer.Option(help="Batches at the same time; they share the target's threads.")] = 2,
    cache_mb: Annotated[int, typer.Option(help="Encodings and answers kept for equal inputs; 0 is none.")] = 64,
    max_body_mb: Annotated[int, typer.Option(help="Size of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(help="Of an image, decoded.")] = 16_000_000,
    max_audio_s: Annotated[float, typer.Option(help="Of a recording.")] = 60,
    max_connections: Annotated[int, typer.Option(help="At the same time.")] = 2048,
    drain_s: Annotated[float, typer.Option(help="Time that requests have to end after SIGTERM.")] = 30,
    model_control_mode: Annotated[
        ControlMode,
        typer.Option(
            help="none: SIGHUP loads bundles anew; poll: so does a change; explicit: so does the load request."
        ),
    ] = ControlMode.none,
    require_signature: Annotated[
        Optional[Path], typer.Option(metavar="KEY", help="Refuse bundles without a signature by this key.")
    ] = None,
) -> None:
    """Serve bundles over HTTP and gRPC (Open Inference Protocol v2), in batches by modality; logs go to stderr.

    Exit codes: 0 stopped by SIGTERM or Ctrl-C, 2 bad input or no such port, 3 a toolchain is absent.
    """
    from edgemm import __version__
    from edgemm.errors import ToolchainError
    from edgemm.plugins import validate

    try:
        from edgemm.runtime.serving.options import Limits, Options
        from edgemm.runtime.serving.server import run
        from edgemm.runtime.serving.service import Service
    except ImportError as e:
        raise ToolchainError(f"the server needs {e.name}", fix="pip install 'edgemm[serve]'") from e
    options = validate(
        Options,
        {
            "streams": streams,
            "max_batch_size": max_batch_size,
            "max_queue_delay_us": max_queue_delay_us,
            "max_queue_size": max_queue_size,
            "timeout_ms": timeout_ms,
            "priority_levels": priority_levels,
            "default_priority": default_priority,
            "preserve_ordering": preserve_ordering,
            "p99_ms": p99_ms,
            "cache_mb": cache_mb,
        },
        "edgemm serve",
    )
    limits = validate(
        Limits,
        {
            "body_mb": max_body_mb,
            "pixels": max_pixels,
            "audio_s": max_audio_s,
            "connections": max_connections,
            "drain_s": drain_s,
        },
        "edgemm serve",
    )
    service = Service(bundles, options, limits, require_signature)
    run(service, host, port, None if grpc_port < 0 else grpc_port, model_control_mode.value, __version__)
