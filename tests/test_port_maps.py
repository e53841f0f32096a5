"""Maps: a snapshot goes over and comes back bit for bit, and what is no bijection or another optimizer is refused."""

import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from adamp_conformance import layers
from adamp_conformance.port.maps import Map, MapError, Pair, convert_snapshot
from adamp_spec import AdamPHyper, Layout, SGDPHyper, snapshot
from adamp_spec.snapshot import Entry, Snapshot, SnapshotError, Tensor

E, HEADS, STEP = 8, 2, 3
ATTENTION = Layout(1, 0, (3, E, E))
SHAPES = {
    "conv.weight": (6, 4, 3, 3),
    "conv.bias": (6,),
    "bn.weight": (6,),
    "bn.bias": (6,),
    "attention.in_proj_weight": (3 * E, E),
    "attention.in_proj_bias": (3 * E,),
    "attention.out_proj.weight": (E, E),
    "attention.out_proj.bias": (E,),
    "lstm.weight_ih_l0": (20, 3),
    "lstm.weight_hh_l0": (20, 5),
    "lstm.bias_ih_l0": (20,),
    "blocks.0.weight": (7, 5),
    "blocks.0.bias": (7,),
    "blocks.1.weight": (7, 5),
    "blocks.1.bias": (7,),
    "pos_embed": (1, 4, E),
}
OTHERS = {
    "bn.running_mean": np.arange(6, dtype=np.float32),
    "bn.running_var": np.ones(6, np.float32),
    "bn.num_batches_tracked": np.asarray(STEP),
    "lstm.bias_hh_l0": np.zeros(20, np.float32),
}
CONV = Pair("conv", ("conv.*",), ("conv/*",))
NORM = Pair("batch_norm", ("bn.*",), ("bn/*",))
SELF = Pair("attention", ("attention.*",), ("attention/*",), {"heads": HEADS})
LSTM = Pair("lstm", ("lstm.*_l0",), ("lstm/lstm_cell/*",), zero=("bias_hh",))
BLOCKS = Pair("dense", ("blocks.0.*", "blocks.1.*"), ("blocks/*",), stack=1, note="in order")
POSITION = Pair("same", ("pos_embed",), ("position",))
KERAS = Map("torch", "keras", (CONV, NORM, SELF, LSTM, BLOCKS, POSITION))


def tensor(array):
    return Tensor(snapshot.dtype_name("x", array.dtype.name), array.shape, lambda: array)


def made(shapes, layouts=None, others=None, algorithm="adamp", **entries):
    """A snapshot of random tensors, and the tensors."""
    random = np.random.default_rng(0)
    hyper = AdamPHyper(lr=1e-3) if algorithm == "adamp" else SGDPHyper(lr=0.1)
    parameters = {name: Entry(0, STEP, (layouts or {}).get(name, Layout())) for name in shapes} | entries
    tensors = {
        f"{kind}/{name}": tensor(random.standard_normal(shape, np.float32))
        for kind in ("parameter", *snapshot.MOMENTS[algorithm])
        for name, shape in shapes.items()
    }
    tensors |= {f"other/{name}": tensor(array) for name, array in (others or {}).items()}
    given = Snapshot(algorithm, (hyper,), parameters)
    given.check(tensors)
    return given, tensors


def whole():
    return made(SHAPES, {"attention.in_proj_weight": ATTENTION}, OTHERS)


def arrays(tensors):
    return {name: np.asarray(x.read()) for name, x in tensors.items()}


def check_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), (
            name
        )


def only(names, shapes=SHAPES):
    return {name: shape for name, shape in shapes.items() if name.startswith(names)}


# ------------------------------------------------------------------------------------------------ there and back


def test_everything_goes_over_and_comes_back_bit_for_bit():
    given, tensors = whole()
    there, moved = KERAS.apply(given, tensors)
    there.check(moved)
    layouts = {name: entry.layout for name, entry in there.parameters.items()}
    assert layouts["conv/kernel"] == Layout(3)
    assert layouts["attention/query/kernel"] == Layout((1, 2))
    assert layouts["blocks/kernel"] == Layout(2, 1)
    assert layouts["lstm/lstm_cell/kernel"] == Layout(1)
    assert {name for name in moved if name.startswith("other/")} == {"other/bn/moving_mean", "other/bn/moving_variance"}
    back, returned = KERAS.reversed().apply(there, moved)
    back.check(returned)
    check_same(arrays(tensors), arrays(returned))
    assert back.groups == given.groups
    for name, entry in given.parameters.items():
        shape = SHAPES[name]
        ours, again = entry.layout.rows(shape), back.parameters[name].layout.rows(shape)
        assert ours == again or not (ours.projects or again.projects)
        assert (entry.group, entry.step) == (back.parameters[name].group, back.parameters[name].step)


def test_what_goes_over_is_what_the_table_says():
    given, tensors = whole()
    moved = arrays(KERAS.apply(given, tensors)[1])
    old = arrays(tensors)
    for kind in ("parameter", "m", "v"):
        np.testing.assert_array_equal(moved[f"{kind}/conv/kernel"], old[f"{kind}/conv.weight"].transpose(2, 3, 1, 0))
        key = old[f"{kind}/attention.in_proj_weight"][E : 2 * E].reshape(HEADS, E // HEADS, E).transpose(2, 0, 1)
        np.testing.assert_array_equal(moved[f"{kind}/attention/key/kernel"], key)
        stack = np.stack([old[f"{kind}/blocks.{i}.weight"].T for i in range(2)], 1)
        np.testing.assert_array_equal(moved[f"{kind}/blocks/kernel"], stack)
        np.testing.assert_array_equal(moved[f"{kind}/position"], old[f"{kind}/pos_embed"])
    np.testing.assert_array_equal(moved["other/bn/moving_mean"], OTHERS["bn.running_mean"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stack_of_fused_attention_decides_layer_by_layer(axis):
    names = [f"{i}.in_proj_weight" for i in range(4)]
    given, tensors = made(dict.fromkeys(names, (3 * E, E)), dict.fromkeys(names, ATTENTION))
    own = {"fused": {"title": "fused", "batch": "part", "parts": {"part": "q k v"}}}
    own["fused"] |= {
        "torch": {"layer": "x", "in_proj_weight": "(part OUT) in"},
        "linen": {"layer": "x", "kernel": "in_proj_weight: (part OUT) in"},
    }
    pair = Pair("fused", tuple(f"{i}.*" for i in range(4)), ("scan/*",), stack=axis)
    there = Map("torch", "linen", (pair,), own)
    moved, held = there.apply(given, tensors)
    rows = moved.parameters["scan/kernel"].layout.rows(held["parameter/scan/kernel"].shape)
    assert np.prod([rows.shape[x] for x in rows.batch]) == 12
    assert (rows.count, rows.length) == (E, E)
    back, returned = there.reversed().apply(moved, held)
    check_same(arrays(tensors), arrays(returned))
    assert {entry.layout for entry in back.parameters.values()} == {ATTENTION}


def test_two_frameworks_that_both_add_the_biases_exchange_them():
    shapes = {"kernel": (3, 20), "recurrent_kernel": (5, 20), "bias": (20,)}
    given, tensors = made(shapes, dict.fromkeys(shapes, Layout(-1)))
    there = Map("keras", "nnx", (Pair("lstm", ("*",), ("cell/*",)),))
    moved, held = there.apply(given, tensors)
    assert set(moved.parameters) == {"cell/dense_i/kernel", "cell/dense_h/kernel", "cell/dense_h/bias"}
    check_same(arrays(tensors), arrays(there.reversed().apply(moved, held)[1]))


def test_frozen_layers_are_carried_like_others():
    shapes = only("conv")
    frozen = {name: np.full(shape, 2, np.float32) for name, shape in shapes.items()}
    given, tensors = made({"head.weight": (3, 2)}, others=frozen)
    there = Map("torch", "keras", (CONV, Pair("dense", ("head.*",), ("head/*",))))
    moved, held = there.apply(given, tensors)
    assert set(moved.parameters) == {"head/kernel"}
    assert held["other/conv/kernel"].shape == (3, 3, 4, 6)
    check_same(arrays(tensors), arrays(there.reversed().apply(moved, held)[1]))


def test_what_was_never_projected_is_not_projected_there():
    given, tensors = made(only("conv"), dict.fromkeys(only("conv"), Layout(None)))
    moved, _ = Map("torch", "keras", (CONV,)).apply(given, tensors)
    assert moved.parameters["conv/kernel"].layout == Layout(None)


def test_half_precision_and_sgdp(tmp_path):
    import ml_dtypes

    given, tensors = made(only("conv"), algorithm="sgdp")
    tensors = {name: tensor(np.asarray(x.read()).astype(ml_dtypes.bfloat16)) for name, x in tensors.items()}
    snapshot.write(tmp_path / "a", given, tensors)
    there = Map("torch", "keras", (CONV,))
    convert_snapshot(tmp_path / "a", tmp_path / "b", there)
    convert_snapshot(tmp_path / "b", tmp_path / "c", there.reversed())
    with snapshot.opened(tmp_path / "c") as (_, returned):
        check_same(arrays(tensors), arrays(returned))


# ------------------------------------------------------------------------------------------------ refused


def refused(match, pairs=KERAS.pairs, given=None, target="keras", rows=None):
    with pytest.raises(MapError, match=match):
        Map("torch", target, tuple(pairs), rows or {}).apply(*(given or whole()))


def test_a_layer_that_is_left_out():
    refused(r"leaves out \['conv.weight', 'conv.bias'\]", KERAS.pairs[1:])


def test_a_layer_that_is_not_there():
    refused(r"has no \['fc.\*'\], or another pair took them", [*KERAS.pairs, Pair("dense", ("fc.*",), ("fc/*",))])


def test_two_parameters_onto_one():
    other = Pair("dense", ("blocks.0.*",), ("fc/*",)), Pair("dense", ("blocks.1.*",), ("fc/*",))
    refused("'fc/kernel' of the target is made by another pair, too", [CONV, NORM, SELF, LSTM, POSITION, *other])


def test_one_parameter_twice():
    refused("or another pair took them", [*KERAS.pairs, Pair("conv", ("conv.*",), ("again/*",))])


def test_a_shape_that_the_row_does_not_have():
    refused("cannot have shape", [Pair("dense", CONV.source, CONV.target), *KERAS.pairs[1:]])


def test_a_wrong_permutation_decides_otherwise():
    """As many inputs as outputs, so that no shape tells; the rows do."""
    wrong = {"title": "transposed", "torch": {"layer": "Linear", "weight": "out IN"}}
    wrong["keras"] = {"layer": "Dense", "kernel": "weight: IN out"}
    given = made({"fc.weight": (4, 4)})
    pair = Pair("turned", ("fc.*",), ("fc/*",))
    refused(
        r"decides by Layout\(channel=0\), and what keras has for it, by Layout\(channel=1\)",
        [pair],
        given,
        rows={"turned": wrong},
    )


def test_fused_attention_that_decides_as_a_whole():
    refused(r"in_proj_weight decides by Layout\(channel=0\).*train it with this one", given=made(SHAPES, others=OTHERS))


def test_heads_that_nothing_tells():
    refused("give it in sizes", [replace(x, sizes={}) if x is SELF else x for x in KERAS.pairs])


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_bias_that_is_not_zero_for_good(trained):
    pairs, shapes = [LSTM], only("lstm")
    refused("bias_hh is to be zero for good", pairs, made(shapes, others={"lstm.bias_hh_l0": np.ones(20, np.float32)}))
    refused("bias_hh is to be zero for good", pairs, made(shapes | {"lstm.bias_hh_l0": (20,)}))
    zeros = {"lstm.bias_hh_l0": np.zeros(20, np.float32)}
    refused(r"bias is the sum of bias_ih and bias_hh.*freeze", [replace(LSTM, zero=())], made(shapes, others=zeros))


def test_a_layer_that_decides_otherwise_there():
    refused("haiku decides otherwise: input and state share one matrix", [LSTM], made(only("lstm")), "haiku")


def test_a_layer_half_frozen():
    given = made(
        {"attention.in_proj_weight": (3 * E, E)}, others={"attention.in_proj_bias": np.zeros(3 * E, np.float32)}
    )
    there = Map("torch", "keras", (SELF,))
    with pytest.raises(MapError, match="decides by"):
        there.apply(*given)
    parts = {f"attention/{name}/kernel": (E, HEADS, E // HEADS) for name in ("query", "key", "value")}
    snap, tensors = made(parts, dict.fromkeys(parts, Layout((1, 2))))
    moved = replace(snap, parameters={x: e for x, e in snap.parameters.items() if "query" not in x})
    tensors = {x.replace("parameter/attention/query", "other/attention/query"): t for x, t in tensors.items()}
    tensors = {x: t for x, t in tensors.items() if x.startswith("other/") or "query" not in x}
    moved.check(tensors)
    with pytest.raises(MapError, match="all must be trained or all frozen"):
        there.reversed().apply(moved, tensors)
    late = replace(snap.parameters["attention/query/kernel"], step=STEP - 1)
    with pytest.raises(MapError, match="of one group, step count and dtype"):
        there.reversed().apply(*made(parts, dict.fromkeys(parts, Layout((1, 2))), **{"attention/query/kernel": late}))


def test_stacks_that_are_none():
    given = made(only("blocks"))
    refused("each is named", [replace(BLOCKS, target=("a/*", "b/*"))], given)
    refused("have no axis 4", [replace(BLOCKS, stack=4)], given)
    ragged = made(only("blocks.0") | {"blocks.1.weight": (7, 6), "blocks.1.bias": (7,)})
    refused("have several shapes", [BLOCKS], ragged)
    refused("do not all have the same tensors", [BLOCKS], made(only("blocks.0") | {"blocks.1.weight": (7, 5)}))
    there = Map("linen", "torch", (Pair("dense", ("scan/*",), ("0.*", "1.*")),))
    with pytest.raises(MapError, match="does not let each layer of a stack along axis 0 decide alone"):
        there.apply(*made({"scan/kernel": (2, 3, 4)}, {"scan/kernel": Layout(-1)}))
    with pytest.raises(MapError, match="does not have 2 layers along axis 0"):
        there.apply(*made({"scan/kernel": (3, 3, 4)}, {"scan/kernel": Layout(-1, 0)}))


@pytest.mark.parametrize("target", ["haiku", "equinox"])
def test_statistics_that_the_other_row_has_not(target):
    sizes = {"...": 2} if target == "haiku" else {}
    given = made(only("bn"), others={name: OTHERS[name] for name in ("bn.running_mean", "bn.running_var")})
    pair = replace(NORM, sizes=sizes)
    refused(f"no place in {target} for running_mean, running_var", [pair], given, target)
    apart = replace(pair, source=({"weight": "bn.weight", "bias": "bn.bias"},))
    own = [Pair("same", (name,), (f"bn/{name}",)) for name in ("bn.running_mean", "bn.running_var")]
    _, moved = Map("torch", target, (apart, *own)).apply(*given)
    assert {"other/bn/bn.running_mean", "other/bn/bn.running_var"} < set(moved)


@pytest.mark.parametrize("place", ["fc.weight", {"weight": "fc.weight", "bias": "fc.weight"}])
def test_one_name_for_two_tensors_of_a_layer(place):
    given = made({"fc.weight": (3, 4), "fc.bias": (3,)})
    refused("weight, bias would be one tensor of the source", [Pair("dense", (place,), ("fc/*",))], given)
    to = place if isinstance(place, str) else {"kernel": "fc.weight", "bias": "fc.weight"}
    refused("several tensors would be 'fc.weight' of the target", [Pair("dense", ("fc.*",), (to,))], given)


@pytest.mark.parametrize("size", [1, 3])
def test_a_stack_along_an_axis_after_one_of_size_1(size):
    names = ["0.weight", "1.weight"]
    given, tensors = made(dict.fromkeys(names, (4, size)))
    there = Map("torch", "linen", (Pair("dense", ("0.*", "1.*"), ("scan/*",), stack=1),))
    moved, held = there.apply(given, tensors)
    assert moved.parameters["scan/kernel"].layout == Layout(2, 1)
    back, returned = there.reversed().apply(moved, held)
    assert {entry.layout for entry in back.parameters.values()} == {Layout(0)}
    check_same(arrays(tensors), arrays(returned))


def test_one_name_for_a_parameter_and_something_else():
    given, tensors = made({"w": (2, 3)}, others={"w": np.zeros(2, np.float32)})
    refused("is a parameter of the snapshot and another tensor", [Pair("same", ("w",), ("w",))], (given, tensors))


# ------------------------------------------------------------------------------------------------ files


def test_a_file_holds_all_of_a_map(tmp_path):
    table = Pair("conv", ({"weight": "conv.weight", "bias": "conv.bias"},), ("conv/*",))
    own = {
        "mixer": {"title": "mixer", "torch": {"layer": "M", "w": "OUT in"}, "keras": {"layer": "M", "w": "w: in OUT"}}
    }
    for one in (KERAS, Map("torch", "keras", (table, Pair("mixer", ("mix.*",), ("mix/*",))), own)):
        one.write(tmp_path / "map.toml")
        assert Map.read(tmp_path / "map.toml") == one
        assert Map.read(tmp_path / "map.toml").reversed().reversed() == one


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_takes_further_layers(count, tmp_path):
    """However few and short those are that it has: they are never written in one line."""
    pairs = tuple(Pair("dense", (f"{i}.*",), (f"d{i}/*",), {"m": 1} if i else {}) for i in range(count))
    doubtful = Pair("lstm", ("r.*",), ("r/*",), {"m": 2}, zero=("bias_hh",))
    Map("torch", "keras", pairs).write(tmp_path / "map.toml", ["unmatched: the last"], [doubtful])
    with open(tmp_path / "map.toml", "a") as file:
        file.write('[[layer]]\nrow = "conv"\nsource = "x.*"\ntarget = "y/*"\n')
    added = Pair("conv", ("x.*",), ("y/*",))
    assert Map.read(tmp_path / "map.toml").pairs == (*pairs, added)
    text = (tmp_path / "map.toml").read_text()
    (tmp_path / "map.toml").write_text(re.sub(r"(?m)^# (?!unmatched)", "", text))
    assert Map.read(tmp_path / "map.toml").pairs == (*pairs, doubtful, added)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("source = torch", "Invalid value"),
        ('source = "torch"', "'target' is a required property"),
        (
            'source = "mxnet"\ntarget = "keras"\n[[layer]]\nrow = "conv"\nsource = "a"\ntarget = "b"',
            "'mxnet' is not one of",
        ),
        (
            'source = "torch"\ntarget = "keras"\n[[layer]]\nrow = "conv"\nsource = "a"\nto = "b"',
            "'to' was unexpected|'target' is a",
        ),
        (
            'source = "torch"\ntarget = "keras"\n[[layer]]\nrow = "x"\nsource = "a"\ntarget = "b"\n'
            '[rows.x]\ntitle = "x"\n[rows.x.torch]\nlayer = "X"\nw = "OUT in"\n'
            '[rows.x.keras]\nlayer = "X"\nw = "v: in OUT"',
            "PyTorch's layer has no 'v'",
        ),
    ],
)
def test_a_file_that_is_no_map(text, match, tmp_path):
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(MapError, match=match):
        Map.read(tmp_path / "map.toml")


def test_an_unknown_row():
    refused("there is no row 'convolution'", [replace(CONV, row="convolution")])


def test_a_refusal_leaves_the_target_file_alone(tmp_path):
    snapshot.write(tmp_path / "a", *whole())
    (tmp_path / "b").write_text("here before")
    with pytest.raises(MapError, match="leaves out"):
        convert_snapshot(tmp_path / "a", tmp_path / "b", Map("torch", "keras", KERAS.pairs[1:]))
    data = (tmp_path / "a").read_bytes()
    for broken in (data[:-5], data.replace(b'\\"spec\\": \\"', b'\\"spec\\": \\"9')):
        assert broken != data
        (tmp_path / "a").write_bytes(broken)
        with pytest.raises(SnapshotError):
            convert_snapshot(tmp_path / "a", tmp_path / "b", KERAS)
    assert (tmp_path / "b").read_text() == "here before"
    assert {x.name for x in tmp_path.iterdir()} == {"a", "b"}


def test_one_layer_at_a_time_is_read():
    """And nothing before it is asked for, but what must be zero."""
    held = []
    given, tensors = whole()

    def counting(x):
        def read():
            held.append(x.shape)
            return x.read()

        return x._replace(read=read)

    _, moved = KERAS.apply(given, {name: counting(x) for name, x in tensors.items()})
    assert held == [(20,)]
    moved["m/conv/kernel"].read()
    assert held == [(20,), (6, 4, 3, 3)]


def test_a_stack_is_read_once_and_filled_in_place():
    count, edge = 8, 128
    stack = {"scan/kernel": (count, edge, edge), "scan/bias": (count, edge)}
    given, tensors = made(stack, {"scan/kernel": Layout(-1, 0), "scan/bias": Layout(None)}, algorithm="sgdp")
    asked = []

    def counting(name, x):
        return x._replace(read=lambda: (asked.append(name), x.read().copy())[1])

    there = Map("linen", "torch", (Pair("dense", ("scan/*",), tuple(f"{i}.*" for i in range(count))),))
    moved, held = there.apply(given, {name: counting(name, x) for name, x in tensors.items()})
    for x in held.values():
        x.read()
    assert sorted(asked) == sorted(tensors)

    parts = {name: tensor(np.ascontiguousarray(x.read())) for name, x in held.items()}
    _, again = there.reversed().apply(moved, parts)
    tracemalloc.start()
    again["parameter/scan/kernel"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (count + 3) * edge * edge * 4
    check_same(arrays(tensors), arrays(again))


def test_every_row_of_the_table_comes_back():
    """What `loss` allows is a bijection in bits, moments included."""
    sizes = {"in": 2, "m": 2, "out": 4, "heads": 2, "dim": 3, "hidden": 5, "state": 5, "groups": 2, "...": 2}
    tried = 0
    for name, row in layers.rows().items():
        for framework in row.forms:
            if row.loss("torch", framework) is None:
                torch = {x: _shape(row, piece.axes, sizes) for x, (piece,) in row.forms["torch"].pieces.items()}
                given = {x: np.random.default_rng(1).standard_normal(shape, np.float32) for x, shape in torch.items()}
                known = layers.axis_sizes(name, torch, "torch", framework, _known(row, sizes))
                for moments in (False, True):
                    there = layers.convert(name, given, "torch", framework, moments=moments, sizes=known)
                    shapes = layers.target_shapes(name, torch, "torch", framework, known)
                    assert {x: y.shape for x, y in there.items()} == shapes
                    back = layers.convert(name, there, framework, "torch", moments=moments, sizes=known)
                    check_same(given, back)
                tried += 1
    assert tried > 80


def _known(row, sizes):
    names = {x.name.removeprefix("1") for form in row.forms.values() for x in form.letters()}
    return {name: size for name, size in sizes.items() if name in names}


def _shape(row, axes, sizes):
    def size(letter):
        return len(row.parts) if letter.name == row.part_axis else sizes.get(letter.name, 3)

    shape = []
    for axis in axes:
        if axis and axis[0].name in ("...", "1..."):
            shape += [3, 3] if axis[0].name == "..." else [1, 1]
        else:
            shape.append(int(np.prod([size(letter) for letter in axis])))
    return tuple(shape)
