"""AdamP."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adamp_jax._base import Hyperparameter, check_state, decayed, hyperparameter, map_leaves, scheduled, zeros_like
from adamp_jax._layouts import Layouts, assign
from adamp_jax._projection import project
from adamp_spec import Rows, check_flag


class ScaleByAdamPState(NamedTuple):
    """State of :func:`scale_by_adamp`.

    Attributes:
      count: steps taken, of shape () and dtype int32.
      mu: first moment, a tree like the parameters, in their dtype or `mu_dtype`.
      nu: second moment, a tree like the parameters, in their dtype.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adamp(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: optax.Params | Callable[[optax.Params], Any] | None = None,
    *,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    layouts: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates according to the AdamP algorithm, weight decay included.

    The decay is part of the transformation because its strength depends on whether the parameter
    was projected. See :func:`adamp` for the arguments and errors.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`; its state is a
      :class:`ScaleByAdamPState`.
    """
    b1 = hyperparameter("beta1", b1, "b1")
    b2 = hyperparameter("beta2", b2, "b2")
    eps = hyperparameter("eps", eps, "eps")
    check_flag("nesterov", nesterov)
    delta = hyperparameter("delta", delta, "delta")
    wd_ratio = hyperparameter("wd_ratio", wd_ratio, "wd_ratio")
    weight_decay = scheduled("weight_decay", weight_decay, "weight_decay")
    if mu_dtype is not None:
        mu_dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
        if not jnp.issubdtype(mu_dtype, jnp.floating):
            raise TypeError(f"mu_dtype must be a real floating-point type, got {mu_dtype}")

    def init_fn(params: optax.Params) -> ScaleByAdamPState:
        assign(params, layouts)
        return ScaleByAdamPState(jnp.zeros((), jnp.int32), zeros_like(params, mu_dtype), zeros_like(params))

    def update_fn(
        updates: optax.Updates, state: ScaleByAdamPState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByAdamPState]:
        del extra_args
        if params is None:
            raise ValueError("AdamP needs the parameters: call update(updates, state, params)")
        check_state(state, ScaleByAdamPState)
        count = optax.safe_increment(state.count)
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay

        @functools.cache  # once per working dtype, not once per parameter
        def corrections(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
            t = count.astype(dtype)
            return one_minus_power(b1, t), jnp.sqrt(one_minus_power(b2, t))

        def rule(
            p: jax.Array, g: jax.Array, m: jax.Array, v: jax.Array, rows: Rows, decays: bool
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            c = functools.partial(jnp.asarray, dtype=p.dtype)
            bc1, sqrt_bc2 = corrections(p.dtype)
            m = c(1 - b1) * g + c(b1) * m  # ADAMP-1
            v = c(1 - b2) * g * g + c(b2) * v  # ADAMP-2
            n = c(1 - b1) * g + c(b1) * m if nesterov else m  # ADAMP-3
            q = n / (jnp.sqrt(v) / sqrt_bc2 + c(eps))  # ADAMP-4
            q, ratio = project(q, p, g, rows, eps, delta, wd_ratio)
            u = q / bc1
            if decays:
                u = u + c(decay) * ratio * p  # ADAMP-5
            return u, m, v  # ADAMP-6: p - learning_rate * u

        decays = decayed(decay, weight_decay_mask, params)
        updates, mu, nu = map_leaves(rule, updates, params, layouts, decays, state.mu, state.nu)
        return updates, ScaleByAdamPState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: optax.Params | Callable[[optax.Params], Any] | None = None,
    *,
    delta: jax.typing.ArrayLike = 0.1,
    wd_ratio: jax.typing.ArrayLike = 0.1,
    nesterov: bool = False,
    layouts: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP: Adam that does not grow the weights of scale-invariant layers.

    Momentum makes the norm of weights that are followed by a normalization grow, which lets their
    effective learning rate decay too early. AdamP removes the part of the update that is parallel
    to such a weight, which it recognizes by its gradient being orthogonal to it.

    Let :math:`\alpha_t` be the learning rate, :math:`\lambda` the weight decay and
    :math:`\theta` a parameter. At step :math:`t`, with gradient :math:`g`,

    .. math::

      \begin{align*}
        m &\leftarrow \beta_1 m + (1-\beta_1) g \\
        v &\leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        q &= m / (\sqrt{v / (1-\beta_2^t)} + \varepsilon) \\
        q, \rho &\leftarrow \begin{cases}
          q - \hat\theta \langle\hat\theta, q\rangle,\ \rho_{wd}
            & \text{if } \max |\cos(g, \theta)| < \delta / \sqrt{d} \\
          q,\ 1 & \text{otherwise}
        \end{cases} \\
        u &= -\alpha_t (q / (1-\beta_1^t) + \lambda \rho\, \theta)
      \end{align*}

    where the cosine, its maximum and the projection are taken over the rows of the channel view,
    or, should that test fail, over the parameter as a single row; :math:`d` is the length of a row
    and :math:`\hat\theta = \theta / (\|\theta\| + \varepsilon)`. Vectors are never projected.

    Args:
      learning_rate: A global scaling factor, either fixed or evolving along iterations with a
        scheduler, see :func:`optax.scale_by_learning_rate`.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the square root of the second moment and to the norms of the projection, and
        the least norm that the cosine divides by.
      mu_dtype: Dtype of the first moment; by default that of the parameter. The second moment
        always has the parameter's.
      weight_decay: Strength of the decoupled weight decay, a number or a schedule. It is multiplied
        by the learning rate.
      weight_decay_mask: A tree of bools with the structure of the parameters or a prefix of it, or a
        function from the parameters to one: which parameters decay. Projection is not masked.
      delta: Threshold of the projection; 0 never projects, which makes this AdamW.
      wd_ratio: Multiplies the weight decay of parameters that are projected.
      nesterov: Uses :math:`\beta_1 m + (1-\beta_1) g` for :math:`m` in the third line. Unlike
        :func:`optax.nadam`, the bias correction stays the same.
      layouts: Which axes of each parameter are its channels. By default, built-in rules on the names of
        Flax, Equinox and Haiku say it; :func:`adamp_jax.describe` shows what they say. Otherwise

        - a mapping from a parameter's path (such as ``"Conv_0/kernel"``), or a regular expression
          found in it, to an :class:`adamp_spec.Layout`; the rules say the rest;
        - a tree of Layouts like the parameters or a prefix of it, a single `Layout` being the shortest.
          A Layout for a subtree is meant for its parameters of rank 2 and more, the others are
          vectors. None stands for the rules. Dicts without dicts inside are mappings as above;
        - a function from the parameters to one of these.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: A number outside its domain; at `init` and `update`, a key of `layouts` that
        matches no parameter, two keys that match one, a tree of layouts or a mask without an answer
        for a parameter, a layout that does not fit its parameter, and a gradient or state of another
        shape or structure than the parameters.
      TypeError: A hyperparameter that is no number; at `init` and `update`, a parameter or gradient
        that is not of a real floating-point type, or a state of another transformation.

    .. note::
      Parameters of 16 bits are computed in float32 and their updates are float32, so that
      :func:`optax.apply_updates` rounds once, into the parameter. Three wrappers demand updates of
      the gradients' dtype, :func:`optax.apply_if_finite`, :func:`optax.conditionally_transform` and
      :func:`optax.conditionally_mask`: cast the gradients to float32 before those.

    .. note::
      :func:`optax.inject_hyperparams` turns numbers into arrays of the parameters' dtype. In float32
      ``1 - b2`` loses three digits; in bfloat16, 0.999 becomes 1 and the updates NaN. Keep the decay
      rates out of it, ``inject_hyperparams(adamp, static_args=("b1", "b2"))``, and with parameters of
      16 bits give it ``hyperparam_dtype=jnp.float32``. Arguments that are callable but no schedules
      belong into `static_args` as well: a mask or layouts that are a function or an Equinox module,
      a `mu_dtype` such as ``jnp.float32``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from adamp_jax import adamp
      >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
      >>> solver = adamp(learning_rate=0.003)
      >>> params = jnp.array([1., 2., 3.])
      >>> print('Objective function: ', f(params))
      Objective function:  14.0
      >>> opt_state = solver.init(params)
      >>> for _ in range(5):
      ...   grad = jax.grad(f)(params)
      ...   updates, opt_state = solver.update(grad, opt_state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   print('Objective function: {:.2E}'.format(f(params)))
      Objective function: 1.40E+01
      Objective function: 1.39E+01
      Objective function: 1.39E+01
      Objective function: 1.39E+01
      Objective function: 1.38E+01

    References:
      Heo et al, `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights
      <https://arxiv.org/abs/2006.08217>`_, 2021
    """
    return optax.chain(
        scale_by_adamp(
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=mu_dtype,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            delta=delta,
            wd_ratio=wd_ratio,
            nesterov=nesterov,
            layouts=layouts,
        ),
        optax.scale_by_learning_rate(scheduled("lr", learning_rate, "learning_rate")),
    )


def one_minus_power(base: Hyperparameter, exponent: jax.Array) -> jax.Array:
    """1 - base**exponent to within 4 units of roundoff in the dtype of `exponent` (PREC-2).

    Not by `expm1`: XLA's is off by 5 units near -0.3 by itself, in float32 and in float64.
    """
    if isinstance(base, float):
        x = exponent * (math.log(base) if base > 0 else -math.inf)
    else:
        x = exponent * jnp.log(base).astype(exponent.dtype)
    near = jnp.maximum(x, -1)
    series = jnp.ones_like(x)  # expm1(x) / x for -1 < x <= 0, by Horner's rule; 20 terms do for float64
    for k in range(20, 1, -1):
        series = 1 + near / k * series
    return jnp.where(x > -1, -near * series, 1 - jnp.exp(x))
