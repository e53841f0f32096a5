"""A diagnosis names the rules that were followed, and no others."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner

from adamp_conformance import cli, diagnose
from adamp_conformance.adapters.oracle import OracleAdapter
from adamp_conformance.adapters.peers import AdampAdapter
from adamp_conformance.diagnose import ask, choice_points
from adamp_conformance.implementations import Implementation
from adamp_conformance.mutants import mutants, rules
from adamp_conformance.vectors import load

EVERY_DTYPE = ("float64", "float32", "float16", "bfloat16")


def diagnosis(make, algorithm, dtypes=("float32",), names=()):
    """What is found by the groups of some dtypes, all of them or those with some names."""
    groups = [group for group in load().groups if group.algorithm == algorithm and group.dtype in dtypes]
    asked = [group for group in groups if not names or group.id.partition("-")[2].partition(".")[0] in names]
    assert len({group.id.partition(".")[0] for group in asked}) >= len(names)
    return diagnose.diagnose(algorithm, list(ask(make, make().capabilities(), asked)))


def follows(*names):
    """An implementation that follows the oracle but for some changes."""
    return partial(OracleAdapter, rules=rules(*(mutants()[name] for name in names)))


def departures(found):
    """The options that are not ours, and the other wrong optimizers."""
    return {x.option.mutant.id for x in found.findings if x.option.mutant} | {x.id for x in found.others}


# changes, algorithm, what is asked
COMBINATIONS = {
    "denominator-eps/before-correction": ("adamp", ("float32",), ()),
    "cosine-eps/clamp-product coefficients/power-in-working-type": ("adamp", ("float32",), ()),
    "working-type/own-type row-reduction/mean": ("adamp", EVERY_DTYPE, ("views", "shapes", "eps", "zeros")),
    "adamp-nesterov/dozat channel-axis/first": ("adamp", ("float32",), ("views", "shapes", "nesterov", "eps")),
    "sgdp-decay/not-divided dampening/not-on-the-first-step": ("sgdp", ("float32",), ("views", "eps", "first-step")),
    # each alone explains what the other does, but for one vector
    "cosine-eps/add-to-each-norm comparison/inclusive": ("sgdp", ("float32",), ()),
}


@pytest.mark.parametrize("changes", COMBINATIONS)
def test_the_options_that_were_followed_are_named_and_no_others(changes):
    names = changes.split()
    found = diagnosis(follows(*names), *COMBINATIONS[changes])
    assert departures(found) == set(names)
    assert found.unexplained == ()
    assert not found.conforms
    for point, option, telling, explained in found.findings:
        assert explained == telling, point.name
        assert (option.mutant is None) == (option is point.options[0])


def test_a_mistake_that_is_no_option_is_named_as_the_wrong_optimizer_that_it_is():
    found = diagnosis(follows("decay-ratio/ignored"), "adamp", names=("views", "always-project"))
    assert [mutant.id for mutant in found.others] == ["decay-ratio/ignored"]
    assert departures(found) == {"decay-ratio/ignored"}
    assert found.unexplained == ()
    assert 0 < found.conforming < found.answers


def test_a_mistake_that_nobody_has_thought_of_stays_unexplained():
    class Odd(OracleAdapter):
        def step(self, gradients):
            super().step(gradients)
            self.state = replace(
                self.state, moments={m: {k: 1.5 * x for k, x in a.items()} for m, a in self.state.moments.items()}
            )

    found = diagnosis(Odd, "sgdp", names=("views", "zeros"))
    assert departures(found) == set()
    assert len(found.unexplained) == found.answers - found.conforming > 10
    assert not found.conforms


def test_what_raises_is_explained_by_nothing():
    class Raises(OracleAdapter):
        def step(self, gradients):
            raise RuntimeError("out of memory")

    found = diagnosis(Raises, "sgdp", names=("views",))
    assert (found.conforming, len(found.unexplained)) == (0, found.answers)
    assert not found.conforms


@pytest.mark.parametrize("algorithm", ["adamp", "sgdp"])
def test_an_implementation_that_conforms_follows_our_rules(algorithm):
    found = diagnosis(OracleAdapter, algorithm, EVERY_DTYPE)
    assert found.conforms
    assert found.conforming == found.answers > 200
    assert departures(found) == set()
    assert {x.point.name for x in found.findings} == {x.name for x in choice_points() if x.concerns(algorithm)}
    for x in found.findings:
        assert x.explained == x.telling > 0, x.point.name  # and some vector tells


def test_the_authors_package_projects_the_momentum_buffer():
    found = diagnosis(AdampAdapter, "sgdp", EVERY_DTYPE, ("views", "eps", "projected-momentum"))
    followed = {x.point.name: x for x in found.findings}
    assert departures(found) == {"momentum-buffer/projected", "working-type/own-type"}
    buffer = followed["momentum_buffer"]
    assert buffer.option.name == "projected"
    assert buffer.explained == buffer.telling > 0
    assert followed["cosine_eps"].option.name == "clamp_each_norm"


def test_what_is_not_supported_is_not_asked():
    asked = []

    class Narrow(OracleAdapter):
        def capabilities(self):
            return replace(
                super().capabilities(),
                algorithms=("adamp",),
                dtypes=("float64",),
                layouts="first",
                fixed={"nesterov": False},
            )

        def create(self, algorithm, hyper, parameters):
            asked.append((algorithm, hyper["nesterov"], {x.value.dtype.name for x in parameters.values()}))
            assert all(x.layout == x.layout.__class__() for x in parameters.values())
            super().create(algorithm, hyper, parameters)

    answers = list(ask(Narrow, Narrow().capabilities(), load().groups))
    assert len(answers) == len(asked) > 50
    assert all(x == ("adamp", False, {"float64"}) for x in asked)


# The command


@pytest.fixture
def instead(monkeypatch):
    """Another adapter under the name `oracle`, asked fewer vectors."""

    def put(make, *groups):
        monkeypatch.setattr(Implementation, "factory", lambda self, device: make)
        if groups:
            corpus = load()
            few = corpus._replace(groups=tuple(group for group in corpus.groups if group.id in groups))
            monkeypatch.setattr(cli, "load", lambda: few)
        return CliRunner().invoke(cli.main, ["diagnose", "oracle"])

    return put


def test_the_command_says_what_an_implementation_follows(instead):
    groups = [f"core/{name}.float32" for name in ("sgdp-dampening", "sgdp-no-momentum", "sgdp-views", "adamp-views")]
    result = instead(follows("momentum-buffer/projected"), *groups)
    assert result.exit_code == 1
    rows = {row[0]: row[1:] for row in cells(result.output)}
    assert "oracle-numpy, adamp: 14 of 14 one-step vectors conform" in result.output
    ours = "(ours: m' before the projection (the paper's Algorithm 1))"
    assert rows["momentum buffer"] == ["projected", f"the projected direction (project_momentum) {ours}", "5 of 5"]
    assert rows["rank 1"] == ["never", "rank 0 and 1 are never projected", "3 of 3"]
    assert rows["cosine eps"] == ["-", "", "none: cannot be told"]


def test_the_command_does_not_hide_what_only_vectors_for_other_mistakes_tell(instead):
    result = instead(follows("momentum-buffer/projected"), "core/sgdp-dampening.float32")
    assert result.exit_code == 1
    rows = {row[0]: row[1:] for row in cells(result.output)}
    assert rows["momentum buffer"][0] == "projected"
    assert rows["momentum buffer"][2] == "vectors for other mistakes"


def cells(output):
    """The rows of all tables."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def test_the_command_names_a_wrong_optimizer_with_its_clause(instead):
    result = instead(follows("decay-ratio/ignored"), "core/adamp-always-project.float32")
    assert result.exit_code == 1
    text = " ".join(result.output.split())
    assert (
        "it behaves like the wrong optimizer decay-ratio/ignored, which violates PROJ-7: The decay multiplier" in text
    )


def test_the_command_exits_0_for_one_that_conforms(instead):
    result = instead(OracleAdapter, "core/sgdp-views.float64", "core/adamp-views.float32")
    assert result.exit_code == 0, result.output
    assert "14 of 14" in result.output


def test_the_command_exits_2_where_the_adapter_fails(instead):
    class Broken(OracleAdapter):
        def capabilities(self):
            raise RuntimeError("no device")

    result = instead(Broken)
    assert result.exit_code == 2
    assert "RuntimeError: no device" in result.output


@pytest.mark.parametrize("dtypes", [(), ("float16",), ("float16", "bfloat16")])
def test_the_command_exits_3_where_nothing_can_be_told(instead, dtypes):
    """An implementation without answers in float64 or float32 has not been found to follow any rule."""

    class Half(OracleAdapter):
        def capabilities(self):
            return replace(super().capabilities(), dtypes=dtypes)

        def step(self, gradients):
            super().step(gradients)
            self.state = replace(self.state, parameters={k: np.zeros_like(x) for k, x in self.state.parameters.items()})

    result = instead(Half)
    assert result.exit_code == 3
    assert "nothing to check" in result.output
