"""What is run, what is skipped, and what each way to fail counts as: refusals, groups, exchanges, recorded files."""

import json
import sys
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from adamp_conformance import cli, protocol, runner
from adamp_conformance.adapter import MOMENTS, State
from adamp_conformance.adapters import recorded
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.cases import SEVERAL_STEPS
from adamp_conformance.implementations import Implementation, recorded_by, resolve, select
from adamp_conformance.modes import RUNS, WITH_OTHERS, Outcome, Problem, create, judge_refusal
from adamp_conformance.results import EXIT_ADAPTER, EXIT_CONFORMS, EXIT_FAILED, exit_code
from adamp_conformance.runner import Runner, catalogue, select_checks
from adamp_conformance.vectors import load
from adamp_spec import Layout

GROUPS = {group.id: group for group in load().groups}
REFUSALS = {refusal.id: refusal for refusal in load().refusals}
BY_STEP = [id for id, refusal in REFUSALS.items() if refusal.gradient[1] != refusal.parameter[1]]  # of another shape
BY_LOAD = [id for id, refusal in REFUSALS.items() if refusal.state[1] != refusal.parameter[1]]


class Inline:
    """Does in this process what a pool does in others, so that an adapter may be a class of a test."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *arguments):
        pass

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Inline)
    yield
    runner._factory.cache_clear()
    recorded._answers.cache_clear()


def results(make, **selection):
    """Check -> result of what makes adapters."""
    checks = select_checks(resolve(make), **selection)
    return {check: x for done in runner.run(checks, "cpu", jobs=1) for check, x in done.results}


# Refusals


def test_the_oracle_refuses_everything_that_is_to_be_refused():
    assert len(REFUSALS) > 70
    assert {id: judge_refusal(OracleAdapter, refusal) for id, refusal in REFUSALS.items()} == dict.fromkeys(REFUSALS)


class Accepts(OracleAdapter):
    """Takes anything, and does nothing with it."""

    def create(self, algorithm, hyper, parameters):
        values = {name: parameter.value for name, parameter in parameters.items()}
        self.state = State(0, values, {moment: values for moment in MOMENTS[algorithm]})

    def load(self, state):
        pass

    def step(self, gradients):
        pass


def test_an_adapter_that_accepts_fails():
    for refusal in REFUSALS.values():
        assert judge_refusal(Accepts, refusal) == f"{refusal.purpose}: accepted"
    found = results(Accepts, modes=["refuse"])
    assert len(found) == len(REFUSALS)
    assert {result.status for result in found.values()} == {"failed"}
    assert exit_code(found.values()) == EXIT_FAILED


def leaving(method, change):
    """Refuses as the oracle does, and leaves another state behind."""

    class Leaves(OracleAdapter):
        pass

    def call(self, *arguments):
        try:
            getattr(OracleAdapter, method)(self, *arguments)
        except (TypeError, ValueError):
            self.state = change(self.state)
            raise

    setattr(Leaves, method, call)
    return Leaves


def nudged(arrays):
    return {name: np.nextafter(x, x.dtype.type(2)) for name, x in arrays.items()}


CHANGES = {
    "step 1 before, 2 after the refusal": lambda state: replace(state, step=state.step + 1),
    "p of 'w' differs: before and after the refusal": lambda state: replace(
        state, parameters={"w": np.nextafter(state.parameters["w"], np.float32(2))}
    ),
    "m of 'w' differs: before and after the refusal": lambda state: replace(
        state, moments=state.moments | {"m": nudged(state.moments["m"])}
    ),
}


@pytest.mark.parametrize("id", BY_STEP)
@pytest.mark.parametrize("words", CHANGES)
def test_an_adapter_that_refuses_a_step_but_has_taken_part_of_it_fails(id, words):
    assert judge_refusal(leaving("step", CHANGES[words]), REFUSALS[id]) == words


@pytest.mark.parametrize("id", BY_LOAD)
@pytest.mark.parametrize("words", CHANGES)
def test_an_adapter_that_refuses_a_state_but_has_taken_part_of_it_fails(id, words):
    found = judge_refusal(leaving("load", CHANGES[words]), REFUSALS[id])
    assert found == words.replace("step 1 before, 2 after", "step 0 before, 1 after")


def test_an_adapter_that_raises_where_nothing_is_wrong_is_an_error_and_refuses_nothing():
    class Raises(OracleAdapter):
        def step(self, gradients):
            raise ValueError("momentum must be in [0, 1)")

    with pytest.raises(ValueError, match="momentum must be"):
        judge_refusal(Raises, REFUSALS["sgdp/invalid/momentum-one"])
    found = results(Raises, modes=["refuse"])
    assert {result.status for result in found.values()} == {"errored"}
    assert exit_code(found.values()) == EXIT_ADAPTER


PROCESSES = """
import os, signal, sys
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.serve import serve


class Adapter(OracleAdapter):
    def create(self, *arguments):
        try:
            super().create(*arguments)
        except ValueError:
            {instead}


serve(Adapter(), sys.stdin.buffer, sys.stdout.buffer)
"""


@pytest.mark.parametrize(
    ("instead", "code", "words"),
    [
        ("raise", EXIT_CONFORMS, "3/3"),
        ("os._exit(0)", EXIT_ADAPTER, "it closed stdout; it had exited with status 0"),
        ("os.kill(os.getpid(), signal.SIGABRT)", EXIT_ADAPTER, "it had died of SIGABRT"),
        ("raise MemoryError('no room') from None", EXIT_ADAPTER, "it failed: MemoryError: no room"),
        ("print('lr is negative', flush=True); raise", EXIT_ADAPTER, "lr is negative"),
    ],
)
def test_a_process_that_crashes_does_not_refuse(tmp_path, instead, code, words):
    program = tmp_path / "adapter.py"
    program.write_text(PROCESSES.format(instead=instead))
    arguments = ["run", "--adapter", f"exec:{sys.executable} {program}", "-k", "adamp/invalid/lr-", "--jobs", "1"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == code, result.output
    assert words in result.output


# Skipped, and why


class First(OracleAdapter):
    """Knows rows along the first axis only, and says so."""

    def capabilities(self):
        return replace(super().capabilities(), layouts="first")

    def create(self, algorithm, hyper, parameters):
        assert all(parameter.layout in (None, Layout()) for parameter in parameters.values())
        super().create(algorithm, hyper, parameters)


def test_rows_along_other_axes_are_skipped_vector_by_vector():
    found = results(First, text="adamp/shapes", dtypes=["float32"])
    vectors = GROUPS["core/adamp-shapes.float32"].vectors
    assert len(found) == len(vectors)  # what is skipped is counted
    expected = {vector.id: "passed" if vector.layout == Layout() else "skipped" for vector in vectors}
    assert {check.case: result.status for check, result in found.items()} == expected
    assert len(set(expected.values())) == 2
    for result in found.values():
        if result.status == "skipped":
            assert result.message == "oracle knows no rows but those along the first axis"
    assert exit_code(found.values()) == EXIT_CONFORMS


def test_layouts_that_must_be_refused_are_skipped_too():
    found = results(First, text="adamp/invalid/", modes=["refuse"])
    skipped = {check.case for check, result in found.items() if result.status == "skipped"}
    assert skipped == {id for id in REFUSALS if id.startswith("adamp/invalid/layout-")}
    assert {result.status for check, result in found.items() if check.case not in skipped} == {"passed"}


def test_runs_with_other_layouts_are_skipped_too():
    found = results(First, text="adamp/run", dtypes=["float32"])
    assert {result.status for result in found.values()} == {"skipped"}
    assert {check.mode for check in found} == set(SEVERAL_STEPS)


@pytest.mark.parametrize(
    ("fixed", "skipped"),
    [
        ({"nesterov": False}, lambda hyper: hyper.get("nesterov", False)),
        ({"project_momentum": False}, lambda hyper: hyper.get("project_momentum", False)),
        ({"eps": 1e-8}, lambda hyper: hyper["eps"] != 1e-8),
        ({"eps": 1e-8, "nesterov": True}, lambda hyper: hyper["eps"] != 1e-8 or not hyper.get("nesterov", False)),
    ],
)
def test_what_has_no_switch_is_skipped_where_it_stands_elsewhere(fixed, skipped):
    class Fixed(OracleAdapter):
        def capabilities(self):
            return replace(super().capabilities(), fixed=fixed)

        def create(self, algorithm, hyper, parameters):
            assert all(hyper.get(name, value) == value for name, value in fixed.items())
            super().create(algorithm, hyper, parameters)

    found = results(Fixed, modes=["step"], dtypes=["float32"])
    expected = {x.id: skipped(g.hyper) for g in GROUPS.values() if g.dtype == "float32" for x in g.vectors}
    assert {check.case: result.status == "skipped" for check, result in found.items()} == expected
    assert any(expected.values())
    assert {result.status for result in found.values()} == {"passed", "skipped"}
    for result in found.values():
        if result.status == "skipped":
            name = result.message.split(" no switch for ")[1].split(",")[0]
            assert result.message == f"oracle has no switch for {name}, which stands at {fixed[name]}"


def test_the_denominator_holds_what_is_skipped(monkeypatch):
    monkeypatch.setattr(runner.Implementation, "factory", lambda self, device: First)
    vectors = GROUPS["core/adamp-shapes.float32"].vectors
    passed = sum(vector.layout == Layout() for vector in vectors)
    arguments = ["run", "--adapter", "oracle", "-k", "adamp/shapes", "--dtype", "float32", "--jobs", "1"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0
    assert f"{passed}/{len(vectors)}" in result.output


# Groups


class Guilty(OracleAdapter):
    """Raises whenever one tensor takes part."""

    def step(self, gradients):
        if "layer" in gradients:
            raise RuntimeError("no such view")
        super().step(gradients)


class Exits(Guilty):
    def create(self, algorithm, hyper, parameters):
        if "layer" in parameters:
            sys.exit(0)
        super().create(algorithm, hyper, parameters)


@pytest.mark.parametrize(("make", "words"), [(Guilty, "RuntimeError: no such view (in step"), (Exits, "SystemExit: 0")])
@pytest.mark.parametrize("group", ["core/adamp-views.float32", "multistep/sgdp-beginning.float64"])
def test_of_a_group_that_raises_only_the_guilty_vector_is_an_error(make, words, group):
    group = GROUPS[group]
    text = group.vectors[0].id.rpartition("/")[0] + "/"
    found = results(make, text=text, dtypes=[group.dtype], modes=["step"])
    by_case = {check.case: result for check, result in found.items()}
    assert {id: result.status for id, result in by_case.items()} == {
        vector.id: "errored" if vector.name == "layer" else "passed" for vector in group.vectors
    }
    assert words in by_case[f"{text}layer"].message
    assert exit_code(found.values()) == EXIT_ADAPTER


def test_a_failure_and_an_error_in_one_group_are_told_apart():
    class Both(Guilty):
        def step(self, gradients):
            super().step(gradients)
            if "none" in gradients:
                self.state.parameters["none"][0, 0] += 1

    found = results(Both, text="sgdp/views/", dtypes=["float32"])
    status = {check.case.rpartition("/")[2]: result.status for check, result in found.items()}
    assert Counter(status.values()) == {"passed": 12, "failed": 1, "errored": 1}
    assert (status["layer"], status["none"]) == ("errored", "failed")
    assert exit_code(found.values()) == EXIT_FAILED


ENDS = """
import os
from adamp_conformance.adapters.oracle import OracleAdapter


class Adapter(OracleAdapter):
    def step(self, gradients):
        os._exit(0)
"""


def test_an_adapter_that_ends_its_process_takes_nothing_with_it(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", ProcessPoolExecutor)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "ending.py").write_text(ENDS)
    arguments = ["run", "--adapter", "ending:Adapter", "-k", "adamp/zeros", "--dtype", "float32", "--jobs", "1"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == EXIT_ADAPTER, result.output
    assert "0/5" in result.output
    assert "errored adamp/zeros/zero-gradient ending:Adapter float32" in result.output


def test_single_checks_run_their_group_once():
    created = []

    class Counts(OracleAdapter):
        def create(self, algorithm, hyper, parameters):
            created.append(sorted(parameters))
            super().create(algorithm, hyper, parameters)

    implementations = resolve(Counts)
    checks = select_checks(implementations, text="adamp/zeros", dtypes=["float32"])
    one = Runner()
    single = {check: one.result(check) for check in [*checks, *checks]}
    assert created == [sorted(vector.name for vector in GROUPS["edge/adamp-zeros.float32"].vectors)]
    together = results(Counts, text="adamp/zeros", dtypes=["float32"])
    assert {check.case: (x.status, x.margin) for check, x in single.items()} == {
        check.case: (x.status, x.margin) for check, x in together.items()
    }
    (other,) = select_checks(implementations, text="adamp/zeros/zero-row", dtypes=["float64"])
    assert one.result(other).status == "passed"
    assert len(created) == 3


def test_single_checks_find_what_a_run_finds():
    implementations = resolve(Guilty)
    one = Runner()
    checks = select_checks(implementations, text="sgdp/beginning/", dtypes=["float32"])
    found = {check.case.rpartition("/")[2]: one.result(check).status for check in checks}
    assert found == {"channel": "passed", "layer": "errored", "none": "passed", "vector": "passed"}


# Exchanges with other implementations


@pytest.mark.parametrize("mode", WITH_OTHERS)
def test_states_come_from_ours_and_never_from_somebody_elses_or_oneself(monkeypatch, tmp_path, mode):
    sources = {}

    def record(bench):
        sources.setdefault(bench.adapter.capabilities().name, []).append(set(bench.sources))
        return Outcome(None, None)

    class Foreign(First):
        def capabilities(self):
            return replace(super().capabilities(), name="foreign")

    monkeypatch.setitem(RUNS, mode, record)
    write_answers(tmp_path / "answers", chosen=[ZEROS])
    chosen = [
        *resolve(Foreign),
        *select(["torch-eager", "adamp", "pytorch-optimizer"]),
        recorded_by(tmp_path / "answers"),
    ]
    checks = select_checks(chosen, [mode], ["float32"], "adamp/digits")
    found = [pair for done in runner.run(checks, "cpu", jobs=1) for pair in done.results]
    assert {(check.implementation.recorded, result.status) for check, result in found} == {
        (False, "passed"),
        (True, "skipped"),
    }
    both = {"torch-eager", "oracle-numpy"}
    assert sources == {
        "torch": [{"oracle-numpy"}],
        "foreign": [both],
        "adamp": [both],
        "pytorch-optimizer": [both, both],
    }


@pytest.mark.parametrize("mode", WITH_OTHERS)
def test_alone_there_is_nobody_to_exchange_a_state_with(mode):
    checks = select_checks(select(["oracle"]), [mode], ["float32"], "adamp/digits")
    ((_, result),) = [pair for done in runner.run(checks, "cpu", jobs=1) for pair in done.results]
    assert (result.status, result.message) == ("skipped", "there is no other implementation to exchange a state with")


def test_the_frameworks_relay_in_every_order():
    checks = select_checks(select(["torch-eager", "keras-eager", "optax-eager"]), ["relay"])
    found = {check: result for done in runner.run(checks, "cpu", jobs=1) for check, result in done.results}
    assert {(x.implementation.backend, x.case) for x in found} == {
        (backend, case) for backend in ("torch", "keras", "optax") for case in ("adamp/digits", "sgdp/digits")
    }
    for result in found.values():
        assert (result.status, result.message) == ("passed", "")
        assert 0 < result.margin < 1


def test_a_step_of_another_that_fails_in_a_relay_fails_the_relay_and_has_no_place_here():
    """Its parameters have other names here."""

    class Leaps(OracleAdapter):
        def capabilities(self):
            return replace(super().capabilities(), weights="keras")

        def step(self, gradients):
            super().step(gradients)
            self.state.parameters["dense/bias"][0] += 1

    ours = [Implementation(name, "", make, arguments=False, ours=True) for name, make in (("a", First), ("b", Leaps))]
    checks = select_checks(ours[:1], ["relay"], text="adamp/digits")
    ((_, result),) = runner._run_task(checks, ours, "cpu").results
    assert (result.status, result.margin, result.element) == ("failed", None, None)
    assert result.message.startswith("adopted from a by b: p of ")


# Answers that were recorded elsewhere


def write_answers(path, make=OracleAdapter, chosen=GROUPS):
    """What an implementation in another place would write."""
    capabilities = make().capabilities()
    with path.open("wb") as file:
        file.write(protocol.write_line("capabilities", protocol.capabilities_message(capabilities)))
        for id in chosen:
            group = GROUPS[id]
            if capabilities.layouts == "first":
                group = group.only([vector.id for vector in group.vectors if vector.layout == Layout()])
            if not group.vectors:
                continue
            problem = Problem(group, group.dtype, "torch")
            adapter = create(make, problem)
            if group.steps == 1:
                adapter.load(problem.initial())
            states = []
            for index in range(group.steps):
                adapter.step(group.gradients(index, {}, "torch"))
                states.append(protocol.state_message(adapter.dump()))
            file.write(protocol.write_line("answers", {"group": id, "states": states}))


def run(path, *arguments):
    command = ["run", "--results", str(path), "--jobs", "1", "--json", f"{path}.json", *arguments]
    result = CliRunner().invoke(cli.main, command)
    lines = [json.loads(line) for line in Path(f"{path}.json").read_text().splitlines()]
    return result, [line for line in lines if line["kind"] == "result"]


def test_answers_of_the_oracle_pass_and_what_they_cannot_show_is_skipped(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path)
    result, found = run(path)
    assert result.exit_code == EXIT_CONFORMS, result.output
    modes = {}
    for line in found:
        modes.setdefault(line["mode"], set()).add((line["status"], line["message"]))
    assert modes.pop("step") == {("passed", "")}
    assert set(modes) == {"refuse", *RUNS}
    for reasons in modes.values():
        assert reasons == {("skipped", "a results file holds answers to vectors only")}
    assert len(found) == sum(len(x.problems) * len(x.modes) for x in catalogue().values())
    assert f"{sum(len(group.vectors) for group in GROUPS.values())}/{len(found)}" in result.output


def test_answers_of_rows_along_the_first_axis_pass_too(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, First)
    result, found = run(path, "--mode", "step")
    assert result.exit_code == EXIT_CONFORMS, result.output
    expected = {x.id: x.layout == Layout() for group in GROUPS.values() for x in group.vectors}
    assert {line["case"]: line["status"] == "passed" for line in found} == expected


ZEROS = "edge/adamp-zeros.float32"


def edited(path, group, change):
    """Changes the states of one group; None removes the line."""
    kept = []
    for line in path.read_text().splitlines():
        message = json.loads(line)
        if message.get("group") == group:
            message = change(message)
        if message is not None:
            kept.append(json.dumps(message))
    path.write_text("\n".join(kept) + "\n")


def with_data(message, index, name, tensor, change):
    data = message["states"][index]["parameters"][name][tensor]
    data["data"] = change(data["data"])
    return message


def other_digit(place):
    return lambda data: data[:place] + ("1" if data[place] != "1" else "2") + data[place + 1 :]


@pytest.mark.parametrize(
    ("group", "index", "name", "tensor"),
    [
        (ZEROS, 0, "zero-row", "p"),
        (ZEROS, 0, "zero-gradient", "v"),
        ("core/sgdp-views.bfloat16", 0, "layer", "m"),
        ("core/adamp-views.float64", 0, "vector", "p"),
        ("large/sgdp-long-rows.float32", 0, "row-2048", "p"),
        ("multistep/adamp-beginning.float32", 0, "channel", "m"),
        ("multistep/adamp-beginning.float32", 3, "channel", "v"),
        ("ambiguous/adamp-undecided.float32", 0, "one-slice", "p"),
    ],
)
def test_one_altered_digit_fails_and_names_the_vector(tmp_path, group, index, name, tensor):
    path = tmp_path / "answers.jsonl"
    write_answers(path, chosen=[group])
    place = GROUPS[group].vectors[0].before["p"].itemsize * 2 * 3 + 2  # the third digit of the fourth element
    edited(path, group, lambda message: with_data(message, index, name, tensor, other_digit(place)))
    prefix = GROUPS[group].vectors[0].id.rpartition("/")[0] + "/"
    result, found = run(path, "-k", prefix, "--dtype", GROUPS[group].dtype, "--mode", "step")
    assert result.exit_code == EXIT_FAILED, result.output
    assert {line["case"]: line["status"] for line in found} == {
        vector.id: "failed" if vector.name == name else "passed" for vector in GROUPS[group].vectors
    }
    assert f"failed {prefix}{name} {path}" in result.output


def test_a_group_that_is_missing_is_an_error_of_its_vectors(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, chosen=["edge/adamp-zeros.float64", ZEROS, "edge/adamp-zeros.float16"])
    edited(path, ZEROS, lambda message: None)
    result, found = run(path, "-k", "adamp/zeros", "--dtype", "float64", "--dtype", "float32")
    assert result.exit_code == EXIT_ADAPTER
    assert Counter((line["dtype"], line["status"]) for line in found) == {
        ("float64", "passed"): 5,
        ("float32", "errored"): 5,
    }
    assert f"{path} has no answer to {ZEROS}" in found[-1]["message"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:-40], "is not a line of JSON"),
        (lambda text: text + text.splitlines()[-1] + "\n", "stands twice"),
        (lambda text: text.replace("edge/adamp-zeros", "edge/adamp-ones"), "the corpus has no group"),
        (lambda text: text.split("\n", 1)[1], "not a message `capabilities`"),
        (lambda text: "", "is empty"),
    ],
)
def test_a_damaged_file_of_answers_shows_nothing(tmp_path, damage, words):
    path = tmp_path / "answers.jsonl"
    write_answers(path, chosen=["edge/adamp-zeros.float64", ZEROS])
    path.write_text(damage(path.read_text()))
    result, found = run(path, "-k", "adamp/zeros", "--dtype", "float64", "--dtype", "float32")
    assert result.exit_code == EXIT_ADAPTER
    assert {line["status"] for line in found} == {"errored"}
    assert len(found) == 10
    assert words in found[0]["message"]


def test_a_branch_that_was_not_taken_fails_in_a_file_too(tmp_path):
    path = tmp_path / "answers.jsonl"
    group = "core/adamp-views.float32"
    write_answers(path, chosen=[group])

    def lie(message):
        message["states"][0]["parameters"]["layer"]["branch"] = ["channel"]
        return message

    edited(path, group, lie)
    result, found = run(path, "-k", "adamp/views", "--dtype", "float32")
    assert result.exit_code == EXIT_FAILED
    assert [line["case"] for line in found if line["status"] == "failed"] == ["adamp/views/layer"]


def test_answers_and_adapters_stand_beside_each_other(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, chosen=[ZEROS])
    result, found = run(path, "--adapter", "oracle", "-k", "adamp/zeros", "--dtype", "float32")
    assert result.exit_code == EXIT_CONFORMS
    assert Counter(line["implementation"] for line in found) == {"oracle-numpy": 5, str(path): 5}


@pytest.mark.parametrize("name", ["torch-sharded", "optax-sharded", "keras-jax", "keras-torch"])
def test_a_row_that_would_run_on_the_cpu_in_silence_says_so(name):
    (implementation,) = select([name])
    with pytest.raises(RuntimeError, match=f"{name} runs on the CPU only, got the device 'cuda'"):
        implementation.factory("cuda")()
