"""What the kernels of the fused path on CUDA may cost, compiled ahead of time for GPUs that need not be there."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from adamp_spec import Layout
from adamp_torch import _fused_cuda
from adamp_torch._paths import Batch

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# With 128 registers to a thread of 8 warps, a multiprocessor works on two tiles at a time.
REGISTERS = {"statistics": 96, "decide": 255, "update": 128, "update again": 128}
ACCESSES = {"statistics": 2, "update": 7}  # of an element, by AdamP
SINGLE, MIXED = (torch.float32,) * 4, (torch.bfloat16,) * 2 + (torch.float32,) * 2

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled where it is interpreted")


class Driver:
    """What a launch asks of the driver before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0


@cache
def launches(target, dtypes=SINGLE, module=_fused_cuda, lr=1e-3):
    """The launches of a step with AdamP, by name: each compiles its program as it would before it runs it."""
    params, grads, *moments = ([torch.zeros(s, dtype=dtype) for s in ((4, 8), (5,))] for dtype in dtypes)
    flags = dict.fromkeys(("nesterov", "maximize", "capturable", "differentiable"), False)
    numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1, "lr": lr}
    rows = [Layout(0).rows(tuple(x.shape)) for x in params]
    batch = Batch(params, grads, moments, [torch.zeros(()) for _ in params], rows, numbers | flags)
    found = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                name = self.kernel.__name__ + (" again" if options.get("AGAIN") else "")
                assert name not in found
                found[name] = partial(self.kernel.warmup, *args, grid=grid, **options)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("statistics", "decide", "update"):
            patch.setattr(module, name, Recorder(getattr(module, name)))
        module.adamp([batch], None, None)
    return found


def compiled(name, target, *args, **options):
    """The program that a launch would run."""
    found = launches(target, *args, **options)
    active = triton.runtime.driver
    before = active._active
    active.set_active(Driver(target))
    try:
        return found[name]()
    finally:
        active._active = before


def excess(name, program, dtypes=SINGLE):
    """What a program takes beyond its budget; nothing if it keeps it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        listed = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {k: int(x) for k, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    found = {"registers": usage["REG"]} if usage["REG"] > REGISTERS[name] else {}
    found |= {"spilled": usage["STACK"] + usage["LOCAL"]} if usage["STACK"] + usage["LOCAL"] else {}
    if name not in ACCESSES:
        return found

    blocks = Counter(re.findall(r"tt\.(?:load|store) .*: tensor<(\d+x\d+)x!tt.ptr<", program.asm["ttir"]))
    if len(blocks) != _fused_cuda.KINDS.value or any(count > ACCESSES[name] for count in blocks.values()):
        found["accesses"] = dict(blocks)

    # Each access to a dense tile must be made of as many 16-byte ones as that takes, and of nothing else.
    accessed = {"statistics": dtypes[:2], "update": (*dtypes, dtypes[0], *dtypes[2:])}[name]
    threads = 32 * program.metadata.num_warps
    needed = _fused_cuda.DENSE_KINDS.value * sum(x.itemsize for x in accessed) * _fused_cuda.TILE // (16 * threads)
    wide = len(re.findall(r"(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64) ", program.asm["ptx"]))
    return found | ({"accesses of 16 bytes": (wide, needed)} if wide != needed else {})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REGISTERS)
def test_kernels_keep_their_budget(name, target):
    assert excess(name, compiled(name, target)) == {}


def test_an_element_is_accessed_nine_times():
    assert sum(ACCESSES.values()) == 9


@pytest.mark.parametrize("name", ACCESSES)
def test_halves_keep_the_budget_with_moments_in_single_precision(name):
    assert excess(name, compiled(name, 90, MIXED), MIXED) == {}


def test_another_rate_is_another_number_and_not_another_program():
    assert compiled("update", 90, lr=0.5) is compiled("update", 90)


def test_halves_are_rounded_to_nearest():
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", compiled("update", 90, MIXED).asm["ptx"])


def test_roots_and_quotients_are_rounded_correctly():
    ptx = compiled("update", 90).asm["ptx"]
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"(sqrt|div|rcp)\.(approx|full)|\.ftz", ptx)


def test_the_corrections_are_computed_in_double():
    ptx = compiled("decide", 90).asm["ptx"]
    assert not re.search(r"(ex2|lg2|sqrt|div)\.approx|(sqrt|div)\.rn\.f32", ptx)
    assert "sqrt.rn.f64" in ptx


@pytest.mark.parametrize(
    ("before", "after", "exceeded"),
    [
        ("tl.multiple_of(start, 16)", "start", "accesses of 16 bytes"),
        ("gp = tl.sum(p * p, 1)", "gp = tl.sum(p * tl.load(p_at, exists, 0, volatile=True), 1)", "accesses"),
        ('"maxnreg": 128', '"maxnreg": 32', "spilled"),
        ('"num_warps": 2 * work.itemsize, "maxnreg": 128', '"num_warps": 2, "maxnreg": 255', "registers"),
    ],
)
def test_what_exceeds_the_budget_is_found(before, after, exceeded, tmp_path, monkeypatch):
    source = Path(_fused_cuda.__file__).read_text()
    assert source.count(before) == 1
    path = tmp_path / f"planted_{exceeded.replace(' ', '_')}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    assert exceeded in excess("statistics", compiled("statistics", 90, module=module))
