"""`inspect --strict`: each rule of the format by a bundle that breaks it, and the golden bundle that breaks none."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from typer.testing import CliRunner

from edgemm.cli import build_app
from edgemm.conformance import Rule, conformance
from edgemm.errors import InputError
from edgemm.report.bom import bill_of_materials
from edgemm.runtime.bundle import Bundle, read_bundle, write_bundle
from edgemm.runtime.session import load_bundle
from edgemm.stages.package import array_bytes, deflater
from tests import devices
from tests.bundles import key_pair, signed, tiny_bundle

GOLDEN = Path(__file__).parents[1] / "golden" / "bundles"
ACCURACY = {
    **{"metric": "accuracy", "unit": "share", "n": 100, "clusters": 50, "n_required": 80, "fp32": 0.99},
    **{"compressed": 0.98, "drop": 0.01, "drop_ci95_upper": 0.02, "margin": 0.03, "flips": 0.01, "sqnr_db": None},
    "verdict": "PASS",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("whole") / "m.edgemm"
    path.write_bytes(tiny_bundle())
    return read_bundle(path)


def rules(path: Path) -> dict[str, Rule]:
    return {rule.name: rule for rule in conformance(str(path))}


def broken(folder: Path, whole: Bundle, files: dict[str, bytes | None] | None = None, **changes: Any) -> dict[str, str]:
    """Rule -> what it says, of those that a bundle breaks; files of None are left out, the BOM is made to fit."""
    kept = {**whole.manifest, **changes}
    manifest = {k: v for k, v in kept.items() if k not in ("schema", "files")}
    made = {n: c for n, c in {**whole.files, **(files or {})}.items() if c is not None}
    if "bom.cdx.json" in made and not (files and "bom.cdx.json" in files):
        made["bom.cdx.json"] = bill_of_materials(whole.manifest, {n: c for n, c in made.items() if n != "bom.cdx.json"})
    path = folder / "m.edgemm"
    path.write_bytes(write_bundle(manifest, made))
    return {r.name: r.detail for r in conformance(str(path)) if r.level == "MUST" and not r.kept}


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with keys replaced, and without those whose new value is `...`."""
    return {k: v for k, v in {**values, **changes}.items() if v is not ...}


def test_a_bundle_as_edgemm_writes_it_breaks_no_rule(whole: Bundle, tmp_path: Path) -> None:
    assert broken(tmp_path, whole) == {}
    found = rules(tmp_path / "m.edgemm")
    assert [r.name for r in found.values() if r.level == "MAY" and r.kept] == ["check.npz"]
    private, _ = key_pair(tmp_path)
    signed(tmp_path / "m.edgemm", tiny_bundle(), private)
    assert rules(tmp_path / "m.edgemm")["signature"].kept


@pytest.mark.parametrize("key", ["engine", "source", "data", "recipe", "target", "versions"])
def test_provenance_must_be_whole(key: str, whole: Bundle, tmp_path: Path) -> None:
    for value in (..., None, "not hex", {}, 5):
        provenance = changed(whole.manifest["provenance"], **{key: value})
        assert set(broken(tmp_path, whole, provenance=provenance)) == {"provenance"}


def test_the_recipe_must_have_the_bundle_s_version(whole: Bundle, tmp_path: Path) -> None:
    assert "version 1, not 2" in broken(tmp_path, whole, version=2)["provenance"]


@pytest.mark.parametrize(
    "certificate",
    [{}, {"verdict": "FAIL", "accuracy": []}, {"verdict": "PASS"}, {"verdict": "PASS", "accuracy": [{"metric": "x"}]}],
)
def test_the_certificate_must_say_what_was_proven(certificate: Any, whole: Bundle, tmp_path: Path) -> None:
    assert set(broken(tmp_path, whole, certificate=certificate)) == {"certificate"}


def test_the_program_must_be_valid_and_its_files_there(whole: Bundle, tmp_path: Path) -> None:
    program = whole.manifest["program"]
    assert {"program", "components", "files"} <= set(broken(tmp_path, whole, program={"backend": "openvino"}))
    assert "head has not the files head.onnx" in broken(tmp_path, whole, {"head.onnx": None})["components"]
    elsewhere = changed(program, backend="openvino")
    assert "encoder.xml, encoder.bin" in broken(tmp_path, whole, program=elsewhere)["components"]


@pytest.mark.parametrize("name", ["golden/inputs.json", "golden/expected.npz", "golden/0.x.npy"])
def test_golden_inputs_and_outputs_must_be_there_and_whole(name: str, whole: Bundle, tmp_path: Path) -> None:
    for content in (None, b"", b"[]", b"{", whole.files[name][:-1]):
        assert set(broken(tmp_path, whole, {name: content})) == {"golden"}


def test_every_golden_input_must_have_an_output(whole: Bundle, tmp_path: Path) -> None:
    one = {"0.logits": np.zeros((1, 3), np.float32)}
    found = broken(tmp_path, whole, {"golden/expected.npz": array_bytes(np.savez, **one)})
    assert found == {"golden": "golden input 1 has no expected output"}


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"bomFormat": "CycloneDX"}', b"[" * 100_000])
def test_the_bill_of_materials_must_be_there(content: bytes | None, whole: Bundle, tmp_path: Path) -> None:
    assert set(broken(tmp_path, whole, {"bom.cdx.json": content})) == {"bill of materials"}


def test_the_bill_of_materials_must_be_that_of_the_bundle(whole: Bundle, tmp_path: Path) -> None:
    others = {**whole.files, "head.onnx": b"another"}
    for bom in (
        bill_of_materials(whole.manifest, {n: c for n, c in others.items() if n != "bom.cdx.json"}),
        bill_of_materials({**whole.manifest, "model": "another"}, dict(whole.files)),
    ):
        assert set(broken(tmp_path, whole, {"bom.cdx.json": bom})) == {"bill of materials"}


def test_nothing_may_be_inside_that_nothing_reads(whole: Bundle, tmp_path: Path) -> None:
    assert broken(tmp_path, whole, {"payload.so": b"x"}) == {"files": "nothing reads 'payload.so'"}
    assert "device_runner.py" in broken(tmp_path, whole, {"device_runner.py": b"x"})["files"]
    assert set(broken(tmp_path, whole, {"check.npz": b"PK"})) == {"files"}


def test_texts_need_a_tokenizer(whole: Bundle, tmp_path: Path) -> None:
    text = {"ids": "ids", "mask": None, "tokenizer": "tokenizer.json", "max_tokens": 4}
    program = changed(whole.manifest["program"], text=text)
    assert "tokenizer.json" in broken(tmp_path, whole, program=program)["files"]


def test_a_bundle_for_a_device_is_held_to_the_rules_too(tmp_path: Path) -> None:
    found = rules(devices.bundle(tmp_path))
    assert found["device/spec.json"].kept and found["components"].kept and found["files"].kept
    assert not found["golden"].kept and not found["bill of materials"].kept, "tests/devices.py makes none"


def call(*arguments: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_from_the_command_line(whole: Bundle, tmp_path: Path) -> None:
    assert broken(tmp_path, whole) == {}
    path = tmp_path / "m.edgemm"
    code, shown, _ = call("inspect", path, "--strict")
    assert code == 0 and "bill of materials" in shown
    code, shown, _ = call("inspect", path, "--strict", "--json")
    assert code == 0 and {r["level"] for r in json.loads(shown)["rules"]} == {"MUST", "MAY"}
    assert broken(tmp_path, whole, {"payload.so": b"x", "golden/inputs.json": b"["})
    code, shown, error = call("inspect", path, "--strict", "--json")
    assert code == 2 and "breaks 2 MUST: golden" in error and json.loads(shown)["rules"]
    assert call("inspect", path)[0] == 0, "what it holds can be seen all the same"
    path.write_bytes(path.read_bytes()[:-1])
    assert call("inspect", path, "--strict")[0] == 2
    assert "without --strict" in call("inspect", "reasoner", "--strict")[2]


def test_inspect_of_a_bundle_with_a_broken_program_is_an_error_and_no_crash(whole: Bundle, tmp_path: Path) -> None:
    for changes in ({"program": {}}, {"certificate": {"accuracy": 5}}):
        broken(tmp_path, whole, **changes)
        code, _, error = call("inspect", tmp_path / "m.edgemm")
        assert code == 2 and "fix: " in error


def test_the_bill_of_materials_is_valid_by_cyclonedx_s_own_schema_and_the_same_each_time(whole: Bundle) -> None:
    files = {n: c for n, c in whole.files.items() if n != "bom.cdx.json"}
    manifest = {**whole.manifest, "certificate": {"verdict": "PASS", "accuracy": [ACCURACY]}}
    manifest["provenance"] = {**whole.manifest["provenance"], "versions": {"torch": "2.13.0+cpu", "nncf": "absent"}}
    bom = bill_of_materials(manifest, files)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode()) is None
    assert bom == bill_of_materials(manifest, dict(reversed(files.items())))
    read = json.loads(bom)
    assert [c.get("purl") for c in read["components"] if c["type"] == "library"] == ["pkg:pypi/torch@2.13.0%2Bcpu"]
    metrics = read["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [m["value"] for m in metrics] == ["0.99", "0.98", "0.01"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode().replace('"file"', '"fil"')) is not None


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.edgemm")), ids=lambda p: p.stem)
def test_a_golden_bundle_of_every_schema_is_read_answers_and_keeps_the_rules(path: Path) -> None:
    """Made by edgemm when the schema was; never made again. It holds a tiny reasoner with random weights."""
    from edgemm.recheck import golden_gate

    assert path.stat().st_size < 500_000
    assert [r.name for r in conformance(str(path)) if r.level == "MUST" and not r.kept] == []
    bundle = read_bundle(path)
    assert bundle.version == 7
    gate = golden_gate(load_bundle(path), bundle.files, str(path))
    assert gate.verdict == "PASS" and gate.value is not None and math.isfinite(gate.value)
    bom = bundle.files["bom.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom) is None


def test_there_is_a_golden_bundle_of_every_schema() -> None:
    from edgemm.runtime.bundle import SCHEMA

    assert [p.stem for p in sorted(GOLDEN.glob("*.edgemm"))] == [f"schema-{n}" for n in range(1, SCHEMA + 1)]


def test_zlib_is_named_where_it_makes_bytes_of_the_bundle(whole: Bundle, tmp_path: Path) -> None:
    """`check.npz` is deflated, and another zlib may make other bytes of it."""
    assert "check.npz" in whole.deflated
    assert deflater(whole.files) == {"zlib": zlib.ZLIB_RUNTIME_VERSION}
    assert deflater({n: c for n, c in whole.files.items() if n not in whole.deflated}) == {}
    provenance = whole.manifest["provenance"]
    named = provenance | {"versions": provenance["versions"] | deflater(whole.files)}
    files = {n: c for n, c in whole.files.items() if n != "bom.cdx.json"}
    bom = bill_of_materials({**whole.manifest, "provenance": named}, files)
    assert f"pkg:generic/zlib@{zlib.ZLIB_RUNTIME_VERSION}" in bom.decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode()) is None
    assert broken(tmp_path, whole, {"bom.cdx.json": bom}, provenance=named) == {}


def test_a_bundle_from_before_there_were_versions_is_version_1(whole: Bundle, tmp_path: Path) -> None:
    manifest = {k: v for k, v in whole.manifest.items() if k not in ("schema", "files", "version")}
    path = tmp_path / "old.edgemm"
    path.write_bytes(write_bundle(manifest, whole.files))
    assert read_bundle(path).version == 1
    for version in (0, -1, "1", 1.0, True, 1 << 53):
        path.write_bytes(write_bundle({**manifest, "version": version}, whole.files))
        with pytest.raises(InputError, match="version"):
            read_bundle(path)
