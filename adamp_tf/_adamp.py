from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops
from keras.backend import standardize_dtype

from adamp_spec import check_hyperparameter
from adamp_tf._base import ProjectedOptimizer
from adamp_tf._layouts import LayoutTable


@keras.saving.register_keras_serializable(package="adamp")
class AdamP(ProjectedOptimizer):
    """Adam whose step is kept orthogonal to scale-invariant weights.

    Where a weight's gradient is nearly orthogonal to the weight, as in front of a normalization
    layer, the part of the step along the weight only makes it grow. AdamP removes that part, and
    weakens the decay there; everywhere else it is AdamW.

    Both decisions look at a variable as rows, one per output channel, so the optimizer must know
    which axes are the channels. It goes by the path of the variable (see `adamp_tf.describe`).
    Layers with names of your own are told apart by `adamp_tf.layouts_for`.

    Arithmetic is done in float64 for float64 variables and in float32 for all others, and rounded
    once on storing; the slots have the variable's dtype. The learning rate is held in floatx.
    Sparse gradients are made dense.

    Args:
      learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
        without arguments.
      beta_1, beta_2: decay of the first and second moment, each in [0, 1).
      epsilon: added to the square root of the second moment and to norms; at least 2**-126.
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      delta: threshold on the cosine, scaled by 1/sqrt(row length); 0 never projects (AdamW).
      wd_ratio: factor on the weight decay of projected variables.
      nesterov: whether to use Nesterov momentum.
      layouts: path or regular expression -> `adamp_spec.Layout` (or its `to_dict()`), where the
        rules are wrong. A whole path wins over expressions.
      **kwargs: `name`, `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`, `ema_momentum`,
        `ema_overwrite_frequency`, `loss_scale_factor`, `gradient_accumulation_steps`, as in every
        Keras optimizer.

    Slots: "momentum" and "velocity", as in Keras's Adam.

    Raises:
      TypeError, ValueError: a hyperparameter outside its domain, an unknown argument.

    Reference: Heo et al., ICLR 2021, https://arxiv.org/abs/2006.08217 (SPEC: ADAMP).
    """

    def __init__(
        self,
        learning_rate: Any = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        layouts: LayoutTable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, nesterov, epsilon, delta, wd_ratio, layouts, **kwargs)
        self.beta_1 = check_hyperparameter("beta1", beta_1, "beta_1")
        self.beta_2 = check_hyperparameter("beta2", beta_2, "beta_2")

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self._momentums, self._velocities = self.add_optimizer_variables(variables, ["momentum", "velocity"])

    def _coefficients(self, lr: Any) -> tuple[Any, ...]:
        t = ops.cast(self.iterations + 1, lr.dtype)
        bias_corrections = one_minus_powers((self.beta_1, self.beta_2), t)
        return lr * self.weight_decay, lr / bias_corrections[0], ops.sqrt(bias_corrections[1])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        rows, momentum, velocity = self._rows[index], self._momentums[index], self._velocities[index]
        p, g, m, v = self._load(rows, variable, gradient, momentum, velocity)
        decay, step, sqrt_bc2 = self._coefficients_for(variable, learning_rate)
        b1, b2 = self.beta_1, self.beta_2

        m = b1 * m + (1 - b1) * g  # ADAMP-1
        v = b2 * v + (1 - b2) * g * g  # ADAMP-2
        n = b1 * m + (1 - b1) * g if self.nesterov else m  # ADAMP-3
        q = n / (ops.sqrt(v) / sqrt_bc2 + self.epsilon)  # ADAMP-4
        q, ratio = self._project(q, p, g, rows)
        if self.weight_decay > 0 and self._decays[index]:
            p = p * (1 - decay * ratio)  # ADAMP-5
        p = p - step * q  # ADAMP-6

        self._store(variable, p)
        self._store(momentum, m)
        self._store(velocity, v)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2}


def one_minus_powers(bases: tuple[float, ...], exponent: Any) -> Any:
    """1 - base**exponent of each base, a vector in the dtype of the scalar tensor `exponent` (PREC-2).

    Not by `expm1`, whose error under XLA exceeds 4 units of roundoff: near 0 by the series of expm1(x) / x.
    """
    logs = [math.log(base) if base > 0 else -math.inf for base in bases]
    x = exponent * ops.convert_to_tensor(logs, exponent.dtype)
    terms = 20 if standardize_dtype(exponent.dtype) == "float64" else 12
    near = ops.where(x > -1, x, -ops.ones_like(x))
    series = ops.zeros_like(x)
    for k in range(terms, 0, -1):
        series = series * near + 1 / math.factorial(k)
    return ops.where(x > -1, -near * series, 1 - ops.exp(x))
