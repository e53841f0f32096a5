"""With delta = 0, AdamP is AdamW and SGDP is SGD with decoupled decay: the frameworks' own, put to the same judge.

Both ours and theirs must lie within the bounds of the same oracle. Theirs compute `1 - beta**t` by cancellation, which
costs hundreds of roundings in the first steps, so they are judged at a step where nothing cancels; that the judge
notices the early steps of Optax is a test of its own.
"""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import torch

import adamp_jax
from adamp_conformance.adapters.keras import KerasAdapter
from adamp_conformance.adapters.optax import OptaxAdapter
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.cases import DESIGNED
from adamp_conformance.modes import Bench, Problem, create
from adamp_conformance.modes import shadow as shadow_mode

BY_ID = {case.id: case for case in DESIGNED}
ADAMW = replace(BY_ID["adamp/never-project"], step=20_000, steps=20)
SGDW = replace(BY_ID["sgdp/never-project"], steps=20)


class TorchAdamW(TorchAdapter):
    def create(self, algorithm, hyper, parameters):
        super().create(algorithm, hyper, parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=hyper["lr"],
            betas=(hyper["beta1"], hyper["beta2"]),
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
        )


class TorchSGDWithDecoupledDecay(TorchAdapter):
    """`torch.optim.SGD` after the decay that it does not know; it keeps no step count, so this does."""

    def create(self, algorithm, hyper, parameters):
        super().create(algorithm, hyper, parameters)
        self.sgd = torch.optim.SGD(
            self.parameters.values(), lr=hyper["lr"], momentum=hyper["momentum"], nesterov=hyper["nesterov"]
        )
        self.keep = 1 - hyper["lr"] * hyper["weight_decay"] / (1 - hyper["momentum"])

    def step(self, gradients):
        for name, parameter in self.parameters.items():
            parameter.grad = self._tensor(gradients[name])
            state = self.optimizer.state[parameter]
            self.sgd.state[parameter]["momentum_buffer"] = state["momentum"]
            with torch.no_grad():
                parameter.mul_(self.keep)
                state["step"] += 1
        self.sgd.step()


class OptaxAdamW(OptaxAdapter):
    def create(self, algorithm, hyper, parameters):
        super().create(algorithm, hyper, parameters)
        transform = optax.adamw(
            hyper["lr"], hyper["beta1"], hyper["beta2"], hyper["eps"], weight_decay=hyper["weight_decay"]
        )

        def step(params, state, gradients):
            updates, state = transform.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.take_step = step
        with self._settings():
            self.state = transform.init(self.parameters)


def shadow(make, case, dtype):
    problem = Problem(case, dtype, "torch")
    return shadow_mode(Bench(create(make, problem), problem, make, {}))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("make", [TorchAdamW, TorchAdapter, OptaxAdamW, OptaxAdapter, KerasAdapter])
def test_adamw(make, dtype):
    outcome = shadow(make, ADAMW, dtype)
    assert outcome.problem is None
    assert not any(np.any(branch) for branch in outcome.worst.verdict.branches.values())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("make", [TorchSGDWithDecoupledDecay, TorchAdapter, OptaxAdapter, KerasAdapter])
def test_sgdw(make, nesterov, dtype):
    outcome = shadow(make, replace(SGDW, hyper=SGDW.hyper | {"nesterov": nesterov}), dtype)
    assert outcome.problem is None


def test_the_judge_notices_the_bias_correction_of_optax_adamw():
    case = replace(ADAMW, step=1, hyper=ADAMW.hyper | {"lr": 0.5})
    assert shadow(TorchAdamW, case, "float32").problem is None
    outcome = shadow(OptaxAdamW, case, "float32")
    assert "times the bound" in outcome.problem
    assert 1 < outcome.worst.verdict.margin < 1000


def test_float64_from_the_first_step():
    """A hundred steps on their own, ours beside theirs: the coefficients differ in the last bits, nothing else does."""
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal((8, 16)), rng.standard_normal((100, 8, 16))
    with jax.enable_x64(True):
        ends = []
        for transform in (optax.adamw(0.01, weight_decay=0.1), adamp_jax.adamp(0.01, weight_decay=0.1, delta=0.0)):
            params = jax.numpy.asarray(start)
            state = transform.init(params)
            for gradient in gradients:
                updates, state = transform.update(jax.numpy.asarray(gradient), state, params)
                params = optax.apply_updates(params, updates)
            ends.append(np.asarray(params))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-12, atol=1e-12)
