"""The error bounds: sound for every evaluation that keeps to the rules, and no wider than they must be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamp_spec import AdamPHyper, AdamPState, Bounded, Layout, adamp_step, decide
from adamp_spec.bounds import roundings_of_a_sum

floats = st.floats(-1e3, 1e3, width=32)
positive = st.floats(2.0**-10, 1e3, width=32)


def within(got, bounded):
    return abs(np.longdouble(got) - bounded.value) <= bounded.error


@settings(deadline=None, max_examples=300)
@given(a=floats, b=floats, c=positive)
def test_bounds_hold_in_float32(a, b, c):
    def formula(x, y, z):
        return np.sqrt((x * y - x) / z * (x * y - x) / z + z) - y

    plain = [np.asarray(np.float32(x)) for x in (a, b, c)]
    assert within(formula(*plain), formula(*(Bounded.exact(x) for x in plain)))


def test_exact_operations_with_zero_stay_exact():
    zero = Bounded.exact(np.zeros(3, np.float32))
    assert np.all((zero * zero + zero).error == 0)


def test_a_bound_is_a_few_roundings_wide():
    x = Bounded.exact(np.full(4, 3.0, np.float32))
    np.testing.assert_allclose((x * x).error, 9 * 2.0**-24, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 4096])
def test_sums_in_any_order_are_within_their_bound(n):
    x = np.random.default_rng(n).standard_normal((1, n)).astype(np.float32)
    bounded = np.sum(Bounded.exact(x), axis=(1,), keepdims=True)
    sequential = np.float32(0)
    for value in x[0]:
        sequential += value
    assert within(np.sum(x), bounded)
    assert within(sequential, bounded)
    assert bounded.error.item() == pytest.approx(roundings_of_a_sum(n) * 2.0**-24 * np.abs(x).sum(), rel=1e-3)


def test_division_by_what_may_be_zero_has_no_bound():
    one = Bounded.exact(np.ones(1, np.float32))
    difference = one * 3 / 3 - one
    assert np.isinf((one / difference).error)


def test_overflow_of_the_working_type_has_no_bound():
    big = Bounded.exact(np.full(1, 1e30, np.float32))
    assert np.isinf((big * big).error)


def test_rounding_to_a_narrower_type_is_counted():
    x = Bounded.exact(np.full(1, 1.001, np.float32)).astype(np.dtype(np.float16))
    assert x.error.item() == pytest.approx(1.001 * 2.0**-11, rel=1e-3)
    assert within(np.float16(np.float32(1.001)), x)


def test_a_cosine_near_the_threshold_is_undecided():
    p = np.zeros((1, 16), np.float32)
    p[0, 0] = 1
    for factor, certain, possible in ((0.9, True, True), (1.0, False, True), (1.1, False, False)):
        g = np.ones((1, 16), np.float32)
        cosine = factor * 0.25 / 4
        g[0, 0] = np.sqrt(15 * cosine**2 / (1 - cosine**2))
        channel, _ = decide(Bounded.exact(p), Bounded.exact(g), AdamPHyper(delta=0.25), Layout().rows((1, 16)))
        assert (channel.certain.item(), channel.possible.item()) == (certain, possible)


def test_the_same_lines_give_value_and_bound():
    rng = np.random.default_rng(0)
    p, g, m, v = np.abs(rng.standard_normal((4, 4, 8)))
    plain = adamp_step(p, g, AdamPState(3, m, v), AdamPHyper(), Layout())
    exact = [Bounded.exact(x) for x in (p, g, m, v)]
    bounded = adamp_step(exact[0], exact[1], AdamPState(3, *exact[2:]), AdamPHyper(), Layout(), lambda *tests: plain[2])
    assert np.all(within(plain[0], bounded[0]))
    assert np.all(within(plain[1].v, bounded[1].v))
    assert np.max(bounded[0].error / np.abs(p)) < 100 * 2.0**-53
