"""The fused path on CUDA: `triton_steps.py`, on the device where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

STEPS = Path(__file__).parent / "triton_steps.py"


@pytest.mark.parametrize("part", ["vectors", "not vectors"])
def test_the_kernels_pass(part):
    """In a process of its own: Triton chooses between interpreter and device when it is imported."""
    chosen = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", STEPS, "-q", "-k", part, "-p", "no:cacheprovider", "-W", "ignore"]
    run = subprocess.run(command, env=os.environ | chosen, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
