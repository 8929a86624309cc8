"""The script that breaks lines: what it changes, what it leaves alone, and that tests notice most of it."""

import os
import subprocess
import sys
import textwrap

import pytest

import mutations
from mutations import Judge, Mutant, mutants

SOURCE = '''
    """A module."""

    LIMIT: Literal[3] = 4


    def load(items: list[int], floor=True) -> int:
        """Sum of the items above 2."""
        total = 0
        for item in items:
            if item > 2 and floor:
                total += max(item, LIMIT)
        log.info("took %d", 7)
        check(total)
        if total < 0:
            raise ValueError(f"{total} is below {0 + 1}")
        return total / 2
'''


def changes(source):
    return [(mutant.before, mutant.after) for mutant in mutants("routing.toy", textwrap.dedent(source))]


def test_every_kind_of_change_once_and_no_words():
    found = changes(SOURCE)
    wanted = {
        ("4", "5"),
        ("True", "False"),
        ("0", "1"),
        ("2", "3"),
        ("item > 2", "item >= 2"),
        ("item > 2 and floor", "item > 2 or floor"),
        ("max(item, LIMIT)", "min(item, LIMIT)"),
        ("total += max(item, LIMIT)", "total = max(item, LIMIT)"),
        ("check(total)", "None"),
        ("total < 0", "total <= 0"),
        ("total / 2", "total * 2"),
        ("log.info('took %d', 7)", "None"),
    }
    assert wanted <= set(found)
    conditions = [before for before, after in found if after.startswith("if not")]
    assert len(conditions) == 2
    assert set(found) - wanted - {pair for pair in found if pair[1].startswith("if not")} == set()
    assert not {"3", "7", "0 + 1", "1"} & {before for before, _ in found}  # annotations, log lines, messages


def test_the_changed_module_is_what_the_mutant_says(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "PACKAGE", tmp_path)
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "toy.py").write_text("def twice(x):\n    return x * 2\n")
    results = {}
    for mutant in mutants("routing.toy", (tmp_path / "routing" / "toy.py").read_text()):
        space: dict = {}
        exec(compile(mutant.tree(), "toy", "exec"), space)
        results[mutant.after] = space["twice"](6)
    assert results == {"x / 2": 3.0, "3": 18}


def test_a_sample_changes_by_what_a_change_changed(tmp_path, monkeypatch):
    """Another line, or another module, puts no others in the place of those drawn before, but for its own."""
    monkeypatch.setattr(mutations, "PACKAGE", tmp_path)
    file = tmp_path / "toy.py"
    body = [f"x{number} = y{number} + {number}\n" for number in range(50)]
    file.write_text("".join(body))
    before = [mutant.key for mutant in mutations.sample_of(["toy"], 30, 7)]
    assert len(set(before)) == 30
    file.write_text("".join(["new = old * 1000\n", *body[:20], *body[21:]]))
    after = [mutant.key for mutant in mutations.sample_of(["toy"], 30, 7)]
    gone = {key for key in before if key[1] == body[20].strip()}
    assert [key for key in after if "new" not in key[1]][: len(before) - len(gone) - 2] == [
        key for key in before if key not in gone
    ][: len(before) - len(gone) - 2]
    file.write_text("x = (1 + 1) + (1 + 1)\n")
    assert len({mutant.node for mutant in mutations.sample_of(["toy"], 100, 7)}) == 7  # four numbers and three sums


def test_equivalents_are_of_lines_that_are_there():
    modules = {key[0] for key in mutations.EQUIVALENT}
    there = {
        mutant.key for module in modules for mutant in mutants(module, mutations.path_of(module).read_text("utf-8"))
    }
    assert set(mutations.EQUIVALENT) <= there


def find(module, before):
    source = mutations.path_of(module).read_text("utf-8")
    return next(mutant for mutant in mutants(module, source) if mutant.before == before)


@pytest.mark.slow
def test_a_mutant_is_noticed_and_an_unchanged_module_is_not(monkeypatch):
    tests = (str(mutations.ROOT / "tests" / "routing" / "test_bias.py"),)
    monkeypatch.setattr(mutations, "tests_of", lambda module: [tests])
    judge = Judge()
    assert not judge.survives(find("routing.bias", "self.count_EX += load_E"))
    # A change where nothing is: the first line of a docstring's module stays as it is.
    unchanged = Mutant("routing.bias", 0, 1, "", "", "")
    monkeypatch.setattr(mutations, "_apply", lambda node: None)
    assert judge.survives(unchanged)


@pytest.mark.slow
def test_processes_that_tests_start_are_changed_too(monkeypatch):
    """What happens between ranks is seen in processes of their own alone."""
    tests = (str(mutations.ROOT / "tests" / "nn" / "test_expert_parallel.py"),)
    monkeypatch.setattr(mutations, "tests_of", lambda module: [tests])
    assert not Judge().survives(find("nn.expert_parallel", "choice_R // plan.num_choices"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sample_of_mutants_is_noticed():
    """Of routing, nn and experts; all of these are noticed, and one more line may come that is not."""
    done = subprocess.run(
        [sys.executable, mutations.__file__, "--sample", "40", "--seed", "7", "--allow", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
