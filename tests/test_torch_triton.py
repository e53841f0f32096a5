"""The fused path on CUDA: `triton_steps.py`, on the device where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

STEPS = Path(__file__).parent / "triton_steps.py"


def test_what_the_kernels_do_to_tensors():
    """In processes of their own: Triton chooses between device and interpreter when it is imported."""
    chosen = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", STEPS, "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    parts = [
        subprocess.Popen([*command, part], env=os.environ | chosen, **pipes) for part in ("vectors", "not vectors")
    ]
    outputs = [part.communicate()[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], "".join(outputs)
