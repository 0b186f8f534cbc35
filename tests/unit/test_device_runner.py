"""device_runner.py as it runs on a device, over a `tensorrt` that has the calls of one version and no other."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemm.device import device_runner
from edgemm.device.device_runner import Bundle, Cache, Unfit, abba, check, choose, clocks, sqnr_db
from edgemm.report.device import DeviceReport
from edgemm.runtime.bundle import read_bundle, write_bundle
from tests import devices

FAKE = Path(__file__).parents[1] / "tensorrt_fake"
VERSIONS = ("10.3", "10.16", "11.4")
CUT = '''
import os
left = int(os.environ.get("CUT", 0))
sync = os.fsync
def cut(handle):
    """The power goes at the n-th fsync: of what was written, half is on the disk."""
    global left
    left -= 1
    if left == 0:
        if os.path.isfile(f"/proc/self/fd/{handle}"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os._exit(137)
    sync(handle)
os.fsync = cut
'''
Run = Callable[..., tuple[int, dict[str, Any] | None, str]]


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two components, with the runner that it carries beside it."""
    return laid_out(devices.bundle(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One component."""
    return laid_out(devices.bundle(tmp_path_factory.mktemp("small"), ["head"]))


def laid_out(bundle: Path) -> Path:
    with zipfile.ZipFile(bundle) as archive:
        archive.extract("device_runner.py", bundle.parent)
    return bundle


def with_spec(bundle: Path, **changes: Any) -> Path:
    """The bundle with other values in its spec.json."""
    content = read_bundle(bundle)
    spec = {**json.loads(content.files["device/spec.json"]), **changes}
    manifest = {k: v for k, v in content.manifest.items() if k not in ("schema", "files")}
    bundle.write_bytes(write_bundle(manifest, {**content.files, "device/spec.json": json.dumps(spec).encode()}))
    return laid_out(bundle)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the runner beside a bundle as a device would -> exit code, report or None, stderr.

    Keywords are the fake's settings; `environment` adds to the process's.
    """

    def runs(
        bundle: Path, *arguments: str, environment: dict[str, str] | None = None, **settings: Any
    ) -> tuple[int, dict[str, Any] | None, str]:
        report = tmp_path / "device-report.json"
        report.unlink(missing_ok=True)
        command = [sys.executable, bundle.parent / "device_runner.py", bundle, "--cache", tmp_path / "cache"]
        more = environment or {}
        path = os.pathsep.join(filter(None, (str(FAKE), more.get("PYTHONPATH"))))
        done = subprocess.run(
            [*map(str, command), "--report", str(report), *arguments],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **more,
                "PYTHONPATH": path,
                "FAKE_TENSORRT": json.dumps(settings),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(report.read_bytes()) if report.exists() else None, done.stderr

    return runs


@pytest.fixture(scope="module")
def built(small_bundle: Path) -> Path:
    """A cache with both engines of `small_bundle`."""
    cache = small_bundle.parent / "cache"
    for precision in ("fp16", "int8"):
        command = [sys.executable, str(small_bundle.parent / "device_runner.py"), str(small_bundle)]
        cache.mkdir(exist_ok=True)
        subprocess.run(
            [*command, "--cache", str(cache), "--build", "head", precision],
            env={**os.environ, "PYTHONPATH": str(FAKE), "FAKE_TENSORRT": "{}"},
            timeout=60,
            check=True,
        )
    return cache


def head(report: dict[str, Any] | None) -> dict[str, Any]:
    assert report
    DeviceReport.model_validate(report)
    (row,) = report["components"]
    return row


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_builds_checks_and_ships_the_faster_engine(
    whole_bundle: Path, run: Run, tmp_path: Path, version: str
) -> None:
    code, report, _ = run(whole_bundle, version=version)
    assert code == 0 and report
    measured = DeviceReport.model_validate(report)
    assert measured.bundle.sha256 == hashlib.sha256(whole_bundle.read_bytes()).hexdigest()
    assert measured.hardware.tensorrt.startswith(version)
    assert (measured.hardware.gpu, measured.hardware.compute_capability) == ("Fake Orin", "8.7")
    assert [(c.name, c.shipped) for c in measured.components] == [("encoder", "int8"), ("head", "int8")]
    for component in measured.components:
        for precision, candidate in component.candidates.items():
            assert candidate.passed and candidate.engine and not candidate.cached
            plan = (tmp_path / "cache" / candidate.engine.file).read_bytes()
            assert hashlib.sha256(plan).hexdigest() == candidate.engine.sha256
            assert min(db or 0 for db in candidate.sqnr_db.values()) > (60 if precision == "fp16" else 30)
            assert len(candidate.samples_ms) == 4 * 2 * device_runner.BLOCK
    assert measured.whole and measured.memory
    parts = [c.candidates["int8"].latency.p50_ms for c in measured.components]
    assert measured.whole.p50_ms > 0.5 * sum(parts), "one after the other"
    assert all(gate.held for gate in measured.gates)


def test_what_was_built_is_not_built_again(small_bundle: Path, built: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "cache")
    log = tmp_path / "built"
    row = head(run(small_bundle, log=str(log))[1])
    assert not log.exists()
    for candidate in row["candidates"].values():
        assert candidate["cached"]
        assert candidate["engine"]["sha256"] in {hashlib.sha256(p.read_bytes()).hexdigest() for p in built.iterdir()}


@pytest.mark.parametrize(
    ("settings", "shipped", "failed", "why"),
    [
        ({"fail_build": "int8", "version": "11.4"}, "fp16", "int8", "Could not find any implementation"),
        ({"kill_build": "int8"}, "fp16", "int8", "killed by signal 9"),
        ({"out_of_memory": "int8", "version": "10.16"}, "fp16", "int8", "OutOfMemory"),
        ({"out_of_memory": "int8", "version": "11.4"}, "fp16", "int8", "OutOfMemory"),
        ({"wrong": "int8", "version": "11.4"}, "fp16", "int8", "logits: -"),
        ({"nan": "fp16"}, "int8", "fp16", "logits: None dB"),
        ({"fail_build": "fp16"}, "int8", "fp16", "Could not find any implementation"),
    ],
)
def test_a_candidate_that_fails_is_not_shipped(
    small_bundle: Path, run: Run, settings: dict[str, str], shipped: str, failed: str, why: str
) -> None:
    code, report, _ = run(small_bundle, **settings)
    row = head(report)
    assert (code, row["shipped"]) == (0, shipped)
    assert why in row["candidates"][failed]["error"]
    assert not row["candidates"][failed]["passed"] and not row["candidates"][failed]["samples_ms"]
    assert row["int8_speedup"] is None and row["candidates"][shipped]["latency"]


@pytest.mark.parametrize("version", VERSIONS)
def test_int8_that_is_not_faster_is_not_shipped(small_bundle: Path, run: Run, version: str) -> None:
    code, report, _ = run(small_bundle, slow="int8", version=version)
    row = head(report)
    assert (code, row["shipped"]) == (0, "fp16")
    assert row["int8_speedup"]["p50"] < 1 and "not faster" in row["reason"]
    assert row["candidates"]["int8"]["passed"]


@pytest.mark.parametrize("settings", [{"fail_build": "both"}, {"wrong": "both"}, {"device_bytes": 64}])
def test_with_no_engine_that_passes_the_exit_code_says_so(
    small_bundle: Path, run: Run, settings: dict[str, Any]
) -> None:
    code, report, _ = run(small_bundle, **settings)
    row = head(report)
    assert (code, row["shipped"], row["reason"]) == (4, None, "neither candidate passes")
    assert report and report["whole"] is None and report["memory"] is None
    if "device_bytes" in settings:
        assert row["candidates"]["fp16"]["error"] == "out of memory"


def test_a_device_that_dies_while_it_is_timed_ships_nothing(small_bundle: Path, run: Run) -> None:
    """After such an error CUDA answers nothing more, FP16 neither; the report still says what happened."""
    code, report, _ = run(small_bundle, dies="int8")
    row = head(report)
    assert (code, row["shipped"]) == (4, None)
    assert all("illegal memory access" in c["error"] and not c["passed"] for c in row["candidates"].values())


@pytest.mark.parametrize("version", ["10.3", "11.4"])
def test_power_cut_while_an_engine_is_written(small_bundle: Path, run: Run, tmp_path: Path, version: str) -> None:
    """At each fsync in turn: the cache then has the whole engine or none, and the next run goes on from there."""
    (tmp_path / "sitecustomize.py").write_text(CUT)
    (tmp_path / "cache").mkdir()
    cuts = 0
    for n in range(1, 20):
        environment = {"PYTHONPATH": str(tmp_path), "CUT": str(n)}
        code, _, _ = run(small_bundle, "--build", "head", "int8", environment=environment, version=version)
        if code == 0:
            break
        assert code == 137
        cuts += 1
        for record in (tmp_path / "cache").glob("[!.]*.json"):
            plan = record.with_suffix(".engine").read_bytes()
            assert json.loads(record.read_bytes())["sha256"] == hashlib.sha256(plan).hexdigest()
    assert cuts == 6, "engine, record and timing cache, each with its directory"
    (tmp_path / "cache" / ".tmp-half.engine").write_bytes(b"half")
    code, report, _ = run(small_bundle, version=version)
    assert (code, head(report)["shipped"]) == (0, "int8")
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_an_engine_of_another_driver_or_tensorrt_is_not_used(
    small_bundle: Path, built: Path, run: Run, tmp_path: Path
) -> None:
    log = tmp_path / "built"
    shutil.copytree(built, tmp_path / "cache")
    before = {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    for settings in ({"driver": 12080}, {"version": "10.16"}):
        log.unlink(missing_ok=True)
        row = head(run(small_bundle, log=str(log), **settings)[1])
        assert not any(c["cached"] for c in row["candidates"].values())
        assert log.read_text() == "\ntiming +\n", (
            "the second build knows what the first learnt, and nothing of another's"
        )
    after = {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()}
    assert before.items() <= after.items(), "and theirs is left alone"
    assert len([n for n in after if n.endswith(".engine")]) == 6


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def unloadable(path: Path) -> None:
    """Whole by its record, but no engine."""
    path.write_bytes(b"no plan")
    record = json.loads(path.with_suffix(".json").read_bytes())
    record["sha256"] = hashlib.sha256(b"no plan").hexdigest()
    path.with_suffix(".json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [(flip, ".engine"), (unloadable, ".engine"), (flip, ".json"), (Path.unlink, ".json"), (Path.unlink, ".engine")],
)
def test_a_damaged_cache_is_built_anew(
    small_bundle: Path, built: Path, run: Run, tmp_path: Path, damage: Callable[[Path], None], suffix: str
) -> None:
    shutil.copytree(built, tmp_path / "cache")
    for path in list((tmp_path / "cache").glob(f"*{suffix}")):
        damage(path)
    for path in (tmp_path / "cache").glob("*.timing"):
        path.write_bytes(b"\xff of no use")
    row = head(run(small_bundle)[1])
    assert not any(c["cached"] for c in row["candidates"].values())
    engine = row["candidates"]["int8"]["engine"]
    assert (built / engine["file"]).read_bytes() == (tmp_path / "cache" / engine["file"]).read_bytes()


def test_a_limit_that_is_missed_is_told(tmp_path: Path, run: Run) -> None:
    target = devices.TARGET.model_copy(
        update={"budgets": devices.TARGET.budgets.model_copy(update={"max_p50_ms": 1e-3})}
    )
    code, report, _ = run(laid_out(devices.bundle(tmp_path, ["head"], target)))
    assert code == 4 and report
    assert [(g["name"], g["held"]) for g in report["gates"]] == [("max_p50_ms", False), ("max_peak_mb", True)]


def test_a_damaged_bundle_is_refused(small_bundle: Path, tmp_path: Path, run: Run) -> None:
    content = small_bundle.read_bytes()
    (tmp_path / "device_runner.py").write_bytes((small_bundle.parent / "device_runner.py").read_bytes())
    swapped = bytearray(content)
    swapped[len(content) // 2] ^= 1
    sealed = bytes(swapped[:-64]) + hashlib.sha256(swapped[:-64]).hexdigest().encode()
    foreign = write_bundle({"target": "x86"}, {"model.bin": b""})
    for name, wrong, why in (
        ("empty", b"", "no bundle"),
        ("cut", content[:-1000], "not the one it ends with"),
        ("swapped", bytes(swapped), "not the one it ends with"),
        ("sealed anew", sealed, "damaged"),
        ("of x86", foreign, "engines are not built on the device"),
    ):
        (tmp_path / "b.edgemm").write_bytes(wrong)
        code, report, stderr = run(tmp_path / "b.edgemm")
        assert (code, report) == (2, None), name
        assert why in stderr and "fix:" in stderr, stderr
    assert "cannot read bundle" in run(tmp_path / "none.edgemm")[2]


def test_without_tensorrt_or_a_device_it_says_so(small_bundle: Path, run: Run, tmp_path: Path) -> None:
    code, report, stderr = run(small_bundle, driver=0)
    assert (code, report) == (3, None) and "there is no CUDA device: cuInit: CUDA error 100" in stderr
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    command = [sys.executable, str(small_bundle.parent / "device_runner.py"), str(small_bundle)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3 and "libnvinfer.so.10" in done.stderr and "fix:" in done.stderr


def test_a_device_that_the_bundle_is_not_for_builds_nothing(tmp_path: Path, run: Run) -> None:
    code, report, stderr = run(with_spec(devices.bundle(tmp_path, ["head"]), sm=[86, 110]))
    assert (code, report) == (3, None)
    assert "this device has compute capability 8.7, and the bundle is for 8.6, 11.0" in stderr and "fix:" in stderr
    assert not list((tmp_path / "cache").glob("*.engine"))


def test_sparse_kernels_are_for_targets_that_ask_for_them(small_bundle: Path, run: Run, tmp_path: Path) -> None:
    log = tmp_path / "built"
    run(with_spec(devices.bundle(tmp_path, ["head"]), sparsity="2:4"), log=str(log))
    assert [line.endswith(" sparse") for line in log.read_text().splitlines()] == [True, True]


def test_the_boards_power_mode_is_recorded(tmp_path: Path, run: Run) -> None:
    bundle = with_spec(devices.bundle(tmp_path, ["head"]), power_mode="15W", workspace_mb=64)
    tool = tmp_path / "bin" / "nvpmodel"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n[ "$1" = -q ] && printf "NV Power Mode: 15W\\n0\\n"\n')
    tool.chmod(0o755)
    report = run(bundle, environment={"PATH": f"{tool.parent}:{os.environ['PATH']}"})[1]
    assert report and report["power"]["nvpmodel"] == "NV Power Mode: 15W\n0"
    assert not any("power mode" in note for note in report["notes"])
    other = with_spec(bundle, power_mode="MAXN_SUPER")
    report = run(other, environment={"PATH": f"{tool.parent}:{os.environ['PATH']}"})[1]
    assert report and any("meant for power mode MAXN_SUPER" in note for note in report["notes"])
    report = run(bundle, environment={"PATH": str(tmp_path)})[1]
    assert report and report["power"]["nvpmodel"] is None
    assert any("nvpmodel is absent" in note for note in report["notes"])


def test_clocks_are_read_from_sys(tmp_path: Path) -> None:
    assert clocks(tmp_path) is None
    cpu, gpu = tmp_path / "devices/system/cpu/cpufreq/policy0", tmp_path / "class/devfreq/17000000.gpu"
    for folder, prefix, values in ((cpu, "scaling_", ("1510400", "schedutil")), (gpu, "", ("624750000", "nvhost"))):
        folder.mkdir(parents=True)
        (folder / f"{prefix}cur_freq").write_text(values[0] + "\n")
        (folder / f"{prefix}governor").write_text(values[1] + "\n")
    unknown = {"min_freq": None, "max_freq": None}
    assert clocks(tmp_path) == {
        "policy0": {"cur_freq": 1510400, "governor": "schedutil", **unknown},
        "17000000.gpu": {"cur_freq": 624750000, "governor": "nvhost", **unknown},
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake in this process."""
    monkeypatch.setattr(ctypes, "CDLL", ctypes.CDLL)
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.delenv("FAKE_TENSORRT", raising=False)
    monkeypatch.syspath_prepend(FAKE)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    import tensorrt

    yield tensorrt
    monkeypatch.delitem(sys.modules, "tensorrt")


def test_in_process_it_prints_the_report(
    fake: Any, small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(small_bundle), "--cache", str(tmp_path / "c"), "--report", str(tmp_path / "r.json")]
    assert device_runner.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "r.json").read_bytes())
    assert device_runner.main(arguments) == 0
    assert "head: int8 (INT8 has " in capsys.readouterr().out
    assert device_runner.main([str(small_bundle), "--cache", "/proc/no/place"]) == 2
    assert "fix: free some space, or choose another --cache" in capsys.readouterr().err


def test_an_engine_takes_every_shape_of_its_profile_and_no_other(fake: Any, small_bundle: Path, tmp_path: Path) -> None:
    cuda = device_runner.Cuda()
    cuda.activate()
    bundle = Bundle(small_bundle)
    cache = Cache(tmp_path, bundle, device_runner.hardware_of(fake, cuda))
    cache.build(fake, "head", "int8")
    plan, _ = cache.find("head", "int8") or (b"", {})
    engine = device_runner.Engine(fake, cuda, plan)
    wide = devices.WIDTHS["head"][2]
    for batch in (1, 4, 2):  # memory grows and is used again
        rows = np.random.default_rng(batch).standard_normal((batch, wide), np.float32)
        together, alone = engine({"h": rows})["logits"], [engine({"h": row[None]})["logits"][0] for row in rows]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
    with pytest.raises(Unfit, match=r"h \[5, 32\] is outside the engine's profile"):
        engine({"h": np.zeros((5, wide), np.float32)})
    engine.close()
    assert not fake.DRIVER.blocks, "no device memory is left"


def test_a_dynamic_input_without_a_profile_is_refused(fake: Any) -> None:
    graph = devices.graph("head", "fp16").SerializeToString()
    with pytest.raises(Unfit, match="no profile for the dynamic input h"):
        device_runner.build_engine(fake, graph, {}, None, b"")
    with pytest.raises(Unfit, match="kOPT values for profile 0 violate shape constraints"):
        shapes = {"min": [1, 31], "opt": [1, 31], "max": [1, 31]}
        device_runner.build_engine(fake, graph, {"h": shapes}, 64, b"")
    with pytest.raises(Unfit, match="the parser refuses it: Failed to parse"):
        device_runner.build_engine(fake, b"no graph", {}, None, b"")


def test_blocks_alternate_so_that_a_drift_falls_on_both() -> None:
    order: list[str] = []
    a, b = abba([lambda _: order.append("a"), lambda _: order.append("b")], [None], 2)
    assert a.shape == b.shape == (2, 2 * device_runner.BLOCK)
    timed = "".join(order[2 * device_runner.WARM_UP :])
    block = device_runner.BLOCK
    assert timed == ("a" * block + "b" * 2 * block + "a" * block) * 2


def test_int8_is_shipped_only_when_it_is_surely_faster() -> None:
    both = ["fp16", "int8"]
    assert choose(both, {"p50": 1.2, "ci95": [1.01, 1.4]})[0] == "int8"
    assert choose(both, {"p50": 1.2, "ci95": [1.0, 1.4]})[0] == "fp16"
    assert choose(both, {"p50": 0.9, "ci95": [0.8, 0.95]})[0] == "fp16"
    assert choose(["int8"], None)[0] == "int8"
    assert choose([], None)[0] is None


def test_signal_to_noise() -> None:
    want = np.array([3.0, -4.0])
    assert sqnr_db(want, want) == 200
    assert sqnr_db(want, np.zeros(2)) == 0
    assert sqnr_db(want, want * 0.9) == pytest.approx(20)
    assert sqnr_db(want, np.array([3.0, np.inf])) is None
    assert sqnr_db(np.array([3.0, -np.inf]), np.array([3.0, -1e9])) == 200, "a masked value may be any"
    with pytest.raises(Unfit, match=r"y has shape \[3\], not \[2\]"):
        check(lambda _: {"y": np.zeros(3)}, [({}, {"y": want})])


def test_it_needs_nothing_but_the_standard_library_numpy_and_tensorrt() -> None:
    source = Path(device_runner.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 10))
    imported = {a.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {(node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
    assert 'importlib.import_module("tensorrt")' in source


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_has_the_names_and_arguments_of_the_version(version: str) -> None:
    code = (
        "import json, tensorrt as t\n"
        "print(json.dumps([sorted(v) for v in (t.calls(), t.EVERY_CALL, t.read_contract()[t.VERSION])]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(FAKE), "FAKE_TENSORRT": json.dumps({"version": version})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    has, every, contract = map(set, json.loads(done.stdout))
    assert has == every & contract
    assert {
        call for call in every - contract if call.partition("(")[0] in {c.partition("(")[0] for c in contract}
    } == set()
    assert ("ICudaEngine.device_memory_size" in has) == (version != "11.4")
    assert "ICudaEngine.device_memory_size_v2" in has
