"""Checks that need a GPU: `python benchmarks/torch_gpu_checks.py --help`.

What they check is written for any device, so that the tests can run it on a CPU; the command wants a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.optim import Optimizer

from adamp_conformance.implementations import IMPLEMENTATIONS
from adamp_torch import SGDP, AdamP
from benchmarks.contenders import Parameters
from benchmarks.measure import Work, make_parameters, reason

console = Console()

# Convolutions, matrices with short rows, with long rows and with one row, vectors, a scalar and nothing at all.
SHAPES = [
    *[(64, 16, 3, 3), (64,)] * 3,
    *[(96, 32), (33, 7), (7, 33), (3, 70001), (1, 4096), (5000, 3), (), (0, 4)],
]
PATHS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
Make = Callable[[Parameters], Optimizer]


def makers(path: str, *, capturable: bool) -> Iterator[tuple[str, Make]]:
    """AdamP and SGDP on a path, with both kinds of momentum."""
    for nesterov in (False, True):
        options = PATHS[path] | {"lr": 1e-3, "weight_decay": 0.01, "nesterov": nesterov, "capturable": capturable}
        for name, make in (("AdamP", partial(AdamP, **options)), ("SGDP", partial(SGDP, momentum=0.9, **options))):
            yield f"{name} nesterov" if nesterov else name, make


class Run:
    """An optimizer on parameters of its own, and gradients that depend on the number of the step alone."""

    def __init__(self, make: Make, device: torch.device) -> None:
        self.params = make_parameters(SHAPES, torch.float32, device)
        self.start = [(p.detach().clone(), p.grad.clone()) for p in self.params if p.grad is not None]
        self.optimizer = make(self.params)
        self.t = 0

    def give_gradients(self) -> None:
        """Writes the next gradients into those that the parameters have, so that a captured step finds them."""
        self.t += 1
        for p, (_, noise) in zip(self.params, self.start, strict=True):
            assert p.grad is not None
            torch.mul(noise, self.t % 7 - 2, out=p.grad)

    def bits(self) -> list[Tensor]:
        """Parameters and state, as integers: NaN is then equal to itself, and 0 not to -0."""
        found = [p.detach() for p in self.params]
        for p in self.params:
            found += [x for _, x in sorted(self.optimizer.state[p].items()) if isinstance(x, Tensor)]
        return [x.contiguous().view(torch.int32) for x in found]


def assert_same_bits(a: Run, b: Run) -> None:
    """Raises AssertionError where two runs differ."""
    pairs = list(zip(a.bits(), b.bits(), strict=True))
    different = [i for i, (x, y) in enumerate(pairs) if not torch.equal(x, y)]
    assert not different, f"{len(different)} of {len(pairs)} tensors differ in some bit"


# --- the checks ------------------------------------------------------------------------------------------------------


def check_repeatable(make: Make, device: torch.device, steps: int) -> None:
    """Two runs of many steps end with the same bits (SPEC: STATE-2).

    Raises:
      AssertionError: they do not, or nothing happened in them.
    """
    runs = [Run(make, device) for _ in range(2)]
    for run in runs:
        for _ in range(steps):
            run.give_gradients()
            run.optimizer.step()
    assert_same_bits(*runs)
    start = [x.view(torch.int32) for x, _ in runs[0].start]
    assert not all(map(torch.equal, runs[0].bits(), start)), "no parameter was changed"


def check_replay(make: Make, device: torch.device, steps: int, capture: Callable[[Optimizer], Work]) -> None:
    """A step that is captured once and replayed gives the bits of steps that are taken one by one.

    Args:
      make: with `capturable=True`.
      device: of the parameters.
      steps: how often it is replayed.
      capture: records a step of the optimizer, without taking it, and returns what takes it.

    Raises:
      AssertionError: the bits differ.
    """
    plain, captured = (Run(make, device) for _ in range(2))
    for run in (plain, captured):
        for _ in range(3):  # the state is made, kernels are compiled and chosen
            run.give_gradients()
            run.optimizer.step()
    replay = capture(captured.optimizer)
    for _ in range(steps):
        plain.give_gradients()
        plain.optimizer.step()
        captured.give_gradients()
        replay()
    assert_same_bits(plain, captured)


def capture_graph(optimizer: Optimizer) -> Work:
    """Records a step in a CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def check_no_synchronization(make: Make, device: torch.device) -> None:
    """A step in the middle of training does not make the host wait.

    Raises:
      RuntimeError: it does; by PyTorch.
    """
    run = Run(make, device)
    run.optimizer.step()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def check_conformance(device: torch.device) -> None:
    """The conformance suite passes on the device.

    Raises:
      AssertionError: it does not; the report has been printed.
    """
    adapters = [f"--adapter={x.name}" for x in IMPLEMENTATIONS if x.backend == "torch"]
    code = "from adamp_conformance.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code, "run", "--device", device.type, "--jobs", "4", *adapters])
    assert run.returncode == 0, f"adamp-parity run ended with exit code {run.returncode}"


Check = tuple[str, Callable[[], None]]


def checks(names: Sequence[str], paths: Sequence[str], device: torch.device, steps: int) -> Iterator[Check]:
    """What is to be checked, in words, and the check."""
    for path in paths if "sync" in names else ():
        for capturable in (False, True):
            for name, make in makers(path, capturable=capturable):
                words = f"no synchronization: {name}, {path}{', capturable' if capturable else ''}"
                yield words, partial(check_no_synchronization, make, device)
    for path in paths if "graph" in names else ():
        for name, make in makers(path, capturable=True):
            words = f"a CUDA graph replayed {_REPLAYS} times: {name}, {path}"
            yield words, partial(check_replay, make, device, _REPLAYS, capture_graph)
    for path in paths if "repeat" in names else ():
        for name, make in makers(path, capturable=False):
            yield f"the same bits after {steps:,} steps: {name}, {path}", partial(check_repeatable, make, device, steps)
    if "conformance" in names:
        yield "the conformance suite", partial(check_conformance, device)


_REPLAYS = 100
CHECKS = ("sync", "graph", "repeat", "conformance")


def perform(todo: Iterator[Check]) -> int:
    """Does the checks and prints what came of each; returns how many failed."""
    failed = 0
    for words, check in todo:
        try:
            check()
        except Exception as error:
            failed += 1
            console.print(f"[red]failed[/]  {escape(words)}: {escape(reason(error))}", soft_wrap=True, highlight=False)
        else:
            console.print(f"[green]passed[/]  {escape(words)}", soft_wrap=True, highlight=False)
    return failed


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", "names", multiple=True, type=click.Choice(CHECKS), help="Default: all. Repeatable.")
@click.option("--path", "paths", multiple=True, type=click.Choice(list(PATHS)), help="Default: all. Repeatable.")
@click.option("--steps", type=click.IntRange(1), default=10_000, show_default=True, help="Of the check `repeat`.")
def main(names: Sequence[str], paths: Sequence[str], steps: int) -> None:
    """Checks on the current GPU that steps repeat, can be captured, do not wait, and conform.

    Exit codes: 0 all checks passed; 1 some failed; 2 there is no GPU.
    """
    if not torch.cuda.is_available():
        raise click.UsageError(
            f"PyTorch {torch.__version__} finds no GPU, and these checks are for one; "
            "tests/test_benchmarks.py runs what it can of them on a CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    console.print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}", highlight=False)
    failed = perform(checks(names or CHECKS, paths or list(PATHS), device, steps))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
