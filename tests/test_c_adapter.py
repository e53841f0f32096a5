"""The C example: by the exported vectors, over the protocol, with faults planted, and with nonsense on its stdin."""

import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from adamp_conformance import cli, protocol, vectors
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.adapters.process import ProcessAdapter
from adamp_conformance.cases import DESIGNED
from adamp_conformance.export import export
from adamp_conformance.modes import RUNS, Bench, Problem, create, judge_refusal, judge_vectors
from adamp_conformance.protocol import Refused
from adamp_conformance.results import EXIT_CONFORMS, EXIT_FAILED
from adamp_spec import Layout

SOURCES = Path(__file__).parent.parent / "examples/c"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
BUILDS = {
    "optimized": ["-O2"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

# fault -> what stands in adamp.h, what is planted, and the vectors that must find it
FAULTS = {
    "lost wd_ratio": (
        {"branch == NONE ? 1 : (REAL)h->wd_ratio; /* PROJ-7 */": "1;"},
        "adamp/views/channel",
    ),
    "eps before the bias correction": (
        {"(sqrt(v[i]) / root + eps)": "((sqrt(v[i]) + eps) / root)"},
        "adamp/eps/small-channel",
    ),
    "mean for maximum": (
        {
            "bool passes = true;": "bool passes = true; REAL sum = 0;",
            "passes = passes && cosine < threshold;": "sum += cosine; passes = sum * (REAL)d < threshold * (REAL)n;",
        },
        "adamp/views/maximum",
    ),
    "<= for <": ({"cosine < threshold": "cosine <= threshold"}, "adamp/threshold/on-threshold"),
    "NaN passes": ({"cosine < threshold": "!(cosine >= threshold)"}, "adamp/non-finite/nan-gradient"),
    "no layer view": ({"view <= LAYER": "view < LAYER"}, "adamp/views/layer"),
    "1 - beta^t in float32": (
        {"-expm1((long double)exponent * log((long double)base))": "1 - pow((float)base, (float)exponent)"},
        "adamp/second-step/none",
    ),
    "undivided decay": ({"(h->weight_decay / (1 - h->momentum))": "h->weight_decay"}, "sgdp/views/none"),
    "projected momentum": ({"h->project_momentum && ": ""}, "sgdp/views/channel"),
}


@pytest.fixture(scope="module")
def corpus():
    return vectors.load()


@pytest.fixture(scope="module")
def header(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("header")
    export(corpus, "c", folder / "vectors.h", ["float64", "float32"])
    return folder


def compiler():
    found = shutil.which("cc") or shutil.which("gcc")
    assert found, "there is no C compiler: install gcc, or another that is called cc"
    return found


def build(source, target, *options):
    run = subprocess.run([compiler(), *STRICT, *options, source, "-lm", "-o", target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target


def check(program):
    return subprocess.run([program], capture_output=True, text=True)


@pytest.fixture(scope="module", params=BUILDS)
def adapter(request, tmp_path_factory):
    return build(SOURCES / "adapter.c", tmp_path_factory.mktemp("adapter") / "adapter", *BUILDS[request.param])


@pytest.mark.parametrize("options", BUILDS)
def test_every_vector_with_rows_along_the_first_axis_passes(corpus, header, tmp_path, options):
    run = check(build(SOURCES / "check.c", tmp_path / "check", *BUILDS[options], f"-I{header}"))
    assert run.returncode == 0, run.stdout + run.stderr
    ours = [vector for group in corpus.groups if group.dtype in ("float32", "float64") for vector in group.vectors]
    applicable = [x for x in ours if x.layout == Layout() or (len(x.shape) < 2 and x.layout.view is None)]
    assert len(applicable) > 300
    assert run.stdout.startswith(
        f"{len(applicable)} of {len(applicable)} vectors pass; {len(ours) - len(applicable)} of"
    )


def test_the_exported_header_compiles_as_cpp(header, tmp_path):
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "all.cc"
    program.write_text('#include "vectors.h"\nint main() { return ADAMP_VECTOR_COUNT > 300 ? 0 : 1; }\n')
    subprocess.run([found, "-Wall", "-Wextra", "-Werror", f"-I{header}", program, "-o", tmp_path / "all"], check=True)
    assert check(tmp_path / "all").returncode == 0


def test_the_makefile_makes_and_runs_both(tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("build"))
    command = f"ADAMP_PARITY={Path(sys.executable).parent / 'adamp-parity'}"
    run = subprocess.run(["make", "-C", folder, "check", "adapter", command], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "vectors pass" in run.stdout
    assert ProcessAdapter(str(folder / "build/adapter")).capabilities().name == "c"


def plant(fault, folder):
    """A copy of the sources with a fault in it."""
    places, _ = FAULTS[fault]
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("build"))
    source = (folder / "adamp.h").read_text()
    for before, after in places.items():
        assert before in source, f"{before!r} must stand in adamp.h"
        source = source.replace(before, after)
    (folder / "adamp.h").write_text(source)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(corpus, header, tmp_path, fault):
    folder = plant(fault, tmp_path / "c")
    _, id = FAULTS[fault]
    run = check(build(folder / "check.c", tmp_path / "check", f"-I{header}"))
    assert run.returncode == 1, run.stdout
    assert f"failed {id} in float32\n" in run.stdout

    adapter = build(folder / "adapter.c", tmp_path / "adapter")
    (group,) = (x for x in corpus.groups if x.dtype == "float32" and id in [vector.id for vector in x.vectors])
    problem = Problem(group.only([id]), "float32", "torch")
    outcomes = judge_vectors(create(partial(ProcessAdapter, str(adapter)), problem), problem)
    assert outcomes[id].problem is not None


def test_a_run_names_the_mistake(tmp_path):
    """Two processes of the suite, each with an adapter of its own; without the fault the same command passes."""

    def run(folder, *command):
        adapter = build(folder / "adapter.c", tmp_path / "adapter")
        return CliRunner().invoke(cli.main, [*command, f"exec:{adapter}"])

    command = ["run", "--mode", "step", "--jobs", "2", "--adapter"]
    assert run(SOURCES, *command).exit_code == EXIT_CONFORMS
    faulty = plant("lost wd_ratio", tmp_path / "c")
    result = run(faulty, *command)
    assert result.exit_code == EXIT_FAILED
    assert re.search(r"fails vectors that are for: .*\bdecay-ratio \(", result.output)
    result = run(faulty, "diagnose")
    assert result.exit_code == EXIT_FAILED
    assert "behaves like the wrong optimizer decay-ratio/ignored" in result.output


def test_the_vectors_pass_over_the_protocol(corpus, adapter):
    make = partial(ProcessAdapter, str(adapter))
    capabilities = make().capabilities()
    judged = 0
    for group in corpus.groups:
        ours = group.only([vector.id for vector in group.vectors if vector.layout == Layout()])
        if group.dtype in capabilities.dtypes and ours.vectors:
            problem = Problem(ours, group.dtype, "torch")
            outcomes = judge_vectors(create(make, problem), problem)
            assert {id: x.problem for id, x in outcomes.items() if x.problem} == {}
            assert all(x.worst.after.branches is not None for x in outcomes.values())
            judged += len(outcomes)
    assert judged > 300


@pytest.mark.parametrize("case", [case for case in DESIGNED if set(case.modes) & set(RUNS)], ids=lambda case: case.id)
def test_the_runs_pass_over_the_protocol(adapter, case):
    case = replace(case, tensors={name: x for name, x in case.tensors.items() if x.layout == Layout()})
    make = partial(ProcessAdapter, str(adapter))
    problem = Problem(case, "float32", "torch")
    bench = Bench(create(make, problem), problem, make, {"oracle": OracleAdapter})
    for mode in case.modes:
        if mode in RUNS:
            assert RUNS[mode](bench).problem is None


def test_what_must_be_refused_is_refused(corpus, adapter):
    assert len(corpus.refusals) > 50
    for refusal in corpus.refusals:
        assert judge_refusal(partial(ProcessAdapter, str(adapter)), refusal) is None, refusal.id


def test_a_refusal_names_the_parameter_the_value_and_what_is_allowed(adapter):
    process = ProcessAdapter(str(adapter))
    case = next(case for case in DESIGNED if case.id == "adamp/views")
    parameters = {name: x for name, x in case.parameters("float32", "torch").items() if name in ("channel", "vector")}
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1}
    hyper["nesterov"] = False
    with pytest.raises(Refused, match=r"beta1.* = 1 must be in \[0, 1\)"):
        process.create("adamp", hyper | {"beta1": 1.0}, parameters)
    with pytest.raises(Refused, match=r"the layout of .channel. is not Layout\(0\)"):
        process.create("adamp", hyper, {"channel": parameters["channel"]._replace(layout=Layout(1))})
    process.create("adamp", hyper, parameters)
    with pytest.raises(Refused, match=r"there is no parameter .bias."):
        process.step({"bias": parameters["vector"].value})
    before = process.dump()
    process.step({"vector": parameters["vector"].value})  # STATE-4
    after = process.dump()
    assert after.step == 1
    assert after.branches is None
    assert after.parameters["channel"].tobytes() == before.parameters["channel"].tobytes()
    assert after.parameters["vector"].tobytes() != before.parameters["vector"].tobytes()


def test_names_come_back_as_they_came(adapter):
    process = ProcessAdapter(str(adapter))
    case = next(case for case in DESIGNED if case.id == "sgdp/views")
    value = case.parameters("float64", "torch")["channel"]
    hyper = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "eps": 1e-8, "weight_decay": 0.0, "delta": 0.1}
    hyper |= {"wd_ratio": 0.1, "nesterov": False, "project_momentum": False}
    names = ['a "quoted\\" name', "größe/重み", "tab\tand\nnewline", "", "x" * 3000]
    process.create("sgdp", hyper, dict.fromkeys(names, value))
    process.step(dict.fromkeys(names, value.value))
    assert list(process.dump().parameters) == names


def test_nonsense_is_answered_by_an_error_and_hurts_nobody(adapter):
    """Truncated and damaged requests: a reply to each, no complaint of the sanitizers, and the truth afterwards."""
    case = next(case for case in DESIGNED if case.id == "adamp/views")
    initial = case.initial("float32", "torch")
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1}
    names = ("channel", "vector")
    parameters = {name: x for name, x in case.parameters("float32", "torch").items() if name in names}
    state = protocol.state_message(initial)
    state["parameters"] = {name: state["parameters"][name] for name in names}
    good = [
        protocol.create_message("adamp", hyper | {"nesterov": False}, parameters),
        {"command": "load", "state": state},
        protocol.step_message({name: initial.parameters[name] for name in names}),
        {"command": "dump"},
        {"command": "hello", "protocol": 1},
    ]
    good = [json.dumps(message).encode() for message in good]
    chosen = random.Random(0)
    lines = []
    for _ in range(1500):
        line = bytearray(chosen.choice(good))
        for _ in range(chosen.randrange(1, 4)):
            at = chosen.randrange(len(line))
            match chosen.randrange(4):
                case 0:
                    line = line[: at + 1]
                case 1:
                    line[at] = chosen.choice(b'{}[]",:0\\x\xff\0 -e')
                case 2:
                    del line[at : at + chosen.randrange(1, 30)]
                    line = line or bytearray(b"{")
                case 3:
                    line[at:at] = line[at : at + chosen.randrange(1, 30)]
        lines.append(bytes(line).replace(b"\n", b" "))
    lines += [b"", b"{" * 100_000, b'{"command":' * 1000, b"[]", b"null", b'{"command": "dump"', b'{"command": "fly"}']
    lines += [line for line in good for _ in range(2)]
    run = subprocess.run([adapter], input=b"\n".join(lines) + b"\n", capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stderr == b""
    replies = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(replies) == len(lines)
    assert sum("error" in reply for reply in replies) > 1000
    last = replies[-len(good) * 2 :]
    assert [next(iter(reply)) for reply in last] == ["ok"] * 6 + ["state"] * 2 + ["protocol"] * 2
    assert last[6]["state"]["step"] == initial.step + 2


def test_requests_out_of_turn_are_errors(adapter):
    requests = [{"command": "dump"}, {"command": "step", "gradients": {}}, {"command": "hello", "protocol": 2}]
    text = "".join(json.dumps(request) + "\n" for request in requests) + '{"command": "stop"}\n{"command": "dump"}\n'
    run = subprocess.run([adapter], input=text, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert [next(iter(json.loads(line))) for line in run.stdout.splitlines()] == ["error"] * 3
