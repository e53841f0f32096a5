"""Wrong optimizers: each can be made and is killed, docs/mutants.md says so, and what is not wrong survives."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import adamp_spec
from adamp_conformance import cli
from adamp_conformance.judge import ALGORITHMS
from adamp_conformance.mutants import ENOUGH, MODULES, Kills, Mutant, hunt, mutants, random_test_fails, rules
from adamp_conformance.publish import mutation
from adamp_conformance.spec_files import clauses, spec_file
from adamp_conformance.vectors import NOTES, load, vectors_root

ROOT = Path(__file__).parent.parent
TABLE = tomllib.loads(spec_file("mutants.toml").read_text())
VARIANTS = tomllib.loads(spec_file("variants.toml").read_text())

# Equal in meaning to what stands there.
HARMLESS = Mutant(
    "rounding", "harmless", "STATE-1", "oracle", (("t = state.step + 1", "t = 1 + state.step"),), ("adamp",)
)


@pytest.fixture(scope="session")
def hunted():
    """What became of every mutant."""
    return [kills for mutant in mutants().values() for kills in hunt(mutant)]


# The table


def test_names_are_unique():
    """A mutant of a name that another has would not be put to any vector."""
    assert len(mutants()) == sum(len(entry["mutants"]) for entry in TABLE.values())
    for flag, entry in TABLE.items():
        names = [mutant["name"] for mutant in entry["mutants"]]
        assert len(set(names)) == len(names), flag


@pytest.mark.parametrize("flag", TABLE)
def test_a_flag_is_what_the_head_of_the_file_says(flag):
    entry = TABLE[flag]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", flag)
    assert set(entry) == {"kind", "effect", "links", "mutants"}
    assert re.fullmatch(r"[a-z]+( [a-z]+)*", entry["kind"])
    assert entry["effect"].endswith(".")
    assert all(link.startswith("https://") for link in entry["links"])
    assert entry["mutants"]
    for mutant in entry["mutants"]:
        assert {"name", "clause", "replace"} <= set(mutant) <= {"name", "clause", "replace", "algorithms", "module"}
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", mutant["name"])
        assert mutant["clause"] in clauses()
        assert mutant.get("module", "oracle") in MODULES
        assert set(mutant.get("algorithms", ALGORITHMS)) <= set(ALGORITHMS)
        pairs = list(zip(mutant["replace"][::2], mutant["replace"][1::2], strict=True))
        assert pairs
        assert all(old != new for old, new in pairs)


def test_the_notes_beside_the_vectors_are_the_table():
    notes = json.loads((vectors_root() / NOTES).read_text())
    assert notes == {flag: {key: x for key, x in entry.items() if key != "mutants"} for flag, entry in TABLE.items()}


# Making them


def test_every_mutant_can_be_made():
    for mutant in mutants().values():
        changed = rules(mutant)
        assert changed.Layout is not adamp_spec.Layout
        assert {algorithm for algorithm in ALGORITHMS if callable(getattr(changed, f"{algorithm}_step"))} == set(
            ALGORITHMS
        )


def test_what_the_oracle_no_longer_says_cannot_be_exchanged():
    stale = replace(HARMLESS, replacements=(("t = state.step + 2", "t = 1"),))
    with pytest.raises(
        ValueError, match=r"mutant rounding/harmless: 't = state.step \+ 2' does not occur in adamp_spec/or"
    ):
        rules(stale)


def test_two_changes_of_one_line_exclude_each_other():
    first, second = (mutants()[f"row-reduction/{name}"] for name in ("mean", "each-row-alone"))
    with pytest.raises(ValueError, match=r"mutant row-reduction/each-row-alone: .* does not occur"):
        rules(first, second)


def test_changes_are_made_in_a_package_of_their_own():
    changed = rules(mutants()["step-size/ascends"])
    p, g = np.ones((2, 3)), np.full((2, 3), 0.5)
    for package, sign in ((changed, 1), (adamp_spec, -1)):
        state = package.AdamPState(0, np.zeros_like(p), np.zeros_like(p))
        after, _, _ = package.adamp_step(p, g, state, package.AdamPHyper(lr=0.1), package.Layout(None))
        np.testing.assert_allclose(after, 1 + sign * 0.1, rtol=1e-6)
    first, second = (mutants()[name] for name in ("decay-ratio/ignored", "hyperparameters/zero-eps-accepted"))
    both = rules(first, second)
    assert both.AdamPHyper(eps=0.0).eps == 0
    with pytest.raises(ValueError, match="eps must be in"):
        rules(first).AdamPHyper(eps=0.0)


# Killing them


def test_every_mutant_is_killed_by_two_vectors_and_by_one_for_its_mistake(hunted):
    assert [kills.mutant.id for kills in hunted if mutation.survives(kills)] == []
    assert {(kills.mutant.id, kills.algorithm) for kills in hunted} == {
        (mutant.id, algorithm) for mutant in mutants().values() for algorithm in mutant.algorithms
    }
    for kills in hunted:
        assert len({id for id, _ in kills.vectors}) >= ENOUGH == 2
        assert kills.flagged >= 1


def test_the_page_of_the_documentation_is_what_was_found(hunted):
    assert (ROOT / "docs/mutants.md").read_text() == mutation.markdown(hunted)


def test_the_contrast_is_one(hunted):
    """Usual tests notice some of the wrong optimizers, not all, and not the right one."""
    noticed = [kills.random for kills in hunted]
    assert 0 < sum(noticed) < len(noticed)
    for algorithm in ALGORITHMS:
        assert not random_test_fails(adamp_spec, algorithm)
        assert not random_test_fails(rules(), algorithm)
        assert random_test_fails(rules(mutants()["projection/missing"]), algorithm)


def test_an_optimizer_that_is_not_wrong_is_killed_by_nothing():
    (kills,) = hunt(HARMLESS)
    assert kills == Kills(HARMLESS, "adamp", (), 0, False)
    assert mutation.survives(kills)


@pytest.mark.parametrize(
    ("vectors", "flagged", "survives"),
    [
        ((), 0, True),
        ((("adamp/a/b", "float32"), ("adamp/a/b", "float64")), 2, True),  # one vector, in two dtypes
        ((("adamp/a/b", "float32"), ("adamp/a/c", "float32")), 0, True),  # none for the mistake
        ((("adamp/a/b", "float32"), ("adamp/a/c", "float32")), 1, False),
    ],
)
def test_what_counts_as_killed(vectors, flagged, survives):
    assert mutation.survives(Kills(HARMLESS, "adamp", vectors, flagged, True)) is survives


def test_the_command_exits_1_for_a_survivor_and_0_for_none(monkeypatch, tmp_path):
    killed = mutants()["step-size/ascends"]
    page = tmp_path / "new/mutants.md"
    for chosen, code in (([killed], 0), ([killed, HARMLESS], 1)):
        monkeypatch.setattr(cli, "mutants", lambda chosen=chosen: {mutant.id: mutant for mutant in chosen})
        arguments = ["mutate", "--jobs", "1", "--markdown", str(page)]
        result = CliRunner().invoke(cli.main, arguments)
        assert result.exit_code == code, result.output
        assert f"1 of {len(chosen)} wrong optimizers are killed" in " ".join(result.output.split())
    assert "rounding/harmless" in result.output
    assert page.read_text() == mutation.markdown([kills for mutant in (killed, HARMLESS) for kills in hunt(mutant)])


# The choice points


@pytest.mark.parametrize("point", VARIANTS)
def test_an_option_that_is_not_ours_is_a_mutant(point):
    ours, *others = VARIANTS[point]["options"]
    assert "mutant" not in ours
    assert others
    assert len({option["name"] for option in (ours, *others)}) == len(others) + 1
    for option in others:
        assert option["mutant"] in mutants(), option["name"]


def test_an_option_that_is_not_ours_is_told_by_a_vector_for_it(hunted):
    """So the oracle that follows it differs from ours where `diagnose` looks."""
    one_step = {x.id for group in load().groups if group.steps == 1 for x in group.vectors}
    flags = {x.id: x.flags for group in load().groups for x in group.vectors}
    by_id = {}
    for kills in hunted:
        by_id.setdefault(kills.mutant.id, []).append(kills)
    options = [option["mutant"] for row in VARIANTS.values() for option in row["options"][1:]]
    assert len(options) == len(set(options)) > 15
    for id in options:
        for kills in by_id[id]:
            assert any(kills.mutant.flag in flags[vector] for vector, _ in kills.vectors if vector in one_step), id
