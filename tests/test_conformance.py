"""The harness: its verdicts on implementations that are wrong in each way it claims to notice; command and files."""

import json
import os
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from adamp_conformance import cli, implementations, runner
from adamp_conformance.adapter import DTYPES, State
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.adapters.torch import TorchAdapter
from adamp_conformance.cases import DESIGNED
from adamp_conformance.digits import BATCH, DIGITS, DigitsCase, data, initial_weights, loss, to_keras, to_torch
from adamp_conformance.implementations import ORACLE, Implementation
from adamp_conformance.judge import ALGORITHMS, expected_outcomes, judge_step
from adamp_conformance.modes import RELAY_STEPS, RUNS, Bench, Problem, create, judge_vectors
from adamp_conformance.results import Result, Run, exit_code, write
from adamp_conformance.spec_files import spec_file
from adamp_conformance.vectors import load
from adamp_spec import Branch, Layout

BY_ID = {case.id: case for case in (*DESIGNED, *DIGITS)}
GROUPS = {group.id: group for group in load().groups}


def bench(make=OracleAdapter, case="adamp/run", dtype="float32", sources=None):
    problem = Problem(BY_ID[case], dtype, "torch")
    return Bench(create(make, problem), problem, make, sources or {})


def run(*arguments):
    return CliRunner().invoke(cli.main, ["run", "--jobs", "1", *arguments])


# Verdicts


@pytest.mark.parametrize("case", DESIGNED, ids=lambda case: case.id)
def test_designed_cases_are_decisive_and_bounded(case):
    """One legal outcome for every slice, but for the tensors that are meant to be undecided."""
    for dtype in case.dtypes:
        problem = Problem(case, dtype, "torch")
        before = problem.initial()
        for name, gradient in problem.gradients(before).items():
            arguments = case.hyper, case.layouts("torch")[name], before.tensors(name), before.step, gradient
            outcomes = expected_outcomes(case.algorithm, *arguments, name in case.exact)
            legal = np.sum([outcome.legal for outcome in outcomes], axis=0)
            assert bool(np.any(legal > 1)) is case.tensors[name].undecided, (name, dtype)
            assert np.all(legal >= 1)


def vectors(make, group, dtype="float32"):
    """What the vectors of a group find, by the last part of their ids."""
    problem = Problem(GROUPS[f"{group}.{dtype}"], dtype, "torch")
    return {id.rpartition("/")[2]: x for id, x in judge_vectors(create(make, problem), problem).items()}


def test_the_tensors_take_the_branches_that_they_are_named_for():
    for group in ("core/adamp-views", "core/sgdp-views"):
        found = vectors(OracleAdapter, group)
        branches = {name: int(x.worst.verdict.branches[name].max()) for name, x in found.items()}
        assert [branches[name] for name in ("channel", "layer", "none", "vector")] == [
            Branch.CHANNEL,
            Branch.LAYER,
            Branch.NONE,
            Branch.NONE,
        ]


@pytest.mark.parametrize("mode", ["shadow", "resume", "purity"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oracle_conforms(mode, dtype):
    assert RUNS[mode](bench(dtype=dtype)).problem is None


def test_a_state_goes_from_one_implementation_to_another():
    outcome = RUNS["transplant"](bench(sources={"oracle": OracleAdapter}))
    assert outcome.problem is None
    assert RUNS["transplant"](bench()).problem == "no source of a state in float32"


class Nudged(OracleAdapter):
    """Adds one bit too much to one element."""

    def dump(self):
        state = super().dump()
        parameters = {name: x.copy() for name, x in state.parameters.items()}
        if state.step:
            x = parameters["dense"]
            for _ in range(8):
                x[3, 5] = np.nextafter(x[3, 5], x.dtype.type(np.inf))
        return replace(state, parameters=parameters)


class LiesAboutBranch(OracleAdapter):
    def dump(self):
        state = super().dump()
        lies = {name: (branch + 1) % 3 for name, branch in (state.branches or {}).items()}
        return replace(state, branches=lies or None)


# With project_momentum the two outcomes at the threshold differ in the moment as well.
PROJECTED_THRESHOLD = BY_ID["sgdp/undecided"]


class MixesOutcomes(OracleAdapter):
    """Moments of one outcome, parameters of another, where the test may go either way."""

    def dump(self):
        state = super().dump()
        if state.branches is None:
            return state
        problem = Problem(PROJECTED_THRESHOLD, "float32", "torch")
        before = problem.initial()
        gradient = problem.gradients(before)["channel"]
        layout, hyper = problem.layouts()["channel"], problem.case.hyper
        outcomes = expected_outcomes("sgdp", hyper, layout, before.tensors("channel"), before.step, gradient)
        assert len(outcomes) == 2
        p, m = (outcomes[i].tensors[name].value.astype(np.float32) for i, name in ((0, "p"), (1, "m")))
        return State(
            state.step,
            state.parameters | {"channel": p},
            {"m": state.moments["m"] | {"channel": m}},
        )


class ForgetsStep(OracleAdapter):
    def dump(self):
        return replace(super().dump(), step=0)


class ChangesDtype(OracleAdapter):
    def dump(self):
        state = super().dump()
        wide = {name: x.astype(np.float64) for name, x in state.parameters.items()}
        return replace(state, parameters=wide) if state.step else state


class WritesToGradient(OracleAdapter):
    def step(self, gradients):
        super().step(gradients)
        for gradient in gradients.values():
            gradient *= 2


class Impure(OracleAdapter):
    calls = 0

    def step(self, gradients):
        super().step(gradients)
        type(self).calls += 1
        self.state.parameters["dense"][0, 0] += np.float32(self.calls * 1e-6)


class KeepsSomethingBack(OracleAdapter):
    """A state beside the state: a momentum that is not dumped."""

    def create(self, *arguments):
        super().create(*arguments)
        self.hidden = 0.0

    def step(self, gradients):
        super().step(gradients)
        self.hidden += 1e-3
        self.state.parameters["dense"][0, 0] += np.float32(self.hidden)


class RoundsOnLoading(OracleAdapter):
    def load(self, state):
        halved = {name: x.astype(np.float16).astype(x.dtype) for name, x in state.parameters.items()}
        super().load(replace(state, parameters=halved))


class ClipsStep(OracleAdapter):
    def load(self, state):
        super().load(replace(state, step=min(state.step, 24)))


class ExitsQuietly(OracleAdapter):
    def step(self, gradients):
        raise SystemExit(0)


class Nan(OracleAdapter):
    def step(self, gradients):
        super().step(gradients)
        self.state.parameters["bias"][0] = np.nan


@pytest.mark.parametrize(
    ("make", "mode", "words"),
    [
        (Nudged, "shadow", r"p of 'dense'\[3, 5\] is off by"),
        (LiesAboutBranch, "shadow", "off by inf"),
        (Nan, "shadow", r"p of 'bias'\[0\] is off by inf"),
        (ForgetsStep, "shadow", "step count went from 0 to 0"),
        (ChangesDtype, "shadow", r"went from float32.* to float64"),
        (WritesToGradient, "purity", "wrote to the gradient of 'kernel'"),
        (Impure, "purity", "p of 'dense' differs: the first time and the second time"),
        (RoundsOnLoading, "purity", "differs: loaded and held after loading"),
        (KeepsSomethingBack, "resume", "p of 'dense' differs: going on and resumed"),
        (RoundsOnLoading, "transplant", "handed over by oracle"),
    ],
)
def test_a_wrong_implementation_fails(make, mode, words):
    outcome = RUNS[mode](bench(make, sources={"oracle": OracleAdapter}))
    assert outcome.problem is not None
    assert re.search(words, outcome.problem), outcome.problem


def test_a_state_that_was_not_taken_fails():
    found = vectors(ClipsStep, "core/adamp-millionth-step")
    assert {x.problem for x in found.values()} == {"step 999999 injected, 24 held"}


def test_a_torch_step_that_writes_to_its_gradient_is_seen():
    class Writes(TorchAdapter):
        def step(self, gradients):
            super().step(gradients)
            for parameter in self.parameters.values():
                parameter.grad.mul_(2)

    for dtype in DTYPES:
        assert "wrote to the gradient" in RUNS["purity"](bench(Writes, dtype=dtype)).problem
        assert RUNS["purity"](bench(TorchAdapter, dtype=dtype)).problem is None


def test_a_mix_of_two_legal_outcomes_is_not_legal():
    case = PROJECTED_THRESHOLD
    problem = Problem(case, "float32", "torch")
    before, gradients = problem.initial(), problem.gradients(problem.initial())
    adapter = create(MixesOutcomes, problem)
    adapter.load(before)
    adapter.step(gradients)
    whole, mixed = OracleAdapter.dump(adapter), adapter.dump()
    assert judge_step("sgdp", case.hyper, problem.layouts(), before, gradients, whole, case.exact).conforms
    verdict = judge_step("sgdp", case.hyper, problem.layouts(), before, gradients, mixed, case.exact)
    assert not verdict.conforms
    assert verdict.place.parameter == "channel"


def test_either_whole_outcome_is_legal_near_the_threshold():
    problem = Problem(BY_ID["adamp/undecided"], "float32", "torch")
    case, before = problem.case, problem.initial()
    gradients = problem.gradients(before)
    make_hyper, make_state, take_step = ALGORITHMS["adamp"]
    for branch in (Branch.CHANNEL, Branch.NONE):
        adapter = create(OracleAdapter, problem)
        adapter.load(before)
        adapter.step(gradients)
        after = replace(adapter.dump(), branches=None)
        old = before.tensors("channel")
        new, _, _ = take_step(
            old["p"],
            gradients["channel"],
            make_state(before.step, old["m"], old["v"]),
            make_hyper(**case.hyper),
            problem.layouts()["channel"],
            choose=lambda channel, layer, branch=branch: np.full((1, 1), branch),
        )
        after.parameters["channel"] = new
        verdict = judge_step("adamp", case.hyper, problem.layouts(), before, gradients, after, case.exact)
        assert verdict.conforms
        assert verdict.ambiguous
        assert verdict.branches["channel"] == branch


# Relays: one begins, the others go on in turn, and it ends.


class KerasForm(OracleAdapter):
    """The oracle on weights whose rows are the last axis, unless it is told otherwise."""

    def capabilities(self):
        return replace(super().capabilities(), weights="keras")

    def create(self, algorithm, hyper, parameters):
        last = {name: x._replace(layout=x.layout or Layout(-1)) for name, x in parameters.items()}
        super().create(algorithm, hyper, last)


def relay(make=OracleAdapter, case="adamp/digits", **sources):
    return RUNS["relay"](bench(make, case, sources=sources)._replace(name="a"))


def recording(name, log, make=OracleAdapter):
    """Writes down who takes a step, and after how many."""

    class Records(make):
        def step(self, gradients):
            log.append((name, self.state.step))
            super().step(gradients)

    return Records


@pytest.mark.parametrize("case", ["adamp/digits", "sgdp/digits", "adamp/run"])
def test_a_relay_takes_every_order_of_the_others(case):
    log = []
    outcome = relay(recording("a", log), case, b=recording("b", log, KerasForm), c=recording("c", log))
    assert outcome.problem is None
    assert 0 < outcome.worst.verdict.margin <= 1
    assert [name for name, _ in log] == [name for name in "abcacba" for _ in range(RELAY_STEPS)]
    counts = list(range(4 * RELAY_STEPS))
    assert [step for _, step in log] == counts + counts[RELAY_STEPS:]


def test_the_margin_of_a_relay_is_of_ones_own_steps():
    mine = relay(b=KerasForm).worst
    assert set(mine.gradients) == set(initial_weights("torch"))
    assert mine.after.step in {*range(1, RELAY_STEPS + 1), *range(2 * RELAY_STEPS + 1, 3 * RELAY_STEPS + 1)}


def test_the_oracle_runs_a_leg_only_where_there_is_nobody_else():
    log = []
    oracle = {ORACLE.name: recording("oracle", log)}
    assert relay(recording("a", log), **oracle, b=recording("b", log)).problem is None
    assert {name for name, _ in log} == {"a", "b"}
    assert relay(recording("a", log), **oracle).problem is None
    assert {name for name, _ in log} == {"a", "b", "oracle"}
    assert relay().problem == "nobody to hand over to in float32"


def test_a_relay_does_without_those_that_lack_the_type():
    assert relay(b=HalfOnly).problem == "nobody to hand over to in float32"
    assert relay(b=HalfOnly, c=OracleAdapter).problem is None


def loading(change):
    """An adapter that changes what it is to load."""

    class Changes(KerasForm):
        def load(self, state):
            super().load(change(state))

    return Changes


def loses_second_moment(state):
    return replace(state, moments=state.moments | {"v": {n: np.zeros_like(x) for n, x in state.moments["v"].items()}})


def counts_one_more(state):
    return replace(state, step=state.step + bool(state.step))


def swaps(arrays):
    """The two of one shape, scale and shift of a normalisation."""
    one, other = list(arrays)[1:3]
    return arrays | {one: arrays[other], other: arrays[one]}


def swaps_parameters(state):
    return replace(state, parameters=swaps(state.parameters)) if state.step else state


def swaps_moments(state):
    return replace(state, moments={moment: swaps(arrays) for moment, arrays in state.moments.items()})


class Conceals(KerasForm):
    """Shows what it has loaded, and starts its next step from something else."""

    loaded = False

    def load(self, state):
        super().load(state)
        self.loaded = state.step > 0

    def step(self, gradients):
        count = self.state.step
        if self.loaded:
            self.state = self.instead(self.state)
            self.loaded = False
        super().step(gradients)
        self.state = replace(self.state, step=count + 1)


class ConcealsLoss(Conceals):
    instead = staticmethod(loses_second_moment)


class ConcealsCount(Conceals):
    instead = staticmethod(lambda state: replace(state, step=0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (loading(loses_second_moment), "v of 'CONV' differs: handed over by GIVER and held by TAKER"),
        (loading(counts_one_more), "step 3 handed over by GIVER, 4 held by TAKER"),
        (loading(swaps_parameters), "p of 'SCALE' differs: handed over by GIVER and held by TAKER"),
        (loading(swaps_moments), "m of 'SCALE' differs: handed over by GIVER and held by TAKER"),
        (ConcealsLoss, r"adopted from GIVER by TAKER: p of '.*'\[.*\] is off by .* times the bound at step STEP"),
        (ConcealsCount, r"adopted from GIVER by TAKER: p of '.*'\[.*\] is off by .* times the bound at step STEP"),
    ],
)
def test_a_relay_names_the_leg_that_fails(make, words):
    """Whoever it is that does not take over as it should: one of the others, or the one that begins and ends."""
    other = {"CONV": "conv2d/kernel", "SCALE": "batch_normalization/gamma", "GIVER": "a", "TAKER": "b"}
    first = {"CONV": "conv1.weight", "SCALE": "bn1.weight", "GIVER": "b", "TAKER": "a"}

    class TorchForm(make):
        def capabilities(self):
            return OracleAdapter().capabilities()

        create = OracleAdapter.create

    for problem, names, step in (
        (relay(b=make).problem, other, RELAY_STEPS + 1),
        (relay(TorchForm, b=KerasForm).problem, first, 2 * RELAY_STEPS + 1),
    ):
        expected = words.replace("STEP", str(step))
        for name, value in names.items():
            expected = expected.replace(name, value)
        assert re.fullmatch(expected, problem), problem


def test_a_relay_sees_what_is_lost_on_the_way_there_and_back(monkeypatch):
    carry = DigitsCase.carry

    def rounded(self, state, source, target):
        values = {name: x.astype(np.float16).astype(x.dtype) for name, x in state.parameters.items()}
        return carry(self, replace(state, parameters=values), source, target)

    monkeypatch.setattr(DigitsCase, "carry", rounded)
    words = "p of 'conv1.weight' differs: held by a and held after the way to b and back"
    assert relay(b=KerasForm).problem == words


# Digits


def test_the_network_is_the_one_that_torch_differentiates():
    case = DIGITS[0]
    state = case.initial("float32", "torch")
    ours = case.gradients(0, state.parameters, "torch")
    images, labels = data()
    chosen = np.arange(BATCH) * 7 % len(images)
    w = {name: torch.tensor(x.astype(np.float64), requires_grad=True) for name, x in state.parameters.items()}
    x = torch.tensor(images[chosen])[:, None]
    for i, pool in ((1, 2), (2, 4)):
        x = functional.conv2d(x, w[f"conv{i}.weight"], padding=1)
        x = functional.batch_norm(x, None, None, w[f"bn{i}.weight"], w[f"bn{i}.bias"], training=True)
        x = functional.avg_pool2d(x.relu(), pool)
    value = functional.cross_entropy(x.flatten(1) @ w["fc.weight"].T + w["fc.bias"], torch.tensor(labels[chosen]))
    value.backward()
    assert loss([x.detach().numpy() for x in w.values()], images[chosen], np.eye(10)[labels[chosen]]) == pytest.approx(
        value.item()
    )
    for name, parameter in w.items():
        np.testing.assert_allclose(ours[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_the_forms_of_weights_convert_both_ways():
    torch_form, keras_form = (list(initial_weights(form).values()) for form in ("torch", "keras"))
    for ours, theirs in zip(torch_form, keras_form, strict=True):
        np.testing.assert_array_equal(to_torch(theirs), ours)
        np.testing.assert_array_equal(to_keras(ours), theirs)


# The command


def test_conforming_exits_0_and_writes_what_the_schema_says(tmp_path):
    path = tmp_path / "results.jsonl"
    result = run("--adapter", "oracle", "-k", "adamp/zeros", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "20/20" in result.output
    schema = json.loads(spec_file("schema/result.schema.json").read_text())
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        jsonschema.validate(record, schema)
    assert [record["kind"] for record in records] == ["header", *["result"] * 20, "footer"]
    assert records[-1]["passed"] == 20


def test_the_schema_refuses_what_is_not_a_result(tmp_path):
    good = Result("oracle-numpy", "adamp/views", "adamp", "float32", "step", "passed", 0.5, False, "", 0.1)
    write(tmp_path / "good", Run.here([good], "cpu", {}, []))
    for bad in ({"status": "fine"}, {"margin": -1.0}, {"dtype": "int8"}, {"case": "views"}):
        with pytest.raises(jsonschema.ValidationError):
            write(tmp_path / "bad", Run.here([replace(good, **bad)], "cpu", {}, []))
    assert not (tmp_path / "bad").exists()


def test_nothing_selected_exits_3():
    result = run("--adapter", "oracle", "-k", "no such case")
    assert result.exit_code == 3
    assert "nothing to check" in result.output


def test_unknown_names_are_usage_errors():
    for arguments in (["--adapter", "tensorflow"], ["--mode", "fast"], ["--dtype", "float8"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Invalid value" in result.output


def test_a_missing_backend_is_named_with_its_remedy(monkeypatch):
    real = implementations.find_spec
    monkeypatch.setattr(implementations, "find_spec", lambda name: None if name in {"jax", "optax"} else real(name))
    result = run("--adapter", "optax", "-k", "adamp/zeros")
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "optax: jax, optax not installed" in text
    assert 'pip install "adamp-parity[jax,conformance]"' in text


def with_adapter(monkeypatch, make):
    monkeypatch.setattr(Implementation, "factory", lambda self, device: make)
    runner._factory.cache_clear()


@pytest.fixture(autouse=True)
def fresh_factories():
    yield
    runner._factory.cache_clear()


def test_an_adapter_that_exits_is_an_error(monkeypatch):
    with_adapter(monkeypatch, ExitsQuietly)
    result = run("--adapter", "oracle", "-k", "adamp/zeros")
    assert result.exit_code == 2
    assert "0/20" in result.output


def test_explain_reports_an_adapter_that_raises(monkeypatch):
    with_adapter(monkeypatch, Crashes)
    result = CliRunner().invoke(cli.main, ["explain", "adamp/zeros/zero-row"])
    assert result.exit_code == 2
    assert "out of memory" in result.output


class Crashes(OracleAdapter):
    def step(self, gradients):
        raise RuntimeError("out of memory")


def test_an_adapter_that_raises_exits_2_and_is_never_a_pass(monkeypatch):
    with_adapter(monkeypatch, Crashes)
    result = run("--adapter", "oracle", "-k", "adamp/zeros")
    assert result.exit_code == 2
    assert "errored adamp/zeros/zero-gradient oracle-numpy float64 step: RuntimeError: out of memory" in " ".join(
        result.output.split()
    )
    assert "0/20" in result.output


def test_a_backend_that_cannot_be_loaded_exits_2(monkeypatch):
    def broken(self, device):
        raise ImportError("libcudart.so: no such file")

    monkeypatch.setattr(Implementation, "factory", broken)
    result = run("--adapter", "oracle", "-k", "adamp/zeros")
    assert result.exit_code == 2
    assert "0/20" in result.output
    assert "ImportError: libcudart.so: no such file" in result.output


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_exits_2():
    checks = runner.select_checks(implementations.select(["oracle"]), text="adamp/zeros")
    results = [result for done in runner.run(checks, Deadly(), jobs=2) for _, result in done.results]
    assert len(results) == len(checks)
    assert exit_code(results) == 2


class HalfOnly(OracleAdapter):
    def capabilities(self):
        return replace(super().capabilities(), dtypes=("float16",))


def test_a_skip_stays_in_the_denominator(monkeypatch):
    with_adapter(monkeypatch, HalfOnly)
    result = run("--adapter", "oracle", "-k", "adamp/zeros")
    assert result.exit_code == 0
    assert "5/20" in result.output


def test_only_skips_are_not_conformance():
    skipped = Result("x", "adamp/views", "adamp", "float32", "step", "skipped", None, False, "", 0.0)
    assert exit_code([skipped]) == 3
    assert exit_code([]) == 3


def test_a_failure_names_the_case_and_explains(monkeypatch):
    class Off(OracleAdapter):
        def step(self, gradients):
            super().step(gradients)
            self.state.parameters["zero-row"][1, 2] *= 1.001

    with_adapter(monkeypatch, Off)
    result = run("--adapter", "oracle", "-k", "adamp/zeros", "--dtype", "float32")
    assert result.exit_code == 1
    assert "failed adamp/zeros/zero-row oracle-numpy float32 step: p of 'zero-row'[1, 2]" in result.output
    explained = CliRunner().invoke(cli.main, ["explain", "adamp/zeros/zero-row"])
    assert explained.exit_code == 1
    for words in ("EDGE-1", "p[1, 2] was", "legal", "got", "margin"):
        assert words in explained.output


def test_list_names_every_case():
    output = CliRunner().invoke(cli.main, ["list"]).output
    for case in runner.catalogue():
        assert case in output


def test_explain_refuses_unknown_cases():
    assert CliRunner().invoke(cli.main, ["explain", "adamp/none"]).exit_code == 2
    assert CliRunner().invoke(cli.main, ["explain", "adamp/digits", "--dtype", "float16"]).exit_code == 2
