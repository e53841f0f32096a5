"""The protocol: messages, processes that lie, files of answers, and what is exported for other languages."""

import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from adamp_conformance import protocol, vectors
from adamp_conformance.adapter import DTYPES, Capabilities, Parameter, State
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.adapters.process import ProcessAdapter
from adamp_conformance.export import export
from adamp_conformance.modes import Problem, create, judge_vectors
from adamp_conformance.protocol import ProtocolError, Refused
from adamp_conformance.serve import serve
from adamp_conformance.spec_files import spec_file
from adamp_spec import Branch, Layout

ROOT = Path(__file__).parent.parent
LIAR = f"{sys.executable} {ROOT / 'tests/fake_adapters/liar.py'}"
ORACLE = f"{sys.executable} -m adamp_conformance.serve adamp_conformance.adapters.oracle:OracleAdapter"
HYPER = {"lr": 0.05, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 2.0, "delta": 0.1, "wd_ratio": 0.1}
HYPER = HYPER | {"nesterov": False}


@pytest.fixture(scope="module")
def corpus():
    return vectors.load()


def views(corpus, *names):
    (group,) = (group for group in corpus.groups if group.id == "core/adamp-views.float32")
    return Problem(group.only([f"adamp/views/{name}" for name in names]), "float32", "torch")


def special(dtype):
    """Every kind of number, NaNs with a payload and a sign among them."""
    size = DTYPES[dtype].itemsize
    top = {8: 0x7FF0 << 48, 4: 0x7F80 << 16, 2: 0x7F80 if dtype == "bfloat16" else 0x7C00}[size]
    patterns = [0, 1, top - 1, top, top + 1, top + 2, 1 << (8 * size - 1), (1 << (8 * size)) - 1]
    return np.array(patterns, f"u{size}").view(DTYPES[dtype]).reshape(2, 4)


# Messages


@pytest.mark.parametrize("dtype", [*DTYPES, "int32", "complex64"])
def test_a_tensor_comes_back_bit_for_bit(dtype):
    x = special(dtype) if dtype in DTYPES else np.array([[-1, 2], [3, 4]]).astype(dtype)
    for array in (x, x.T, x[:, ::2], np.array(x[0, 1]), x[0, 1], np.zeros((3, 0), x.dtype)):
        message = protocol.tensor_message(array)
        back = protocol.read_tensor(json.loads(json.dumps(message)))
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_numbers_are_written_as_the_specification_of_the_protocol_says():
    assert protocol.tensor_message(np.array([1, -2], np.float32))["data"] == "3f800000c0000000"
    assert protocol.hyper_message({"delta": 0.1, "nesterov": True}) == {"delta": "3fb999999999999a", "nesterov": True}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: protocol.tensor_message(np.zeros(3, np.longdouble)), "float128 cannot be sent"),
        (lambda: protocol.hyper_message({"lr": "0.1"}), "lr='0.1' cannot be sent"),
        (lambda: protocol.write_line("dump", {"command": "dump", "why": 1}), "'why' was unexpected"),
        (lambda: protocol.read_request(b'{"command": "explain"}'), "'explain' is not a command"),
        (lambda: protocol.read_request(b'{"command": "load"}'), "'state' is a required property"),
        (lambda: protocol.read_tensor({"dtype": "float32", "shape": [2], "data": "3f800000"}), "do not fit its shape"),
        (lambda: protocol.read_tensor({"dtype": "float32", "shape": [2**40, 2**40], "data": ""}), "do not fit"),
    ],
)
def test_what_cannot_be_said_is_neither_a_refusal_nor_a_pass(make, words):
    with pytest.raises(ProtocolError, match=words) as caught:
        make()
    assert not isinstance(caught.value, (ValueError, TypeError))  # which would count as a refusal
    assert isinstance(Refused("no"), ValueError)


def test_the_examples_of_the_text_are_messages_and_a_true_conversation():
    text = spec_file("PROTOCOL.md").read_text()
    examples = [(kind, json.loads(block)) for kind, block in re.findall(r"```json (\w+)\n(.*?)```", text, re.S)]
    schema = json.loads(spec_file("schema/message.schema.json").read_text())
    messages = {reference["$ref"].rpartition("/")[2] for reference in schema["oneOf"]}
    assert {kind for kind, _ in examples} == messages | {"tensor"}
    for kind, message in examples:
        validator = jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{kind}"})
        validator.validate(message)
        if kind in messages:
            jsonschema.validate(message, schema)
    by_kind = dict(examples)
    replies = io.BytesIO()
    requests = [json.dumps(by_kind[kind]).encode() for kind in ("create", "load", "step", "dump", "stop", "dump")]
    serve(OracleAdapter(), requests, replies)
    told = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert told == [by_kind["done"]] * 3 + [by_kind["dumped"]]


def test_every_definition_of_the_schema_is_closed():
    schema = json.loads(spec_file("schema/message.schema.json").read_text())

    def objects(node):
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for child in node.values():
                yield from objects(child)
        elif isinstance(node, list):
            for child in node:
                yield from objects(child)

    found = list(objects(schema["$defs"]))
    assert len(found) > 15
    for node in found:
        assert node.get("additionalProperties") is False or isinstance(node["additionalProperties"], dict)


def test_capabilities_come_back():
    one = Capabilities(
        "c", "1.0", "native", ("adamp",), ("float32",), "torch", "first", {"nesterov": False, "eps": 1e-6}
    )
    line = protocol.write_line("capabilities", protocol.capabilities_message(one))
    assert protocol.read_capabilities(protocol.read_reply("capabilities", line)) == one


# Processes


def test_a_process_is_judged_like_the_adapter_that_it_serves(corpus):
    names = "channel", "layer", "none", "scalar"
    there, here = (
        judge_vectors(create(make, views(corpus, *names)), views(corpus, *names))
        for make in (lambda: ProcessAdapter(ORACLE), OracleAdapter)
    )
    assert len(there) == len(names)
    for id, outcome in there.items():
        assert outcome.problem is None
        assert (
            outcome.worst.verdict == here[id].worst.verdict
            or outcome.worst.verdict.margin == here[id].worst.verdict.margin
        )
        for name, branch in here[id].worst.after.branches.items():
            np.testing.assert_array_equal(outcome.worst.after.branches[name], branch)


def test_branches_of_several_slices_and_capabilities_cross():
    adapter, local = ProcessAdapter(ORACLE), OracleAdapter()
    assert adapter.capabilities() == local.capabilities()
    x = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    gradient = {"stack": np.stack([np.zeros((3, 4)), np.ones((3, 4))])}
    states = []
    for each in (adapter, local):
        each.create("adamp", HYPER, {"stack": Parameter(x, Layout(1, batch=0))})
        each.step(gradient)
        states.append(each.dump())
    assert states[0].branches["stack"].shape == (2, 1, 1)
    np.testing.assert_array_equal(states[0].branches["stack"].ravel(), [Branch.CHANNEL, Branch.NONE])
    np.testing.assert_array_equal(states[0].branches["stack"], states[1].branches["stack"])
    assert states[0].parameters["stack"].tobytes() == states[1].parameters["stack"].tobytes()


ERRORS = {
    "hangs": "asked to step: no reply within 1 s; it was killed",
    "stops-reading": "asked to create: no reply within 1 s; it was killed",
    "dribbles": "asked to step: no reply within 1 s",
    "dies": "it had exited with status 1; the end of its stderr: .*MemoryError: no room for 8 elements",
    "dies-mid-reply": "asked to dump: it closed stdout; it had exited with status 0",
    "is-killed": "it had died of SIGABRT",
    "closes-stdout": "it closed stdout; it was killed",
    "exits-at-once": "asked to hello: it closed stdout; it had exited with status 7",
    "garbage": "is not a line of JSON",
    # How much of it is there at once is left to chance.
    "logs": r"step 11, loss 0.3(\\n.* where a reply and nothing else belongs|.* is not a line of JSON)",
    "logs-after": r"step 11, loss 0.3(\\n)?'( to stdout| is not a line of JSON)",
    "logs-later": r"asked to create: it wrote b'ready(\\n)?' to stdout without being asked",
    "endless-line": "its reply is longer than",
    "deep": "is not a line of JSON",
    "a-list": "is not a JSON object",
    "more-than-ok": "'margin' was unexpected",
    "not-quite-ok": "True was expected",
    "ok-for-a-state": "'state' is a required property|'ok' was unexpected",
    "key-twice": "the key 'state' stands twice",
    "failure": "it failed: out of memory",
    "next-protocol": "it speaks protocol 2, this is protocol 1",
    "unknown-dtype": "'float8' is not one of",
    "wrong-shape": r"p of 'channel' is float32\[8, 4\], must be float32\[4, 8\]",
    "wrong-dtype": r"m of 'channel' is float64\[4, 8\], must be float32\[4, 8\]",
    "other-half": r"p of 'channel' is bfloat16\[4, 8\], must be float32\[4, 8\]",
    "short-data": "do not fit its shape",
    "decimal-data": "does not match",
    "missing-parameter": "parameter 'channel' is missing",
    "unknown-parameter": "parameter 'w' is not one of the problem",
    "missing-moment": r"the moments of adamp are \('m', 'v'\), got \('m',\)",
    "missing-moment-of-one": "`v` of 'channel' is missing",
    "step-in-words": "'eleven' is not of type 'integer'",
    "step-is-true": "True is not of type 'integer'",
    "step-is-nan": "NaN is not a number of JSON",
    "unknown-branch": "'rows' is not one of",
    "branches-of-two": "2 branches do not fit 'channel'",
    "branch-of-one": "`branch` of 'channel' is missing",
}

FAILURES = {
    "nan": ("layer", r"p of 'layer'\[0, 1\] is off by inf"),
    "wrong-branch": ("layer", "off by inf"),
    "one-bit": ("none", r"p of 'none'\[3, 7\] is off by"),
    "same-state": ("none", "off by"),
    "step-does-not-count": ("none", "the step count went from 10 to 10"),
}

MANNERS = {"floods-stderr", "stays"}


def judge_liar(corpus, lie, timeout):
    adapter = ProcessAdapter(f"{LIAR} {lie}", timeout)
    adapter.capabilities()
    if lie == "logs-later":
        time.sleep(1)
    problem = views(corpus, "channel", "layer", "none")
    make = lambda: adapter  # noqa: E731
    return judge_vectors(create(make, problem), problem)


def test_every_lie_is_told():
    source = (ROOT / "tests/fake_adapters/liar.py").read_text()
    names = re.findall(r"^(?:@on\(\"\w+\"\)|@about_state)\ndef (\w+)\(", source, re.M)
    assert {name.replace("_", "-") for name in names} == {*ERRORS, *FAILURES, *MANNERS, "refusal"}


@pytest.mark.parametrize("lie", ERRORS)
def test_what_is_not_an_answer_is_an_error(corpus, lie):
    slow = lie not in ("hangs", "stops-reading", "dribbles")
    before = descriptors()
    with pytest.raises(ProtocolError) as caught:
        judge_liar(corpus, lie, 60 if slow else 1)
    message = str(caught.value)
    assert re.search(ERRORS[lie], message, re.S), message
    assert f"liar.py {lie}`" in message
    assert len(message) < 4000
    assert descriptors() == before


def test_a_refusal_says_what_the_implementation_said(corpus):
    with pytest.raises(Refused, match=r"^momentum = 2 must be in \[0, 1\)$"):
        judge_liar(corpus, "refusal", 60)


@pytest.mark.parametrize("lie", FAILURES)
def test_what_is_a_wrong_answer_is_failed_by_the_judge(corpus, lie):
    name, words = FAILURES[lie]
    outcomes = judge_liar(corpus, lie, 60)
    assert re.search(words, outcomes[f"adamp/views/{name}"].problem), outcomes


def test_a_flood_on_stderr_blocks_nobody(corpus):
    assert {outcome.problem for outcome in judge_liar(corpus, "floods-stderr", 60).values()} == {None}


def test_a_refusal_changes_nothing_and_the_conversation_goes_on():
    adapter = ProcessAdapter(ORACLE)
    value = np.ones((2, 3), np.float32)
    adapter.create("adamp", HYPER, {"w": Parameter(value, Layout())})
    before = adapter.dump()
    child = adapter.child
    for refused in (
        lambda: adapter.create("adamp", HYPER | {"lr": -1.0}, {"w": Parameter(value, Layout())}),
        lambda: adapter.create("adamp", HYPER | {"eps": float("nan")}, {"w": Parameter(value, Layout())}),
        lambda: adapter.step({"w": np.ones((3, 2), np.float32)}),
        lambda: adapter.step({"w": np.ones((2, 3), np.complex64)}),
    ):
        with pytest.raises(Refused):
            refused()
        after = adapter.dump()
        assert after.step == before.step == 0
        for tensor, x in after.tensors("w").items():
            assert x.tobytes() == before.tensors("w")[tensor].tobytes()
    assert adapter.child is child


def test_after_an_error_there_is_no_problem_until_the_next():
    adapter = ProcessAdapter(f"{LIAR} dies")
    problem = {"w": Parameter(np.ones((2, 3), np.float32), Layout())}
    adapter.create("adamp", HYPER, problem)
    dead = adapter.child
    with pytest.raises(ProtocolError):
        adapter.step({"w": np.ones((2, 3), np.float32)})
    with pytest.raises(ProtocolError):
        adapter.dump()
    adapter.create("adamp", HYPER, problem)
    assert adapter.child is not dead
    assert adapter.dump().step == 0


def test_commands_that_do_not_start():
    with pytest.raises(ProtocolError, match=r"`/no/such/adapter` cannot be started: .*No such file"):
        ProcessAdapter("/no/such/adapter").capabilities()
    for command in ("", "  ", "adapter 'unclosed"):
        with pytest.raises(ValueError, match=r"empty|quotation"):
            ProcessAdapter(command)


# Processes come and go


def descriptors():
    return len(os.listdir("/dev/fd"))


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that nobody has waited for is not running
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_process_serves_one_adapter_after_the_other_but_never_two_at_once():
    command = ORACLE.replace(" -m", " -B -m")  # which no other test has
    one, two = ProcessAdapter(command), ProcessAdapter(command)
    one.capabilities(), two.capabilities()
    assert one.child is not two.child
    child = two.child
    del two
    gc.collect()
    three = ProcessAdapter(command)
    three.capabilities()
    assert three.child is child


def test_a_timeout_ends_the_children_of_the_process_too(corpus):
    with pytest.raises(ProtocolError) as caught:
        judge_liar(corpus, "hangs", 1)
    grandchild = int(re.search(r"started (\d+)", str(caught.value))[1])
    for _ in range(50):
        if not is_running(grandchild):
            return
        time.sleep(0.1)
    pytest.fail(f"process {grandchild} still runs")


@pytest.mark.parametrize("command", [ORACLE, f"{LIAR} stays"])
def test_python_ends_and_so_do_the_processes(command):
    program = f"""
from adamp_conformance.adapters.process import ProcessAdapter
adapter, other = ProcessAdapter({command!r}), ProcessAdapter({command!r})
adapter.capabilities(), other.capabilities()
print(adapter.child.process.pid, other.child.process.pid)
del other
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2
    assert not any(map(is_running, pids))


def test_a_long_conversation_and_a_large_tensor():
    adapter = ProcessAdapter(ORACLE)
    x = np.linspace(-1, 1, 2**18, dtype=np.float64).reshape(512, 512)  # four megabytes of digits
    adapter.create("adamp", HYPER, {"w": Parameter(x, None)})
    adapter.load(State(3, {"w": x}, {"m": {"w": x}, "v": {"w": x}}))
    state = adapter.dump()
    assert state.step == 3
    assert state.parameters["w"].tobytes() == state.moments["v"]["w"].tobytes() == x.tobytes()


# Files of answers


def answers_of(groups, capabilities):
    yield protocol.write_line("capabilities", protocol.capabilities_message(capabilities)).decode()
    for group in groups:
        problem = Problem(group, group.dtype, "torch")
        adapter = create(OracleAdapter, problem)
        adapter.load(problem.initial())
        states = []
        for index in range(group.steps):
            adapter.step(group.gradients(index, {}, "torch"))
            states.append(protocol.state_message(adapter.dump()))
        yield json.dumps({"group": group.id, "states": states}) + "\n"


WANTED = ("core/adamp-views.float32", "core/adamp-shapes.float64", "multistep/")


@pytest.fixture(scope="module")
def wanted(corpus):
    return [group for group in corpus.groups if group.id.startswith(WANTED)]


@pytest.fixture(scope="module")
def lines(wanted):
    return list(answers_of(wanted, OracleAdapter().capabilities()))


def read(tmp_path, corpus, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    return protocol.read_answers(path, corpus)


def test_answers_made_elsewhere_are_the_states_of_each_step(tmp_path, corpus, wanted, lines):
    capabilities, answers = read(tmp_path, corpus, "".join(lines))
    assert capabilities == OracleAdapter().capabilities()
    assert list(answers) == [group.id for group in wanted]
    for group in wanted:
        assert len(answers[group.id]) == group.steps
        for vector in group.vectors:
            for step, state in zip(vector.steps, answers[group.id], strict=True):
                got = state.tensors(vector.name)
                assert 0 in [outcome.outside(got) for outcome in step.outcomes], vector.id
                assert state.branches[vector.name].shape == vector.layout.rows(vector.shape).slices


def test_what_is_not_covered_need_not_be_answered(tmp_path, corpus):
    first = replace(OracleAdapter().capabilities(), layouts="first")
    (group,) = (group for group in corpus.groups if group.id == "core/adamp-shapes.float32")
    covered = group.only([vector.id for vector in group.vectors if vector.layout == Layout()])
    assert 0 < len(covered.vectors) < len(group.vectors)
    _, answers = read(tmp_path, corpus, "".join(answers_of([covered], first)))
    assert list(answers[group.id][0].parameters) == [vector.name for vector in covered.vectors]
    with pytest.raises(ProtocolError, match="is not one of the problem"):
        read(tmp_path, corpus, "".join(answers_of([group], first)))


def changed(line, change):
    message = json.loads(line)
    change(message, message["states"][0]["parameters"])
    return json.dumps(message) + "\n"


SPOILT = {
    "nothing": (lambda lines: [], "is empty"),
    "no capabilities": (lambda lines: lines[1:], "line 1: .*'group', 'states' were unexpected"),
    "no capabilities but a refusal": (lambda lines: ['{"refused": "no"}\n'], "line 1: no"),
    "another protocol": (lambda lines: [lines[0].replace('"protocol":1', '"protocol":3')], "it speaks protocol 3"),
    "a truncated line": (lambda lines: [*lines[:2], lines[2][:-100]], "line 3: .*is not a line of JSON"),
    "an empty line": (lambda lines: [*lines, "\n"], "is not a line of JSON"),
    "a group twice": (lambda lines: [*lines, lines[1]], "group core/adamp-shapes.float64 stands twice"),
}

CHANGED = {
    "an unknown group": (lambda line, tensors: line.update(group="core/adam"), "the corpus has no group 'core/adam'"),
    "a word too many": (lambda line, tensors: line.update(passed=True), "'passed' was unexpected"),
    "a vector too few": (lambda line, tensors: tensors.pop("row-1"), "parameter 'row-1' is missing"),
    "a vector too many": (lambda line, tensors: tensors.update(w=tensors["row-1"]), "'w' is not one of the problem"),
    "no moment": (lambda line, tensors: tensors["row-1"].pop("v"), "`v` of 'row-1' is missing"),
    "another shape": (lambda line, tensors: tensors["row-1"]["v"].update(shape=[1, 4]), "v of 'row-1' is|do not fit"),
    "a step too many": (
        lambda line, tensors: line["states"].append(line["states"][0]),
        "2 states of core/adamp",
    ),
}


@pytest.mark.parametrize("name", [*SPOILT, *CHANGED])
def test_a_spoilt_file_of_answers_is_refused_with_its_line(tmp_path, corpus, lines, name):
    if name in SPOILT:
        spoil, words = SPOILT[name]
        spoilt = spoil(lines)
    else:
        change, words = CHANGED[name]
        message = json.loads(lines[1])
        change(message, message["states"][0]["parameters"])
        spoilt, words = [lines[0], json.dumps(message) + "\n"], f"line 2: .*({words})"
    with pytest.raises(ProtocolError, match=words) as caught:
        read(tmp_path, corpus, "".join(spoilt))
    assert "answers.jsonl" in str(caught.value)


# Exports


def test_numpy_files_hold_every_vector(tmp_path, corpus):
    count = export(corpus, "npz", tmp_path, dtypes=["float32", "bfloat16"], algorithms=["sgdp"])
    groups = [x for x in corpus.groups if x.dtype in ("float32", "bfloat16") and x.algorithm == "sgdp"]
    assert count == sum(len(group.vectors) for group in groups) > 50
    assert len(list(tmp_path.rglob("*.npz"))) == len(groups)
    for group in groups:
        with np.load(tmp_path / f"{group.id}.npz", allow_pickle=False) as arrays:
            assert {name: arrays[f"hyper/{name}"].item() for name in group.hyper} == group.hyper
            assert (str(arrays["algorithm"]), str(arrays["dtype"]), arrays["step"]) == ("sgdp", group.dtype, group.step)
            for vector in group.vectors:
                for tensor, x in vector.before.items():
                    assert arrays[f"{vector.id}/before/{tensor}"].tobytes() == x.tobytes()
                for index, step in enumerate(vector.steps):
                    assert arrays[f"{vector.id}/{index}/g"].tobytes() == step.gradient.tobytes()
                    for number, outcome in enumerate(step.outcomes):
                        key = f"{vector.id}/{index}/{number}"
                        assert tuple(arrays[f"{key}/branch"]) == outcome.branch
                        for tensor in outcome.low:
                            assert arrays[f"{key}/{tensor}/lo"].tobytes() == outcome.low[tensor].tobytes()
                            assert arrays[f"{key}/{tensor}/hi"].tobytes() == outcome.high[tensor].tobytes()


def test_an_export_of_nothing_is_an_error(tmp_path, corpus):
    with pytest.raises(ValueError, match="use one of c, rust, npz"):
        export(corpus, "fortran", tmp_path / "x")
    with pytest.raises(ValueError, match="no vector is of dtype float8"):
        export(corpus, "c", tmp_path / "x", dtypes=["float8"])
    assert not list(tmp_path.iterdir())


RUST = """
mod vectors;
fn sum(bits: &[u64]) -> u64 { bits.iter().fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(*b)) }
fn main() {
    for v in vectors::VECTORS.iter() {
        let mut s = v.hyper.iter().fold(0, |a: u64, (_, b)| a ^ b);
        for x in v.before { s ^= sum(x); }
        for (g, outcomes) in v.steps {
            s ^= sum(g);
            for (_, lo, hi) in outcomes.iter() { for x in lo.iter().chain(hi.iter()) { s ^= sum(x); } }
        }
        println!("{} {} {} {:?} {:?} {:?} {:?} {}", v.id, v.group, v.step, v.shape, v.view, v.batch, v.channel, s);
    }
}
"""


@pytest.mark.skipif(shutil.which("rustc") is None, reason="there is no rustc")
def test_the_rust_module_compiles_and_holds_the_same_bits(tmp_path, corpus):
    groups = [group for group in corpus.groups if group.dtype == "float32" and group.algorithm == "adamp"]
    export(corpus, "rust", tmp_path / "vectors.rs", ["float32"], ["adamp"])
    (tmp_path / "main.rs").write_text(RUST)
    rustc = ["rustc", "--deny", "warnings", "--allow", "dead_code", "-o", tmp_path / "main", tmp_path / "main.rs"]
    subprocess.run(rustc, check=True, capture_output=True, text=True)
    told = subprocess.run([tmp_path / "main"], check=True, capture_output=True, text=True).stdout.splitlines()

    def total(x):
        value = 0
        for bits in x.view(np.uint32).ravel():
            value = (value * 31 + int(bits)) % 2**64
        return value

    expected = []
    for group in groups:
        for vector in group.vectors:
            value = 0
            for x in group.hyper.values():
                value ^= 0 if isinstance(x, bool) else int(np.float64(x).view(np.uint64))
            for x in vector.before.values():
                value ^= total(x)
            for step in vector.steps:
                value ^= total(step.gradient)
                for outcome in step.outcomes:
                    for x in (*outcome.low.values(), *outcome.high.values()):
                        value ^= total(x)
            rows = vector.layout.rows(vector.shape)
            axes = " ".join(str(list(axes)) for axes in (vector.shape, rows.shape, rows.batch, rows.channel))
            expected.append(f"{vector.id} {group.id} {group.step} {axes} {value}")
    assert told == expected
