"""A suite that cannot fail proves nothing: each fault planted into a backend's source is found and the case named."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# fault -> case that must find it, and per backend: file, what stands there, what is planted
FAULTS = {
    "wrong axis": (
        "adamp/digits",
        {
            "torch": ("_layouts.py", "DEFAULT = Layout(0)", "DEFAULT = Layout(-1)"),
            "keras": ("_layouts.py", "LAST = Layout(-1)\n", "LAST = Layout(0)\n"),
            "optax": ("_layouts.py", 'w_h)$", Layout(-1))', 'w_h)$", Layout(0))'),
        },
    ),
    "lost wd_ratio": (
        "adamp/views",
        {
            "torch": ("_projection.py", "masked_fill(projected, wd_ratio)", "masked_fill(projected, 1.0)"),
            "keras": ("_projection.py", "ops.where(projected, ratio, one)", "ops.where(projected, one, one)"),
            "optax": ("_projection.py", "jnp.where(projected, wd_ratio, ", "jnp.where(projected, 1.0, "),
        },
    ),
    "float32 1 - beta**t": (
        "adamp/second-step",
        {
            "torch": (
                "_base.py",
                "float(one_minus_power(beta, int(step.item())))",
                "float(1 - torch.tensor(beta, dtype=torch.float32) ** step)",
            ),
            "keras": ("_adamp.py", "ops.where(x > -1, -near * series, 1 - ops.exp(x))", "1 - ops.exp(x)"),
            "optax": ("_adamp.py", "jnp.where(x > -1, -near * series, 1 - jnp.exp(x))", "1 - base**exponent"),
        },
    ),
    "mean for maximum": (
        "adamp/views",
        {
            "torch": (
                "_projection.py",
                "~(_cosine(sums, eps) <",
                "~(_cosine(sums, eps).mean(dim=rows.channel, keepdim=True) <",
            ),
            "keras": (
                "_projection.py",
                "ops.all(cosine < delta / math.sqrt(length), axis=rows.channel, keepdims=True)",
                "ops.mean(cosine, axis=rows.channel, keepdims=True) < delta / math.sqrt(length)",
            ),
            "optax": (
                "_projection.py",
                "return cosine <",
                "return jnp.mean(cosine, rows.channel, keepdims=True) + 0 * cosine <",
            ),
        },
    ),
    "undivided decay": (
        "sgdp/views",
        {
            "torch": ("_sgdp.py", "(weight_decay / (1 - momentum))", "weight_decay"),
            "keras": ("_sgdp.py", "(self.weight_decay / (1 - self.momentum))", "self.weight_decay"),
            "optax": ("_sgdp.py", "c(decay / (1 - momentum))", "c(decay)"),
        },
    ),
    "eps moved": (
        "adamp/eps",
        {
            "torch": ("_adamp.py", "(v.sqrt() / sqrt_bc2 + eps)", "((v.sqrt() + eps) / sqrt_bc2)"),
            "keras": (
                "_adamp.py",
                "(ops.sqrt(v) / sqrt_bc2 + self.epsilon)",
                "((ops.sqrt(v) + self.epsilon) / sqrt_bc2)",
            ),
            "optax": ("_adamp.py", "(jnp.sqrt(v) / sqrt_bc2 + c(eps))", "((jnp.sqrt(v) + c(eps)) / sqrt_bc2)"),
        },
    ),
}
PACKAGES = {"torch": "adamp_torch", "keras": "adamp_tf", "optax": "adamp_jax"}


@pytest.fixture
def copy(tmp_path):
    """Copies a backend's package to where it is imported from before the real one."""

    def make(backend):
        package = PACKAGES[backend]
        shutil.copytree(Path(importlib.util.find_spec(package).origin).parent, tmp_path / package)
        return tmp_path / package

    return make


def run(folder, backend, case):
    command = [sys.executable, "-m", "adamp_conformance.cli", "run", "--adapter", f"{backend}-eager", "-k", case]
    command += ["--dtype", "float32", "--mode", "step", "--mode", "shadow", "--jobs", "1"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True
    )  # -m looks in the working directory first


@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(copy, fault, backend):
    case, places = FAULTS[fault]
    name, before, after = places[backend]
    path = copy(backend) / name
    source = path.read_text()
    assert source.count(before) == 1, f"{before!r} must stand once in {name}"
    path.write_text(source.replace(before, after))
    result = run(path.parent.parent, backend, case)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(rf"failed {case}(/\S+)? {backend}-eager float32", result.stdout), result.stdout


@pytest.mark.parametrize("backend", PACKAGES)
def test_the_copy_without_a_fault_conforms(copy, backend):
    folder = copy(backend).parent
    for case in ("adamp/eps", "adamp/views"):
        result = run(folder, backend, case)
        assert result.returncode == 0, result.stdout + result.stderr
