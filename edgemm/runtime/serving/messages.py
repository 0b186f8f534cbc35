"""The protobuf messages of the Open Inference Protocol (package `inference`), with Triton's repository extension.

Fields, numbers and types are the protocol's: https://github.com/kserve/open-inference-protocol. They live in a
descriptor pool of their own, so that a process may also load another library's copy of them.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
PARAMETERS = "parameters:map<InferParameter>"  # its keys are strings
TENSOR = "name:string datatype:string shape:*int64"

# Message -> its fields in the order of their numbers, NAME:TYPE, `*` before a repeated type.
MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool",
    "ModelReadyRequest": "name:string version:string",
    "ModelReadyResponse": "ready:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string version:string extensions:*string",
    "ModelMetadataRequest": "name:string version:string",
    "ModelMetadataResponse": (
        "name:string versions:*string platform:string inputs:*TensorMetadata outputs:*TensorMetadata"
    ),
    "ModelMetadataResponse.TensorMetadata": TENSOR,
    "InferParameter": "bool_param:bool int64_param:int64 string_param:string double_param:double uint64_param:uint64",
    "InferTensorContents": (
        "bool_contents:*bool int_contents:*int32 int64_contents:*int64 uint_contents:*uint32 "
        "uint64_contents:*uint64 fp32_contents:*float fp64_contents:*double bytes_contents:*bytes"
    ),
    "ModelInferRequest": (
        f"model_name:string model_version:string id:string {PARAMETERS} inputs:*InferInputTensor "
        "outputs:*InferRequestedOutputTensor raw_input_contents:*bytes"
    ),
    "ModelInferRequest.InferInputTensor": f"{TENSOR} {PARAMETERS} contents:InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": f"name:string {PARAMETERS}",
    "ModelInferResponse": (
        f"model_name:string model_version:string id:string {PARAMETERS} outputs:*InferOutputTensor "
        "raw_output_contents:*bytes"
    ),
    "ModelInferResponse.InferOutputTensor": f"{TENSOR} {PARAMETERS} contents:InferTensorContents",
    "ModelStreamInferResponse": "error_message:string infer_response:ModelInferResponse",
    "RepositoryIndexRequest": "repository_name:string ready:bool",
    "RepositoryIndexResponse": "models:*ModelIndex",
    "RepositoryIndexResponse.ModelIndex": "name:string version:string state:string reason:string",
    "ModelRepositoryParameter": "bool_param:bool int64_param:int64 string_param:string bytes_param:bytes",
    "RepositoryModelLoadRequest": "repository_name:string model_name:string parameters:map<ModelRepositoryParameter>",
    "RepositoryModelLoadResponse": "",
}
ONEOFS = {"InferParameter": "parameter_choice", "ModelRepositoryParameter": "parameter_choice"}

# RPC -> whether it streams ModelInferRequest; else its messages are RPCRequest and RPCResponse.
METHODS = {
    "ServerLive": False,
    "ServerReady": False,
    "ModelReady": False,
    "ServerMetadata": False,
    "ModelMetadata": False,
    "ModelInfer": False,
    "ModelStreamInfer": True,
    "RepositoryIndex": False,
    "RepositoryModelLoad": False,
}

_Field = descriptor_pb2.FieldDescriptorProto


def _field(message: Any, number: int, name: str, kind: str, owner: str) -> None:
    field = message.field.add(name=name, number=number, json_name=name)
    if kind.startswith("map<"):
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _field(entry, 1, "key", "string", owner)
        _field(entry, 2, "value", kind[4:-1], owner)
        kind = f"*{owner}.{entry.name}"
    field.label = _Field.LABEL_REPEATED if kind.startswith("*") else _Field.LABEL_OPTIONAL
    kind = kind.removeprefix("*")
    if kind.islower():
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")
    else:
        nested = f"{owner}.{kind}" if f"{owner}.{kind}" in MESSAGES else kind
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".inference.{nested}"


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="edgemm/inference.proto", package="inference", syntax="proto3")
    made: dict[str, Any] = {}
    for name, fields in MESSAGES.items():
        owner, _, short = name.rpartition(".")
        message = made[owner].nested_type.add(name=short) if owner else file.message_type.add(name=short)
        made[name] = message
        for number, field in enumerate(fields.split(), 1):
            label, kind = field.split(":")
            _field(message, number, label, kind, name)
        if name in ONEOFS:
            message.oneof_decl.add(name=ONEOFS[name])
            for field in message.field:
                field.oneof_index = 0
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def message(name: str) -> Any:
    """The class of a message."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))
