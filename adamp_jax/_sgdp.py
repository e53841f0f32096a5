"""SGDP."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamp_jax._base import check_state, decayed, hyperparameter, map_leaves, scheduled, zeros_like
from adamp_jax._layouts import Layouts, assign
from adamp_jax._projection import project
from adamp_spec import Rows, check_flag, check_nesterov


class ScaleBySGDPState(NamedTuple):
    """State of :func:`scale_by_sgdp`.

    Attributes:
      count: steps taken, of shape () and dtype int32.
      trace: momentum, a tree like the parameters, in their dtype.
    """

    count: jax.Array  # type: ignore[assignment]
    trace: optax.Updates


def scale_by_sgdp(
    momentum: jax.typing.ArrayLike = 0.0,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: optax.Params | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    eps: jax.typing.ArrayLike = 1e-8,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    project_momentum: bool = False,
    layouts: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates according to the SGDP algorithm, weight decay included.

    The decay is part of the transformation because its strength depends on whether the parameter
    was projected. See :func:`sgdp` for the arguments and errors.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`; its state is a
      :class:`ScaleBySGDPState`.
    """
    momentum = hyperparameter("momentum", momentum, "momentum")
    dampening = hyperparameter("dampening", dampening, "dampening")
    eps = hyperparameter("eps", eps, "eps")
    delta = hyperparameter("delta", delta, "delta")
    wd_ratio = hyperparameter("wd_ratio", wd_ratio, "wd_ratio")
    weight_decay = scheduled("weight_decay", weight_decay, "weight_decay")
    check_flag("nesterov", nesterov)
    check_flag("project_momentum", project_momentum)
    if not isinstance(momentum, jax.core.Tracer):
        check_nesterov(nesterov, float(momentum))

    def init_fn(params: optax.Params) -> ScaleBySGDPState:
        assign(params, layouts)
        return ScaleBySGDPState(jnp.zeros((), jnp.int32), zeros_like(params))

    def update_fn(
        updates: optax.Updates, state: ScaleBySGDPState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleBySGDPState]:
        del extra_args
        if params is None:
            raise ValueError("SGDP needs the parameters: call update(updates, state, params)")
        check_state(state, ScaleBySGDPState)
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay

        def rule(p: jax.Array, g: jax.Array, m: jax.Array, rows: Rows, decays: bool) -> tuple[jax.Array, jax.Array]:
            c = functools.partial(jnp.asarray, dtype=p.dtype)
            m = c(1 - dampening) * g + c(momentum) * m  # SGDP-1
            q = g + c(momentum) * m if nesterov else m  # SGDP-2
            u, ratio = project(q, p, g, rows, eps, delta, wd_ratio)
            if project_momentum and not nesterov:
                m = u  # SGDP-3
            if decays:
                u = u + c(decay / (1 - momentum)) * ratio * p  # SGDP-4
            return u, m  # SGDP-5: p - learning_rate * u

        decays = decayed(decay, weight_decay_mask, params)
        updates, trace = map_leaves(rule, updates, params, layouts, decays, state.trace)
        return updates, ScaleBySGDPState(optax.safe_increment(state.count), trace)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.0,
    dampening: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: optax.Params | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    eps: jax.typing.ArrayLike = 1e-8,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    project_momentum: bool = False,
    layouts: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDP: SGD with momentum that does not grow the weights of scale-invariant layers.

    What AdamP is to Adam, see :func:`adamp_jax.adamp`. Let :math:`\alpha_t` be the learning rate,
    :math:`\mu` the momentum, :math:`\tau` the dampening, :math:`\lambda` the weight decay and
    :math:`\theta` a parameter. At step :math:`t`, with gradient :math:`g`,

    .. math::

      \begin{align*}
        m &\leftarrow \mu m + (1-\tau) g \\
        q, \rho &= \operatorname{project}(m, \theta, g) \\
        u &= -\alpha_t (q + \lambda \rho\, \theta / (1-\mu))
      \end{align*}

    with the projection and the decay multiplier :math:`\rho` of AdamP.

    Args:
      learning_rate: A global scaling factor, either fixed or evolving along iterations with a
        scheduler, see :func:`optax.scale_by_learning_rate`.
      momentum: Decay rate of the momentum, in [0, 1).
      dampening: Dampening of the gradient in the momentum, in [0, 1]; applies from the first step.
      weight_decay: Strength of the decoupled weight decay, a number or a schedule. It is multiplied
        by the learning rate and divided by ``1 - momentum``.
      weight_decay_mask: As for :func:`adamp_jax.adamp`.
      nesterov: Uses :math:`g + \mu m` for :math:`m` in the second line; needs momentum.
      eps: Added to the norms of the projection, and the least norm that the cosine divides by.
      delta: Threshold of the projection; 0 never projects, which makes this SGDW.
      wd_ratio: Multiplies the weight decay of parameters that are projected.
      project_momentum: Stores the projected direction as the momentum, as the authors' PyTorch
        package does without Nesterov; changes nothing with Nesterov.
      layouts: As for :func:`adamp_jax.adamp`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`. Notes on 16-bit parameters
      and :func:`optax.inject_hyperparams`: see :func:`adamp_jax.adamp`.

    Raises:
      ValueError: As for :func:`adamp_jax.adamp`, and Nesterov without momentum.
      TypeError: As for :func:`adamp_jax.adamp`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from adamp_jax import sgdp
      >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
      >>> solver = sgdp(learning_rate=0.003, momentum=0.9)
      >>> params = jnp.array([1., 2., 3.])
      >>> print('Objective function: ', f(params))
      Objective function:  14.0
      >>> opt_state = solver.init(params)
      >>> for _ in range(5):
      ...   grad = jax.grad(f)(params)
      ...   updates, opt_state = solver.update(grad, opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print('Objective function: {:.2E}'.format(f(params)))
      Objective function: 1.38E+01
      Objective function: 1.35E+01
      Objective function: 1.31E+01
      Objective function: 1.25E+01
      Objective function: 1.19E+01

    References:
      Heo et al, `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights
      <https://arxiv.org/abs/2006.08217>`_, 2021
    """
    return optax.chain(
        scale_by_sgdp(
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            nesterov=nesterov,
            eps=eps,
            delta=delta,
            wd_ratio=wd_ratio,
            project_momentum=project_momentum,
            layouts=layouts,
        ),
        optax.scale_by_learning_rate(scheduled("lr", learning_rate, "learning_rate")),
    )
