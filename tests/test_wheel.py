"""The wheel builds, and installs with each extra alone into an environment that holds nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
assert CliRunner().invoke(cli.main, ["explain", "adamp/views"]).exit_code == 0
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
