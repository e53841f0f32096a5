"""What the kernels of the fused path on CUDA may cost, compiled ahead of time for GPUs that need not be there."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamp_torch import _fused_cuda

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
REGISTERS = {"statistics": 96, "decide": 255, "update": 128}  # 128 let a multiprocessor work on two tiles at a time
ACCESSES = {"statistics": 2, "update": 7}  # of an element, by AdamP
SINGLE, MIXED, SGDP = (torch.float32,) * 4, (torch.bfloat16,) * 2 + (torch.float32,) * 2, (torch.float32,) * 3

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled where it is interpreted")


@cache
def compiled(name, target, dtypes=SINGLE, again=False, module=_fused_cuda, **options):
    """A kernel, specialized as the launch does it."""
    kernel = getattr(module, name)
    fixed = module.specialize(dtypes)
    constants = {k: x for k, x in (fixed.tile | fixed.update | {"AGAIN": again}).items() if k in kernel.arg_names}
    types = {"views": "*i32", "coefficients": "*fp64", "sums": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32"}
    types |= dict.fromkeys(("tiles_in_all", "decided", "tensors"), "i32")
    signature = {k: "constexpr" if k in constants else types.get(k, "*i64") for k in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(kernel.arg_names) if signature[k][0] == "*"}
    options = (fixed.decide_options if name == "decide" else fixed.options) | options
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def excess(name, program, dtypes=SINGLE):
    """What a program takes beyond its budget; nothing if it keeps it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        listed = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {k: int(x) for k, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    found = {"registers": usage["REG"]} if usage["REG"] > REGISTERS[name] else {}
    found |= {"spilled": usage["STACK"] + usage["LOCAL"]} if usage["STACK"] + usage["LOCAL"] else {}
    if name == "decide":
        return found

    blocks = Counter(re.findall(r"tt\.(?:load|store) .*: tensor<(\d+x\d+)x!tt.ptr<(?!f64)", program.asm["ttir"]))
    if len(blocks) != _fused_cuda.KINDS.value or any(count > ACCESSES[name] for count in blocks.values()):
        found["accesses"] = dict(blocks)

    # Each access of a dense tile is made of 16-byte ones, as many as it takes.
    bytes_per_element = {"statistics": dtypes[:2], "update": (*dtypes, dtypes[0], *dtypes[2:])}[name]
    wanted = sum(x.itemsize for x in bytes_per_element) * _fused_cuda.TILE // (32 * program.metadata.num_warps * 16)
    wide = re.findall(r"(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64) ", program.asm["ptx"])
    if len(wide) != wanted * _fused_cuda.DENSE_KINDS.value:
        found["accesses of 16 bytes"] = len(wide), wanted * _fused_cuda.DENSE_KINDS.value
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", REGISTERS)
def test_kernels_keep_their_budget(name, target):
    assert excess(name, compiled(name, target)) == {}


def test_an_element_is_accessed_nine_times():
    assert sum(ACCESSES.values()) == 9


@pytest.mark.parametrize("target", TARGETS)
def test_the_second_update_spills_nothing(target):
    found = excess("update", compiled("update", target, again=True))
    assert found.keys() <= {"accesses of 16 bytes"}, "some of its accesses are conditional, and fewer"


@pytest.mark.parametrize("name", ["statistics", "update"])
def test_halves_keep_the_budget_with_moments_in_single_precision(name):
    assert excess(name, compiled(name, 90, MIXED), MIXED) == {}


def test_halves_are_rounded_to_nearest():
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", compiled("update", 90, MIXED).asm["ptx"])


def test_roots_and_quotients_are_rounded_correctly():
    ptx = compiled("update", 90).asm["ptx"]
    assert "sqrt.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"(sqrt|div|rcp)\.(approx|full)|\.ftz", ptx)


@pytest.mark.parametrize(
    ("before", "after", "options", "exceeded"),
    [
        ("tl.multiple_of(start, 16)", "start", {}, "accesses of 16 bytes"),
        ("gp = tl.sum(p * p, 1)", "gp = tl.sum(p * tl.load(p_at, exists, 0, volatile=True), 1)", {}, "accesses"),
        ("", "", {"maxnreg": 32}, "spilled"),
        ("", "", {"num_warps": 2, "maxnreg": 255}, "registers"),
    ],
)
def test_what_exceeds_the_budget_is_found(before, after, options, exceeded, tmp_path, monkeypatch):
    source = Path(_fused_cuda.__file__).read_text()
    assert not before or source.count(before) == 1
    path = tmp_path / f"planted_{hash((before, exceeded)) % 10**8}.py"
    path.write_text(source.replace(before, after) if before else source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    assert exceeded in excess("statistics", compiled("statistics", 90, module=module, **options))
