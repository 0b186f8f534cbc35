"""Every failure a user can cause or must act on, and the exit code it ends the program with."""

from __future__ import annotations


class EdgemmError(Exception):
    """Every failure a user can cause or must act on.

    InputError         exit 2   recipe, target, model, data, bundle or output place is wrong
    ToolchainError     exit 3   TensorRT / OpenVINO / device is absent or too old
    VerdictError       exit 4   parity or budget missed: a result, not a crash
    InconclusiveError  exit 5   too little evidence to say
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(f"{what}\n  fix: {fix}")


class InputError(EdgemmError):
    exit_code = 2


class ToolchainError(EdgemmError):
    exit_code = 3


class VerdictError(EdgemmError):
    exit_code = 4


class InconclusiveError(EdgemmError):
    exit_code = 5
