"""Layouts: what a row is, what is refused, and how defaults and overrides are resolved."""

import pickle

import pytest

from adamp_spec import Layout, Rule, assign_layouts, format_layouts


@pytest.mark.parametrize(
    ("layout", "shape", "rows"),
    [
        (Layout(), (8, 3, 3, 3), (8, 27)),
        (Layout(-1), (3, 3, 4, 8), (8, 36)),
        (Layout((1, 2)), (16, 2, 4), (8, 16)),
        (Layout(2, batch=0), (3, 5, 7), (7, 5)),
        (Layout(1, batch=0, view=(3, 4, 16)), (12, 16), (4, 16)),
    ],
)
def test_rows(layout, shape, rows):
    applied = layout.rows(shape)
    assert (applied.count, applied.length) == rows
    assert applied.projects


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout(), ()),
        (Layout(), (5,)),
        (Layout(None), (5, 5)),
        (Layout(1, batch=0), (3, 5)),
        (Layout(-1, batch=0), (3,)),
        (Layout(), (0, 4)),
        (Layout(), (4, 0)),
    ],
)
def test_never_projected(layout, shape):
    assert not layout.rows(shape).projects


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Layout(()), ValueError, "channel=None"),
        (lambda: Layout(1.0), TypeError, "channel"),
        (lambda: Layout("0"), TypeError, "integers"),
        (lambda: Layout(view=(3, -1)), ValueError, "negative"),
        (lambda: Layout(4).rows((2, 3)), ValueError, r"channel axis 4 .* \(2, 3\)"),
        (lambda: Layout(0, batch=-3).rows((2, 3)), ValueError, "batch axis -3"),
        (lambda: Layout((0, -2)).rows((2, 3)), ValueError, "twice"),
        (lambda: Layout(0, batch=0).rows((2, 3, 4)), ValueError, "as channel and as batch"),
        (lambda: Layout(0, view=(2, 2)).rows((2, 3)), ValueError, "4 elements but shape"),
    ],
)
def test_refuses(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_layout_is_a_plain_value():
    layout = Layout([1, 2], batch=0)
    assert Layout(**layout.to_dict()) == layout == pickle.loads(pickle.dumps(layout))
    assert hash(layout) == hash(Layout((1, 2), (0,)))
    assert not callable(layout)
    assert str(layout) == "Layout(channel=(1, 2), batch=0)"


SHAPES = {"conv/kernel": (3, 3, 4, 8), "query/kernel": (8, 2, 4), "query/bias": (2, 4), "stem": (4, 4)}
RULES = [Rule("query/kernel$", Layout((1, 2)), rank=3), Rule("bias$", Layout(None)), Rule("kernel$", Layout(-1))]


def test_override_then_rule_then_default():
    assigned = assign_layouts(SHAPES, {"conv": Layout(2)}, RULES, Layout(1))
    assert {path: (x.layout, x.origin) for path, x in assigned.items()} == {
        "conv/kernel": (Layout(2), "override 'conv'"),
        "query/kernel": (Layout((1, 2)), "rule 'query/kernel$'"),
        "query/bias": (Layout(None), "rule 'bias$'"),
        "stem": (Layout(1), "default"),
    }


def test_a_whole_path_wins_over_patterns():
    table = {"conv/kernel": Layout(0), ".*kernel": Layout(1)}
    assert assign_layouts(SHAPES, table)["conv/kernel"].layout == Layout(0)


def test_a_whole_path_is_not_a_pattern():
    shapes = {"0.weight": (4, 4), "10.weight": (4, 4)}
    assert assign_layouts(shapes, {"0.weight": Layout(1)})["10.weight"].origin == "default"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"dense": Layout()}, r"\['dense'\] match no parameter"),
        ({"query": Layout(), "kernel": Layout()}, "'query/kernel' matches several"),
        ({"(": Layout()}, "not a regular expression"),
        ({"stem": Layout(5)}, "'stem'.*channel axis 5"),
    ],
)
def test_bad_tables(table, words):
    with pytest.raises(ValueError, match=words):
        assign_layouts(SHAPES, table)
    with pytest.raises(TypeError, match="Layout"):
        assign_layouts(SHAPES, {"stem": 0})


def test_the_table_says_rows_and_origin():
    text = format_layouts(assign_layouts(SHAPES, {}, RULES, Layout(-1)))
    assert text.splitlines()[0].split() == ["parameter", "shape", "layout", "rows", "chosen", "by"]
    assert "8 x 36" in text
    assert "not projected" in text
    assert text.splitlines()[-1].endswith("default")
