"""Two oracles, written apart, agree on random problems and on every frozen vector, and notice planted faults."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from adamp_conformance import second_oracle, vectors
from adamp_conformance.adapter import DTYPES, MOMENTS
from adamp_conformance.cases import EXACT
from adamp_conformance.freeze import interval, joint_outcomes
from adamp_conformance.judge import Undecidable, expected_outcomes
from adamp_conformance.second_oracle import Ball, mp, verify_vector
from adamp_conformance.vectors import Group, Legal, Vector, VectorStep
from adamp_spec import Layout, bounds

ADAMP = {
    "lr": 0.05,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 2.0,
    "delta": 0.1,
    "wd_ratio": 0.1,
    "nesterov": False,
}
SGDP = {
    "lr": 0.05,
    "momentum": 0.9,
    "dampening": 0.25,
    "eps": 1e-8,
    "weight_decay": 0.2,
    "delta": 0.1,
    "wd_ratio": 0.1,
    "nesterov": False,
    "project_momentum": False,
}


def frozen(problem, gradients, hyper=None):
    """The problem as a vector with the first oracle's intervals, `hyper` being what that oracle is told.

    Raises:
      Undecidable: at a step, the vector up to which is the second argument.
    """
    group, vector = problem
    state, steps = vector.before, []
    for index, gradient in enumerate(gradients):
        try:
            expected = expected_outcomes(
                group.algorithm,
                hyper or group.hyper,
                vector.layout,
                state,
                group.step + index,
                gradient,
                EXACT in vector.flags,
            )
        except Undecidable as error:
            raise Undecidable(str(error), replace(vector, steps=(*steps, VectorStep(gradient, ())))) from error
        outcomes = list(joint_outcomes(expected))
        legal = []
        for branches, tensors in outcomes:
            ends = {name: dict(interval(bounded, group.dtype)) for name, bounded in tensors.items()}
            low, high = ({name: pair[end] for name, pair in ends.items()} for end in ("lo", "hi"))
            legal.append(Legal(tuple(branches), low, high))
        steps.append(VectorStep(gradient, tuple(legal)))
        if len(outcomes) > 1:
            break
        state = outcomes[0][1]
    return replace(vector, steps=tuple(steps))


def problem_of(algorithm, hyper, dtype, layout, before, step=0, flags=()):
    vector = Vector("test/vector", "", (), flags, before["p"].shape, layout, None, before, ())
    return Group("core/test", algorithm, dtype, hyper, step, (vector,)), vector


# Random problems.


def log_uniform(low, high):
    return st.floats(np.log10(low), np.log10(high)).map(lambda x: float(np.clip(10.0**x, low, high)))


decay_rates = st.one_of(
    st.sampled_from([0.0, 0.5, 0.9, 0.999, 1 - 2.0**-53]),
    st.floats(0.0, 1.0, exclude_max=True),
    log_uniform(1e-15, 1.0).map(lambda x: 1.0 - x),
    log_uniform(1e-100, 1e-3),
).map(lambda x: x if x >= 1e-100 else 0.0)  # the square of a smaller one vanishes in the first oracle's binary64
COMMON = {
    "lr": st.one_of(st.sampled_from([0.0, 1.0]), log_uniform(1e-6, 1e2), log_uniform(1e-45, 1e45)),
    "eps": st.one_of(st.sampled_from([2.0**-126, 1e-8]), log_uniform(1e-12, 1.0), log_uniform(2.0**-126, 1e45)),
    "weight_decay": st.one_of(st.sampled_from([0.0, 1.0]), log_uniform(1e-6, 1e2), log_uniform(1e-45, 1e45)),
    "delta": st.one_of(st.sampled_from([0.0, 0.1, 1e3]), log_uniform(1e-3, 1e3), log_uniform(1e-45, 1e3)),
    "wd_ratio": st.one_of(st.sampled_from([0.0, 0.1, 1.0]), log_uniform(1e-45, 1e3)),
    "nesterov": st.booleans(),
}
HYPER = {
    "adamp": st.fixed_dictionaries(COMMON | {"beta1": decay_rates, "beta2": decay_rates}),
    "sgdp": st.fixed_dictionaries(
        COMMON
        | {
            "momentum": decay_rates,
            "dampening": st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0), log_uniform(1e-300, 1.0)),
            "project_momentum": st.booleans(),
        }
    ).map(lambda hyper: hyper | {"nesterov": hyper["nesterov"] and hyper["momentum"] > 0}),
}
# Exponents of ten between which the scale of a tensor is drawn.
SCALES = {"float64": (-300, 300), "float32": (-44, 38), "float16": (-7, 4), "bfloat16": (-39, 38)}


@st.composite
def layouts(draw):
    """(shape, layout) with at most 64 elements, and one to three slices."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 7, 16, 0]), max_size=4))
    while math.prod(sizes) > 64:
        sizes.remove(max(sizes))
    shape = tuple(sizes)
    seen, view = shape, None
    if draw(st.integers(0, 3)) == 0 and 0 not in shape:
        factors = [f for size in shape for f in ([2, size // 2] if size in (4, 16) else [size])]
        seen = view = tuple(draw(st.permutations(factors)))
    axes = draw(st.permutations(range(len(seen))))
    batch = axes[: draw(st.sampled_from([0, 0, 0, 1, 2]))]
    if not 1 <= math.prod(seen[axis] for axis in batch) <= 3:
        batch = []
    left = [axis for axis in axes if axis not in batch]
    channel = left[: draw(st.integers(1, max(len(left) - 1, 1)))] or 0
    if draw(st.integers(0, 9)) == 0:
        channel = None
    elif channel and draw(st.booleans()):
        channel = [axis - len(seen) for axis in channel]
    return shape, Layout(channel, batch, view)


def rows_of(layout, shape):
    for elements, rows in second_oracle.slices_of(layout, shape):
        yield from rows or [elements]


def gradient_like(random, kind, delta, p, layout):
    """A gradient of the size of 1 that makes angles of some kind with the rows of `p`."""
    flat, g = p.astype(np.float64).ravel(), random.uniform(-1, 1, p.size)
    for row in rows_of(layout, p.shape):
        with np.errstate(all="ignore"):
            size = np.linalg.norm(flat[row])
        if not row or not 0 < size < np.inf or kind == "noise":
            continue
        unit = flat[row] / size
        across = g[row] - unit * (unit @ g[row])
        threshold = min(delta / np.sqrt(len(row)), 1.0)
        near = threshold * (1 + random.choice([0.0, 2.0**-22, -(2.0**-20), 2.0**-18, 2.0**-51]))
        cosine = {
            "parallel": random.choice([1.0, -1.0]),
            "orthogonal": 0.0,
            "below": 0.7 * threshold,
            "near": near,
            "mixed": random.choice([0.0, 1.0, 0.5 * threshold, near, 2 * threshold]),
        }[kind]
        cosine = np.clip(cosine, -1, 1)
        across *= np.sqrt(1 - cosine**2) / max(np.linalg.norm(across), 1e-300)
        g[row] = (cosine * unit + across) * random.uniform(0.5, 2)
    return g.reshape(p.shape)


@st.composite
def problems(draw, algorithm, dtype):
    """(group, vector without steps), gradients."""
    hyper = draw(HYPER[algorithm])
    shape, layout = draw(layouts())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lowest, highest = SCALES[dtype]

    def cast(x):
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(x).astype(DTYPES[dtype])

    def scale(half=1):
        exponent = draw(st.one_of(st.just(0.0), st.floats(-3, 3), st.floats(lowest, highest)))
        return 10.0 ** (exponent * half)

    def holes(x):
        """With zeros, and now and then something that is not finite."""
        what = draw(st.sampled_from(["full"] * 12 + ["sparse", "zero", "zero row", "special", "mixed scales"]))
        x = np.array(x)
        if what == "mixed scales":
            x *= 10.0 ** random.uniform(-3, 3, x.shape)
        if what == "sparse":
            x[random.random(x.shape) < 0.5] = 0
        if what == "zero":
            x[...] = 0
        if what == "zero row":
            for row in rows_of(layout, shape):
                x.reshape(-1)[row] *= random.choice([0, 1])
        if what == "special" and x.size:
            x.reshape(-1)[random.integers(x.size)] = random.choice([np.nan, np.inf, -np.inf])
        return x

    before = {"p": cast(holes(random.uniform(-1, 1, shape) * scale()))}
    step = draw(st.one_of(st.just(0), st.integers(0, 10), st.integers(0, 10**6)))
    first = step == 0 and draw(st.booleans())
    for moment in MOMENTS[algorithm]:
        x = np.zeros(shape) if first else holes(random.uniform(-1, 1, shape) * scale())
        before[moment] = cast(np.abs(x) if moment == "v" else x)
    gradients = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        kind = draw(st.sampled_from(["noise", "parallel", "orthogonal", "below", "near", "mixed"]))
        g = gradient_like(random, kind, hyper["delta"], before["p"], layout) * scale()
        gradients.append(cast(holes(g)))
    assume(determined(hyper, [*before.values(), *gradients]))
    return problem_of(algorithm, hyper, dtype, layout, before, step), gradients


def determined(hyper, arrays):
    """False where the specification is silent: infinity times a decay factor whose sign rounding decides."""
    decay = hyper["lr"] * hyper["weight_decay"] / (1 - hyper.get("momentum", 0.0))
    factors = [1 - decay, 1 - decay * hyper["wd_ratio"]]
    return min(map(abs, factors)) > 1e-3 or all(np.all(np.isfinite(x)) for x in arrays)


def overflows(group, vector):
    """Whether the second oracle, too, knows nothing of some element after the last step."""
    state = {name: second_oracle.values(x) for name, x in vector.before.items()}
    for index, taken in enumerate(vector.steps):
        slices = second_oracle.step(
            group.algorithm,
            group.hyper,
            vector.layout,
            vector.shape,
            group.dtype,
            state,
            second_oracle.values(taken.gradient),
            group.step + index,
        )
        state = second_oracle.assemble(slices, *list(second_oracle.branch_combinations(slices))[:1])
    found = [x for part in slices for outcome in part.outcomes.values() for tensor in outcome.values() for x in tensor]
    return any(isinstance(x, Ball) and x.rad == mp.inf for x in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ["adamp", "sgdp"])
@settings(deadline=None)
@given(data=st.data())
def test_the_oracles_agree(algorithm, dtype, data):
    problem, gradients = data.draw(problems(algorithm, dtype))
    group, vector = problem
    with np.errstate(all="ignore"):
        try:
            vector = frozen(problem, gradients)
        except Undecidable as error:
            unfinished = error.args[1]
        else:
            unfinished = None
    if unfinished is not None:
        event("undecidable: a bound of the first oracle is infinite")
        assert overflows(group, unfinished)
        return
    outcomes = vector.steps[-1].outcomes
    event(f"{len(vector.steps)} steps, {len(outcomes)} outcomes")
    event(f"branch {'/'.join(sorted(set(outcomes[0].branch)))}")
    assert verify_vector(vector, group) == []


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1.0, 0.97e-8, 1e-10])
@pytest.mark.parametrize("shape", [(2, 8), (1, 2)])
def test_a_test_becomes_undecided_at_the_same_threshold(shape, size, dtype):
    """A sweep of thresholds, in steps of two roundings, across a cosine with gradients above, near and below eps."""
    random = np.random.default_rng(0)
    p = np.ones(shape, DTYPES[dtype])
    g = (random.uniform(0.5, 1, (1, shape[1])) * np.ones(shape)).astype(DTYPES[dtype])
    g = (g / np.linalg.norm(g[0]) * size).astype(DTYPES[dtype])
    row = g[0].astype(np.longdouble)
    norm = np.sqrt(np.sum(row * row))
    delta = float(np.sum(row) / max(norm, np.longdouble(1e-8)))  # the cosine with ones, times the root of the length
    unit = np.finfo(DTYPES[dtype]).eps / 2
    seen = set()
    for step in range(-64, 65, 2):
        hyper = SGDP | {"delta": delta * (1 + step * float(unit))}
        problem = problem_of("sgdp", hyper, dtype, Layout(), {"p": p, "m": np.zeros_like(p)})
        vector = frozen(problem, [g])
        assert verify_vector(vector, problem[0]) == []
        seen.add(tuple(sorted(outcome.branch for outcome in vector.steps[0].outcomes)))
    assert len(seen) > 1  # decided on one side, undecided on the threshold


def test_every_frozen_vector_is_what_the_second_oracle_says():
    found = [problem for group in vectors.load().groups for x in group.vectors for problem in verify_vector(x, group)]
    assert found == []


# Planted faults.


def example(algorithm="adamp", dtype="float32", layout=Layout(), kind="orthogonal", **changes):  # noqa: B008
    """A problem of 4 rows, and two gradients for it."""
    hyper = {"adamp": ADAMP, "sgdp": SGDP}[algorithm] | changes
    random = np.random.default_rng(0)
    names = ("p", *MOMENTS[algorithm])
    before = {name: random.uniform(0.25, 1, (4, 8)).astype(DTYPES[dtype]) for name in names}
    gradients = [gradient_like(random, kind, hyper["delta"], before["p"], layout).astype(DTYPES[dtype]) for _ in "ab"]
    return problem_of(algorithm, hyper, dtype, layout, before, step=10), gradients


def with_outcomes(vector, *outcomes):
    """The vector with other outcomes of its first step."""
    first, *rest = vector.steps
    return replace(vector, steps=(VectorStep(first.gradient, outcomes), *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("algorithm", "tensor"), [("adamp", "p"), ("adamp", "m"), ("adamp", "v"), ("sgdp", "m")])
@pytest.mark.parametrize(
    ("end", "towards", "complaint"),
    [("low", np.inf, "narrow"), ("high", -np.inf, "narrow"), ("low", -np.inf, "wide"), ("high", np.inf, "wide")],
)
def test_an_interval_off_by_one_number_is_noticed(algorithm, tensor, dtype, end, towards, complaint):
    problem, gradients = example(algorithm, dtype)
    vector = frozen(problem, gradients)
    assert verify_vector(vector, problem[0]) == []

    (outcome,) = vector.steps[0].outcomes
    ends = getattr(outcome, end)
    moved = ends[tensor].copy()
    moved[2, 3] = np.nextafter(moved[2, 3], moved.dtype.type(towards))
    changed = with_outcomes(vector, outcome._replace(**{end: ends | {tensor: moved}}))
    (problem_found,) = verify_vector(changed, problem[0])
    assert f"step 11: branches channel: {tensor}, element 19" in problem_found
    assert f"too {complaint}" in problem_found


def test_eps_before_the_bias_correction_is_noticed():
    problem, gradients = example(layout=Layout(None), eps=1e-4)
    # (sqrt(v) + eps) / c is sqrt(v) / c + eps / c
    wrong = ADAMP | {"eps": 1e-4 / np.sqrt(1 - ADAMP["beta2"] ** 11)}
    assert verify_vector(frozen(problem, gradients[:1]), problem[0]) == []
    found = verify_vector(frozen(problem, gradients[:1], wrong), problem[0])
    assert found
    assert all("p, element" in problem for problem in found)


def test_half_the_roundings_of_a_sum_are_noticed(monkeypatch):
    problem, gradients = example()
    whole = bounds.roundings_of_a_sum
    monkeypatch.setattr(bounds, "roundings_of_a_sum", lambda n: whole(n) // 2)
    found = verify_vector(frozen(problem, gradients[:1]), problem[0])
    assert found
    assert all("p, element" in problem and "too narrow" in problem for problem in found)


def test_a_state_injected_between_two_steps_is_noticed():
    (group, vector), gradients = example()
    vector = frozen((group, vector), gradients)
    after = vector.steps[0].outcomes[0]
    again = problem_of("adamp", group.hyper, "float32", vector.layout, after.low, step=11)
    injected = frozen(again, gradients[1:])
    found = verify_vector(replace(vector, steps=(vector.steps[0], *injected.steps)), group)
    assert found
    assert all("step 12" in problem for problem in found)


def undecided():
    """Every row on the channel threshold, within rounding."""
    problem, gradients = example("sgdp", kind="near")
    vector = frozen(problem, gradients)
    assert len(vector.steps[0].outcomes) > 1
    assert verify_vector(vector, problem[0]) == []
    return problem[0], vector


def test_a_missing_outcome_is_noticed():
    group, vector = undecided()
    outcomes = vector.steps[0].outcomes
    for i, outcome in enumerate(outcomes):
        left = with_outcomes(vector, *outcomes[:i], *outcomes[i + 1 :])
        assert verify_vector(left, group) == [f"test/vector, step 11: branches {outcome.branch[0]}: legal but missing"]


def test_an_outcome_that_is_not_legal_is_noticed():
    problem, gradients = example()
    vector = frozen(problem, gradients[:1])
    (outcome,) = vector.steps[0].outcomes
    extra = with_outcomes(vector, outcome, outcome._replace(branch=("none",)))
    assert verify_vector(extra, problem[0]) == ["test/vector, step 11: branches none: not legal, only ['channel'] are"]
    twice = with_outcomes(vector, outcome, outcome)
    assert verify_vector(twice, problem[0]) == ["test/vector, step 11: two outcomes have the same branches"]


def test_steps_after_an_undecided_one_are_noticed():
    group, vector = undecided()
    longer = replace(vector, steps=(*vector.steps, *vector.steps))
    (problem,) = verify_vector(longer, group)
    assert "step 11 is undecided" in problem


@pytest.mark.parametrize("flags", [(), (EXACT,)])
def test_an_exact_test_has_one_outcome(flags):
    """A cosine of 1/16 on the threshold of 0.25 / sqrt(16)."""
    p = np.eye(1, 16, dtype=np.float32)
    g = np.array([[1, 5, 5, 5, 5, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4]], np.float32)
    before = {"p": p, "m": np.ones_like(p)}
    group, vector = problem_of("sgdp", SGDP | {"delta": 0.25}, "float32", Layout(), before, flags=flags)
    vector = frozen((group, vector), [g])
    assert ("channel",) in [x.branch for x in vector.steps[0].outcomes] or flags
    assert verify_vector(vector, group) == []
    other = replace(vector, flags=() if flags else (EXACT,))
    assert verify_vector(other, group)


@pytest.mark.parametrize("wrong", [0.0, np.inf, -np.inf])
def test_a_lost_nan_is_noticed(wrong):
    problem, gradients = example()
    gradients[0][1, 1] = np.nan
    vector = frozen(problem, gradients[:1])
    (outcome,) = vector.steps[0].outcomes
    assert outcome.branch == ("none",)
    assert verify_vector(vector, problem[0]) == []
    for arrays in (outcome.low, outcome.high):
        arrays["m"][1, 1] = wrong
    (found,) = verify_vector(vector, problem[0])
    assert "m, element 9" in found


# The second oracle by itself.


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_interval_ends_are_the_outermost_numbers_inside(dtype, data):
    own = second_oracle.FORMATS[dtype].own
    exponent = data.draw(st.integers(own.low - own.digits - 3, int(mp.log(own.largest, 2)) - 1))
    mid = mp.ldexp(data.draw(st.integers(-(2**60), 2**60)), exponent - 60)
    rad = mp.ldexp(data.draw(st.integers(0, 2**20)), exponent - data.draw(st.integers(5, 80)) - 20)
    (low,), (high,) = second_oracle.interval([Ball(mid, rad)], dtype)
    below, above = (np.nextafter(x, DTYPES[dtype].type(to)) for x, to in ((low, -np.inf), (high, np.inf)))
    assert mp.mpf(float(below)) < mid - rad <= mp.mpf(float(low))
    assert mp.mpf(float(high)) <= mid + rad < mp.mpf(float(above))


def test_it_imports_nothing_of_the_first_oracle_but_the_layout():
    tree = ast.parse(Path(second_oracle.__file__).read_text())
    imported = {
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    } | {(alias.name, None) for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    own = {name for name in imported if name[0].startswith("adamp")}
    assert own == {("adamp_spec", "Layout")}
