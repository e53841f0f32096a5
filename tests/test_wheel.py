"""The wheel builds, and installs with each extra alone into an environment that holds nothing else."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("adamp_conformance", "adamp_jax", "adamp_spec", "adamp_tf", "adamp_torch")
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "optax", "flax"}

# extra -> the frameworks that it may bring, and a program that takes a step
EXTRAS = {
    "torch": (
        {"torch"},
        """
import torch, adamp_torch
p = torch.nn.Parameter(torch.ones(2, 3))
p.grad = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
adamp_torch.AdamP([p], lr=0.1).step()
assert not torch.equal(p, torch.ones(2, 3))
""",
    ),
    "tf": (
        {"keras", "tensorflow"},
        """
import keras, adamp_tf
p = keras.Variable(keras.ops.ones((3, 2)))
adamp_tf.AdamP(0.1).apply([keras.ops.ones((3, 2))], [p])
assert float(p[0, 0]) != 1.0
""",
    ),
    "jax": (
        {"jax", "optax"},
        """
import jax.numpy as jnp, adamp_jax
p = {"kernel": jnp.ones((3, 2))}
optimizer = adamp_jax.adamp(0.1)
updates, _ = optimizer.update(p, optimizer.init(p), p)
assert float(updates["kernel"][0, 0]) != 0.0
""",
    ),
    "conformance": (
        set(),
        """
from click.testing import CliRunner
from adamp_conformance import cli
result = CliRunner().invoke(cli.main, ["run", "-k", "adamp/zeros", "--jobs", "1"])
assert result.exit_code == 0, result.output
for extra in ("torch", "tf", "jax"):
    assert f'adamp-parity[{extra},conformance]' in " ".join(result.output.split()), result.output
assert CliRunner().invoke(cli.main, ["explain", "adamp/views/channel"]).exit_code == 0

import subprocess, sys
from pathlib import Path
from adamp_conformance.spec_files import spec_file
command = Path(sys.executable).with_name("adamp-parity")
def run():
    arguments = ["run", "--adapter", "oracle", "-k", "adamp/zeros", "--jobs", "1"]
    return subprocess.run([command, *arguments], capture_output=True, text=True)
assert run().returncode == 0, run().stdout
vectors = spec_file("vectors/large/adamp-long-rows.float32.safetensors")
vectors.write_bytes(vectors.read_bytes()[:-1] + b"?")
assert run().returncode == 3, run().stdout
assert "large/adamp-long-rows.float32.safetensors has changed" in run().stdout
""",
    ),
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT], check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_brings_what_the_harness_reads(wheel):
    """All of the specification but its oracle, which is a package of its own, unchanged."""
    spec = ROOT / "spec"
    files = {path.relative_to(spec).as_posix(): path.read_bytes() for path in spec.rglob("*") if path.is_file()}
    wanted = {name: content for name, content in files.items() if not name.startswith("adamp_spec/")}
    assert {"SPEC.md", "PROTOCOL.md", "mutants.toml", "variants.toml", "vectors/MANIFEST.json"} <= set(wanted)
    assert "schema/vectors.schema.json" in wanted
    prefix = "adamp_conformance/spec/"
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        found = {name.removeprefix(prefix): archive.read(name) for name in names if name.startswith(prefix)}
    assert found == wanted
    assert "adamp_conformance/templates/report.html.j2" in names
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 3_000_000


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_alone(wheel, tmp_path, extra):
    allowed, program = EXTRAS[extra]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[{extra}]"]
    subprocess.run(install, check=True)
    check = f"""
from importlib.util import find_spec
import sys
found = {{name for name in {FRAMEWORKS!r} if find_spec(name)}}
assert found == {allowed!r}, found
{program}
loaded = {FRAMEWORKS!r} & set(sys.modules)
assert loaded <= {allowed!r}, loaded
import adamp_spec
assert {str(tmp_path)!r} in adamp_spec.__file__
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([python, "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
