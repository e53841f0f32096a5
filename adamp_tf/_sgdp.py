from __future__ import annotations

from typing import Any

import keras

from adamp_spec import check_flag, check_hyperparameter, check_nesterov
from adamp_tf._base import ProjectedOptimizer
from adamp_tf._layouts import LayoutTable


@keras.saving.register_keras_serializable(package="adamp")
class SGDP(ProjectedOptimizer):
    """SGD with momentum whose step is kept orthogonal to scale-invariant weights.

    The projection, the layouts, the arithmetic and what `**kwargs` takes are those of
    `adamp_tf.AdamP`. The weight decay is decoupled and divided by `1 - momentum`, so that it is as
    strong as L2 regularization in SGD with this momentum.

    Args:
      learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable
        without arguments.
      momentum: decay of the momentum buffer, in [0, 1).
      dampening: the gradient enters the buffer times `1 - dampening`, from the first step on;
        in [0, 1].
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      nesterov: whether to use Nesterov momentum; needs a momentum above 0.
      epsilon: added to norms; at least 2**-126.
      delta: threshold on the cosine, scaled by 1/sqrt(row length); 0 never projects (SGDW).
      wd_ratio: factor on the weight decay of projected variables.
      project_momentum: whether the stored buffer is projected too, as in the authors' package,
        where the paper's Algorithm 1 projects the step alone. No effect with Nesterov momentum.
      layouts: path or regular expression -> `adamp_spec.Layout` (or its `to_dict()`).
      **kwargs: as in every Keras optimizer; see `adamp_tf.AdamP`.

    Slots: "momentum".

    Raises:
      TypeError, ValueError: a hyperparameter outside its domain, an unknown argument.

    Reference: Heo et al., ICLR 2021, https://arxiv.org/abs/2006.08217 (SPEC: SGDP).
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        epsilon: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_momentum: bool = False,
        layouts: LayoutTable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, nesterov, epsilon, delta, wd_ratio, layouts, **kwargs)
        self.momentum = check_hyperparameter("momentum", momentum)
        self.dampening = check_hyperparameter("dampening", dampening)
        check_nesterov(self.nesterov, self.momentum)
        check_flag("project_momentum", project_momentum)
        self.project_momentum = project_momentum

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self._momentums = self.add_optimizer_variables(variables, "momentum")

    def _coefficients(self, lr: Any) -> tuple[Any, ...]:
        return lr * (self.weight_decay / (1 - self.momentum)), lr

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        rows, buffer = self._rows[index], self._momentums[index]
        p, g, m = self._load(rows, variable, gradient, buffer)
        decay, lr = self._coefficients_for(variable, learning_rate)
        mu = self.momentum

        m = mu * m + (1 - self.dampening) * g  # SGDP-1
        q = g + mu * m if self.nesterov else m  # SGDP-2
        q, ratio = self._project(q, p, g, rows)
        if self.project_momentum and not self.nesterov:
            m = q  # SGDP-3
        if self.weight_decay > 0 and self._decays[index]:
            p = p * (1 - decay * ratio)  # SGDP-4
        p = p - lr * q  # SGDP-5

        self._store(variable, p)
        self._store(buffer, m)

    def get_config(self) -> dict[str, Any]:
        own = {"momentum": self.momentum, "dampening": self.dampening, "project_momentum": self.project_momentum}
        return {**super().get_config(), **own}
