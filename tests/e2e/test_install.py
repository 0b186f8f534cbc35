"""A wheel in a bare environment, outside the checkout: the device side."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of an environment with the wheel and its [openvino] extra, nothing else."""
    where = tmp_path_factory.mktemp("device")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(where / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (where / "dist").glob("*.whl")
    venv.create(where / "env", with_pip=True)
    pip = [str(where / "env" / "bin" / "pip"), "install", "--quiet", f"edgemm[openvino] @ file://{wheel}"]
    subprocess.run(pip, check=True, capture_output=True)
    return where / "env" / "bin"


def size_bytes(device: Path) -> int:
    """Of what pip installed, without itself and what a new environment has."""
    (site,) = device.parent.glob("lib/python3*/site-packages")
    own = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    parts = [p for p in site.iterdir() if not p.name.startswith(own)]
    return sum(f.stat().st_size for p in parts for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file())


def run(device: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([device / "edgemm", *arguments], capture_output=True, text=True, cwd=cwd, check=False)


def test_recipes_and_targets_are_found_by_name(device: Path, tmp_path: Path) -> None:
    for folder, name in (("recipes", "reasoner"), ("targets", "x86-openvino")):
        done = run(device, folder, "show", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"name: {name}" in done.stdout


def test_the_device_has_no_toolchain_and_says_how_to_get_it(device: Path, tmp_path: Path) -> None:
    listed = subprocess.run([device / "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "nncf", "onnx"} & {line.split()[0] for line in listed.splitlines()}
    done = run(device, "compress", "reasoner", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "pip install 'edgemm[compress]'" in done.stderr


def test_a_bundle_answers(device: Path, bundle: Path, tmp_path: Path) -> None:
    from edgemm.data.easy_vqa import samples

    sample = samples("test")[0]
    done = run(device, "run", str(bundle), "--image", str(sample.image), "--text", sample.text, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sample.label


def test_it_takes_under_300_mb_without_what_a_cpu_never_loads(device: Path, bundle: Path, tmp_path: Path) -> None:
    """By the README's commands; the bundle still answers."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = "\n".join(line for line in lines if line.startswith("    rm -"))
    (libs,) = device.parent.glob("lib/python3*/site-packages/openvino/libs")
    subprocess.run(["bash", "-c", commands], check=True, cwd=libs)
    assert size_bytes(device) < 300e6
    test_a_bundle_answers(device, bundle, tmp_path)
