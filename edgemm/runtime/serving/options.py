"""What `edgemm serve` may be told; names and meanings are Triton's where it has the same."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgemm.yaml_files import Strict


class Options(Strict):
    """Knobs of the scheduler.

    streams            batches that run at the same time, each on its share of the bundle's threads
    max_batch_size     rows of one batch at the most
    max_queue_delay_us how long a batch may wait for more rows while a stream is free
    max_queue_size     requests that wait or run; more are rejected
    timeout_ms         of a request that names none, waiting included; 0 is no limit
    priority_levels    1 is the most urgent; 0 ignores what requests say;  default_priority  of those that say none
    preserve_ordering  answers leave in the order in which requests came, model by model
    p99_ms             within which 99 % of answers are wanted: no batch is made larger than that allows
    cache_mb           10^6 bytes of encodings and answers that are kept for equal inputs; 0 keeps none
    """

    streams: int = Field(2, ge=1, le=64)
    max_batch_size: int = Field(8, ge=1, le=64)
    max_queue_delay_us: int = Field(0, ge=0, le=10_000_000)
    max_queue_size: int = Field(1024, ge=1, le=1_000_000)
    timeout_ms: float = Field(0, ge=0, le=86_400_000)
    priority_levels: int = Field(0, ge=0, le=1000)
    default_priority: int = Field(1, ge=1, le=1000)
    preserve_ordering: bool = False
    p99_ms: float = Field(100, gt=0, le=3_600_000)
    cache_mb: int = Field(64, ge=0, le=1 << 20)

    @model_validator(mode="after")
    def default_priority_is_a_level(self) -> Options:
        if self.default_priority > max(1, self.priority_levels):
            raise ValueError(f"default_priority {self.default_priority} is not one of {self.priority_levels} levels")
        return self


class Limits(Strict):
    """What a request may be before it is refused; time is in seconds.

    body_mb       10^6 bytes of a request;  pixels  of an image, decoded;  audio_s  of a recording
    header_bytes  of a request's line and headers;  header_s, body_s  until they must be there;  write_s  until the
                  client must have taken its answer;  idle_s  a connection may do nothing
    connections   at the same time;  drain_s  that requests have to end when the server is told to
    """

    body_mb: int = Field(16, ge=1, le=1024)
    pixels: int = Field(16_000_000, ge=1, le=64_000_000)
    audio_s: float = Field(60, gt=0, le=3_600)
    header_bytes: int = Field(16_384, ge=1024)
    header_s: float = Field(10, gt=0)
    body_s: float = Field(30, gt=0)
    write_s: float = Field(30, gt=0)
    idle_s: int = Field(60, ge=1)
    connections: int = Field(2048, ge=1)
    drain_s: float = Field(30, gt=0)


ControlMode = Literal["none", "poll", "explicit"]
