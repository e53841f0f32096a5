"""What must be refused: problems of ones with one thing wrong (SPEC: HYPER-2, HYPER-3, LAYOUT-7, REFUSE-2 to -4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from adamp_conformance.judge import ALGORITHMS
from adamp_conformance.vectors import PARTS, Kind, Refusal
from adamp_spec import Layout

VALID: dict[str, dict[str, Any]] = {
    "adamp": asdict(ALGORITHMS["adamp"].hyper(weight_decay=0.01)),
    "sgdp": asdict(ALGORITHMS["sgdp"].hyper(lr=0.1, momentum=0.9, weight_decay=0.01)),
}

# Hyperparameter -> word for the name -> value outside the domain.
OUTSIDE: dict[str, dict[str, float]] = {
    "lr": {"negative": -1e-3, "infinite": math.inf, "nan": math.nan},
    "beta1": {"negative": -0.1, "one": 1.0, "nan": math.nan},
    "beta2": {"negative": -0.1, "one": 1.0, "above-one": 1.5, "nan": math.nan},
    "momentum": {"negative": -0.1, "one": 1.0, "nan": math.nan},
    "dampening": {"negative": -0.1, "above-one": 1.1, "nan": math.nan},
    "eps": {"zero": 0.0, "negative": -1e-8, "subnormal": 1e-39, "nan": math.nan},
    "weight_decay": {"negative": -1e-2, "infinite": math.inf, "nan": math.nan},
    "delta": {"negative": -0.1, "nan": math.nan},
    "wd_ratio": {"negative": -0.1, "nan": math.nan},
}

SHAPE = (4, 8)

LAYOUTS = {
    "axis-too-large": ("the tensor has no axis 2", Layout(2)),
    "axis-too-small": ("the tensor has no axis -3", Layout(-3)),
    "batch-axis-too-large": ("the tensor has no axis 2 to batch over", Layout(0, batch=2)),
    "axis-twice": ("one axis named twice as channel", Layout((0, 0))),
    "channel-and-batch": ("one axis named as channel and as batch", Layout(0, batch=0)),
    "last-channel-and-batch": ("the last axis named as channel and as batch", Layout(-1, batch=1)),
    "view-of-another-size": ("a view with another number of elements", Layout(0, view=(4, 9))),
}

# Name -> purpose, clause, and the parts of the problem that have another dtype or shape than they should.
INPUTS: dict[str, tuple[str, str, dict[str, Kind]]] = {
    "parameter-integer": ("an integer parameter", "REFUSE-2", dict.fromkeys(PARTS, ("int32", SHAPE))),
    "parameter-complex": ("a complex parameter", "REFUSE-2", dict.fromkeys(PARTS, ("complex64", SHAPE))),
    "gradient-integer": ("an integer gradient", "REFUSE-2", {"gradient": ("int32", SHAPE)}),
    "gradient-complex": ("a complex gradient", "REFUSE-2", {"gradient": ("complex64", SHAPE)}),
    "gradient-transposed": ("a gradient of the transposed shape", "REFUSE-3", {"gradient": ("float32", (8, 4))}),
    "gradient-flat": ("a gradient that was flattened", "REFUSE-3", {"gradient": ("float32", (32,))}),
    "gradient-one-row": ("a gradient that would broadcast", "REFUSE-3", {"gradient": ("float32", (1, 8))}),
    "state-transposed": ("a state of the transposed shape", "REFUSE-4", {"state": ("float32", (8, 4))}),
    "state-one-row": ("a state that would broadcast", "REFUSE-4", {"state": ("float32", (1, 8))}),
}


def valid(algorithm: str) -> Refusal:
    """The problem of ones that all refusals change: it is to be accepted."""
    id, purpose, kind = f"{algorithm}/invalid/nothing", "nothing is wrong", ("float32", SHAPE)
    return Refusal(id, purpose, (), (), algorithm, VALID[algorithm], Layout().to_dict(), kind, kind, kind)


def designed(what: str) -> Iterator[Refusal]:
    """The refusals of one file: `hyperparameters` or `inputs`."""
    for algorithm in ALGORITHMS:
        base = valid(algorithm)

        def refusal(name: str, purpose: str, clauses: tuple[str, ...], base: Any = base, **changed: Any) -> Refusal:
            id = f"{base.algorithm}/invalid/{name}"
            return replace(base, id=id, purpose=purpose, clauses=clauses, flags=(what,), **changed)

        if what == "inputs":
            for name, (purpose, clause, kinds) in INPUTS.items():
                yield refusal(name, purpose, (clause, "REFUSE-5"), **kinds)
            for name, (purpose, layout) in LAYOUTS.items():
                yield refusal(f"layout-{name}", purpose, ("LAYOUT-7",), layout=layout.to_dict())
            continue
        for hyper, values in OUTSIDE.items():
            for word, value in values.items() if hyper in base.hyper else ():
                name, changed = f"{hyper.replace('_', '-')}-{word}", base.hyper | {hyper: value}
                yield refusal(name, f"{hyper} = {value} is outside its domain", ("HYPER-2",), hyper=changed)
        if algorithm == "sgdp":
            for name, dampening in (("nesterov-without-momentum", 0.0), ("dampened-nesterov-without-momentum", 0.5)):
                changed = base.hyper | {"momentum": 0.0, "nesterov": True, "dampening": dampening}
                yield refusal(name, "Nesterov's form needs a momentum", ("HYPER-3",), hyper=changed)
