"""Dr.LLM: search of paths, its tree, its moves, its file, and the null control."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.depth.dr_llm import Question, SearchConfig, TreeSearch, labels_of, moves_of, read_paths, search_paths
from anabranch.depth.dr_llm.flips import Flip, FlipReport, binomial_tail, decoys_of, probe_of
from anabranch.depth.dr_llm.mcts import Node
from anabranch.depth.dr_llm.moves import in_common
from anabranch.depth.dr_llm.records import PathRow, PathsFile, digits_of, steps_of_digits
from anabranch.depth.dr_llm.rewards import NextToken
from anabranch.depth.dr_llm.runner import PathRunner, QuestionRuns, padded
from anabranch.depth.dr_llm.search import control_file, control_of, search_question
from anabranch.depth.stack import run_path
from anabranch.errors import ConfigError, DataError, NotFiniteError
from anabranch.experts.rmoe import RecurrentScore
from anabranch.nn import MoE
from anabranch.routing import Router, TopK
from dr_llm_made import VOCABULARY, Wants, asked, stack, transformers_stack

WHOLE = (0, 1, 2, 3, 4)

# Moves


def test_moves_by_hand():
    assert moves_of((0, 1, 2), 3) == [
        (1, 2),
        (0, 2),
        (0, 1),  # one entry less
        (2,),
        (0,),  # two that follow each other
        (0, 0, 1, 2),
        (0, 1, 1, 2),
        (0, 1, 2, 2),
    ]
    # Which of two equal entries goes makes no difference, and none is doubled again.
    assert moves_of((1, 1), 2) == [(1,)]
    assert moves_of((0,), 1) == [(0, 0)]


@settings(max_examples=60, deadline=None)
@given(num_blocks=st.integers(1, 6), choices=st.lists(st.integers(0, 10**6), max_size=12))
def test_no_walk_leaves_the_rules(num_blocks, choices):
    path = tuple(range(num_blocks))
    for choice in choices:
        moves = moves_of(path, num_blocks)
        assert path not in moves
        assert len(set(moves)) == len(moves)
        for move in moves:
            assert 1 <= len(move) <= 2 * num_blocks
            assert max(map(move.count, move)) <= 2
            assert list(move) == sorted(move)
        if not moves:
            break
        path = moves[choice % len(moves)]


# The tree


def tree(**options):
    return TreeSearch(
        WHOLE, moves=lambda path: moves_of(path, 5), cost=lambda path: len(path) / 5, draw=random.Random(0), **options
    )


def test_the_bound_on_a_tree_of_three_nodes():
    made = tree()
    left, right = Node((0, 1, 2), parent=made.root), Node((0, 1, 2, 3), parent=made.root)
    made.root.children = [left, right]
    made.back_up(made.root, 1.0)
    for reward in (1.0, 0.0):
        made.back_up(left, reward)
    assert (made.root.visits, made.root.total, left.visits, left.total) == (3, 2.0, 2, 1.0)
    assert made.ucb(left) == pytest.approx(0.5 + 1.8 * math.sqrt(math.log(3) / 2) - 3.0 * 3 / 5)
    assert made.ucb(right) == math.inf
    made.back_up(right, 1.0)
    assert made.ucb(right) == pytest.approx(1.0 + 1.8 * math.sqrt(math.log(4)) - 3.0 * 4 / 5)


def test_the_penalty_counts_in_selection_alone():
    """Rewards below a node are what was got."""
    made = tree(penalty=100.0)
    made.run(lambda path: 1.0, 10)
    assert made.root.total == made.root.visits == 10


def test_every_move_is_tried_first_without_widening():
    made = tree(widening=None, random_share=0.0)
    moves = set(moves_of(WHOLE, 5))
    made.run(lambda path: 0.0, 1 + len(moves))
    assert {child.state for child in made.root.children} == moves
    assert not any(child.children for child in made.root.children)
    made.run(lambda path: 0.0, 1)
    assert sum(bool(child.children) for child in made.root.children) == 1


def test_with_widening_children_grow_as_the_root_of_visits():
    made = tree(random_share=0.0)
    made.run(lambda path: 1.0, 60)
    for node in made.nodes():
        assert len(node.children) <= math.ceil(math.sqrt(max(node.visits, 1)))
    depth = max(len(WHOLE) - len(node.state) for node in made.nodes())
    assert depth >= 3  # beyond what one move reaches


def test_a_node_is_evaluated_before_it_has_children():
    made = tree()
    for _ in range(30):
        node = made.next()
        assert node.visits == 0 or not moves_of(node.state, 5)
        made.back_up(node, 0.0)


def test_heavy_moves_are_tried_sooner():
    made = TreeSearch(
        0,
        moves=lambda state: range(1, 9),
        cost=lambda state: 0.0,
        draw=random.Random(0),
        widening=None,
        weight=lambda state, move: 1e4**move,
    )
    made.run(lambda state: 0.0, 9)
    assert [child.state for child in made.root.children] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_a_dead_end_is_visited_again():
    made = TreeSearch(0, moves=lambda state: [], cost=lambda state: 0.0, draw=random.Random(0))
    assert made.run(lambda state: 1.0, 5) == 5
    assert (made.root.visits, len(made.nodes())) == (5, 1)


@pytest.mark.parametrize(("name", "value"), [("random_share", 1.5), ("random_share", -0.1), ("widening", 0.0)])
def test_settings_of_a_tree_that_cannot_be(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        tree(**{name: value})


# Prefixes


@pytest.mark.parametrize("make", [stack, transformers_stack, lambda: transformers_stack("gpt2")])
@pytest.mark.parametrize("keep_bytes", [2**20, 3000, 0])
def test_a_path_from_its_prefix_is_the_path_from_the_start(make, keep_bytes):
    model = make()
    rows = [question.prompt for question in asked(3)]
    token_BL, mask_BL = padded(rows, model.device)
    runner = PathRunner(model, token_BL, attention_mask=mask_BL, keep_bytes=keep_bytes)
    draw, path, naive = random.Random(0), tuple(range(model.num_blocks)), 0
    for _ in range(25):
        made_BLV = runner.logits(path)
        naive += len(path)
        with torch.no_grad():
            wanted_BLV = run_path(model, token_BL, path, attention_mask=mask_BL)
        assert torch.equal(made_BLV, wanted_BLV)
        path = draw.choice(moves_of(path, model.num_blocks))
    assert runner.naive == naive
    assert (runner.blocks < naive) == (keep_bytes > 0)


def test_what_layers_carry_to_others_is_that_of_the_path():
    """A recurrent router of experts hands a state on from layer to layer: branches must not share it."""
    routed = MoE.Config(
        num_experts=4, hidden_dim=8, router=Router.Config(score=RecurrentScore.Config(), select=TopK.Config(top_k=2))
    )
    model = stack(feed_forward=routed)
    token_BL = torch.tensor([[3, 1, 4, 1, 5]])
    runner = PathRunner(model, token_BL)
    for path in (WHOLE, (0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 3, 3, 4), (0, 1, 2, 3)):
        with torch.no_grad():
            assert torch.equal(runner.logits(path), run_path(model, token_BL, path)), path


def test_states_are_kept_up_to_a_number_of_bytes():
    one = 3 * 16 * 4
    runner = PathRunner(stack(), torch.tensor([[1, 2, 3]]), keep_bytes=2 * one)
    runner.logits(WHOLE)
    before = runner.blocks
    # The last two prefixes are there, the earlier ones are not.
    runner.logits((0, 1, 2, 3))
    assert runner.blocks == before
    runner.logits((0, 1))
    assert runner.blocks == before + 2


def test_block_passes_are_counted():
    runner = PathRunner(stack(), torch.tensor([[1, 2, 3]]))
    for path, new in ((WHOLE, 5), (WHOLE, 0), ((0, 1, 2, 2, 3, 4), 3), ((0, 1, 3, 4), 2), ((0, 1, 3), 0), ((4,), 1)):
        before = runner.blocks
        runner.logits(path)
        assert runner.blocks - before == new, path


def test_a_broken_model_is_told():
    model = stack()
    with torch.no_grad():
        model.module.blocks[2].feed_forward.w2.weight.fill_(float("nan"))
    runs = QuestionRuns(model)
    assert torch.isfinite(runs.on((0, 1)).logits([(1, 2)])).all()
    with pytest.raises(NotFiniteError, match="on path 0,1,2"):
        runs.on((0, 1, 2)).logits([(1, 2)])


def test_a_greedy_answer_on_a_path_is_that_of_whole_passes():
    model, path = stack(), (0, 1, 1, 3)
    runs = QuestionRuns(model)
    said = runs.on(path).generate([3, 1, 4], 6)
    tokens = [3, 1, 4]
    with torch.no_grad():
        for token in said:
            assert token == int(run_path(model, torch.tensor([tokens]), path)[0, -1].argmax())
            tokens.append(token)
    assert runs.blocks == 6 * len(path)
    assert QuestionRuns(model).on(path).generate([3, 1, 4], 6, stop=[said[2]]) == said[: said.index(said[2])]


# Search of a question

QUESTION = Question("one", (1, 2, 3), (4,))


def test_search_finds_the_one_path_that_is_right():
    wants = Wants((0, 2, 2, 4))
    row = search_question(stack(), QUESTION, wants, SearchConfig(simulations=3000))
    assert (row.base_reward, row.path, row.good) == (0.0, (0, 2, 2, 4), ("10201",))
    # It ends there, as the whole model is wrong.
    assert wants.calls[-1] == ("one", (0, 2, 2, 4))
    assert row.evaluations == len(wants.calls)
    assert row.simulations < 3000


def test_no_path_is_evaluated_twice():
    wants = Wants()
    row = search_question(stack(num_layers=3), QUESTION, wants, SearchConfig(simulations=200))
    # Every path of 3 blocks that there is.
    assert len(set(wants.calls)) == len(wants.calls) == row.evaluations == 3**3 - 1
    assert row.simulations == 200
    assert (row.path, row.good) == (None, ())
    for _, path in wants.calls:
        assert len(path) <= 6
        assert max(map(path.count, path)) <= 2


@pytest.mark.parametrize("saving", [1, 2, 3, None])
def test_a_right_answer_is_searched_until_so_many_blocks_are_saved(saving):
    row = search_question(
        stack(), QUESTION, lambda question, run: 1.0, SearchConfig(simulations=300, stop_saving=saving)
    )
    # The last move may have deleted two.
    assert len(row.path) in ((1,) if saving is None else (5 - saving, 4 - saving))
    assert row.base_right
    assert len(row.good) == row.evaluations
    assert (row.simulations < 300) == (saving is not None)


def test_of_right_paths_the_shortest_and_least_varied_is_the_label():
    good = {(0, 0, 1), (0, 1, 2), (0, 1, 2, 3), WHOLE}
    row = search_question(stack(), QUESTION, Wants(*good), SearchConfig(simulations=4000, stop_saving=None))
    assert {steps_of_digits(digits) for digits in row.good} == good
    assert row.path == (0, 0, 1)
    assert row.decisions == [2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "yes", None, [1.0], 10**400, np.float32("inf"), np.ones(2)]
)
def test_a_reward_must_be_a_number(value):
    with pytest.raises(DataError, match="the reward of question 'one' is"):
        search_question(stack(), QUESTION, lambda question, run: value)


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.bool_(True), np.int64(1), np.ones(1), torch.tensor(True)])
def test_a_reward_may_be_any_librarys_number(value):
    assert (
        search_question(stack(), QUESTION, lambda question, run: value, SearchConfig(simulations=1)).base_reward == 1.0
    )


def test_a_reward_of_ones_own_with_a_limit():
    row = search_question(
        stack(), QUESTION, lambda question, run: 1 / len(run.path), SearchConfig(simulations=60, right=0.3)
    )
    assert row.base_reward == pytest.approx(0.2)
    assert not row.base_right
    assert len(row.path) <= 3


# Search of a set


def of_token(question, run):
    """Right where the best token is even: about half of all paths."""
    return float(run.logits([question.prompt], last_only=True)[0, -1].argmax() % 2 == 0)


of_token.name = "of token"


def test_neither_order_nor_a_stop_changes_what_is_found(tmp_path):
    model, questions = stack(), asked(8)
    config = SearchConfig(simulations=12, seed=3)
    whole = search_paths(model, questions, of_token, config, tmp_path / "a.jsonl")
    again = search_paths(model, questions[::-1], of_token, config, tmp_path / "b.jsonl")
    assert {row.id: row for row in whole.rows} == {row.id: row for row in again.rows}
    assert [row.id for row in whole.rows] == [question.id for question in questions]
    # A third run is stopped in a line and goes on.
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "c.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    wanted = Wants()

    def counted(question, run):
        wanted(question, run)
        return of_token(question, run)

    counted.name = of_token.name
    went_on = search_paths(model, questions, counted, config, tmp_path / "c.jsonl")
    assert {row.id: row for row in went_on.rows} == {row.id: row for row in whole.rows}
    done = {json.loads(line)["id"] for line in lines[:3] if json.loads(line)["base_right"]}
    assert done
    assert not done & {name for name, path in wanted.calls if path != WHOLE}
    assert sorted(read_paths(tmp_path / "c.jsonl"), key=lambda row: row.id) == sorted(
        whole.rows, key=lambda row: row.id
    )


def test_a_row_says_all_that_is_needed_later(tmp_path):
    model, questions = stack(), asked(4)
    search_paths(model, questions, of_token, SearchConfig(simulations=8), tmp_path / "a.jsonl")
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = next(one for one in questions if one.id == row["id"])
        assert row["prompt"] == list(question.prompt)
        assert row["num_blocks"] == 5
        assert row["evaluations"] <= 9
        assert row["blocks"] <= row["blocks_naive"]
        if row["path"] is not None:
            assert digits_of(tuple(row["path"]), 5) == row["good"][0]


def test_what_prefixes_save_is_reported():
    config = SearchConfig(flip_labels="keep", stop_saving=None)
    report = search_paths(stack(num_layers=12), asked(3), of_token, config)
    told = report.to_dict()
    assert told["prefix_gain"] == told["blocks_naive"] / told["blocks"] > 1.5
    # Late moves begin at longer prefixes.
    late = search_paths(stack(num_layers=12), asked(3), of_token, config.replace(late=3.0)).to_dict()
    assert late["prefix_gain"] > told["prefix_gain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another search"),
        ({"simulations": 9}, "another search"),
        ({"flip_labels": "keep"}, "another search"),
        ({"keep_bytes": 0}, None),
        ({"quota": 100}, None),
    ],
)
def test_a_file_goes_on_with_its_own_search(tmp_path, change, message):
    model, questions = stack(), asked(3)
    config = SearchConfig(simulations=4)
    search_paths(model, questions, of_token, config, tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    if message is None:
        search_paths(model, questions, of_token, config.replace(**change), tmp_path / "a.jsonl")
    else:
        with pytest.raises(DataError, match=message):
            search_paths(model, questions, of_token, config.replace(**change), tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="another search"):
        search_paths(stack(seed=1), questions, of_token, config, tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"prompt": (5, 6)}, {"answer": (7,)}, {"answer_text": "seven"}, {"options": ((1,), (2,)), "correct": 0}]
)
@pytest.mark.parametrize("flips", ["auto", "drop"])
def test_a_row_of_a_question_that_asked_something_else_is_refused(tmp_path, change, flips):
    """Not only what is right already, but also in the null control."""
    model, place, config = stack(), tmp_path / "a.jsonl", SearchConfig(simulations=4, flip_labels=flips)
    search_paths(model, [QUESTION, *asked(4)], of_token, config, place)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    changed = replace(QUESTION, **change)
    with pytest.raises(DataError, match=r"a\.jsonl has question 'one' with another prompt or answer than is asked now"):
        search_paths(model, [changed], of_token, config, place)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    # Another name is another question, and those that are not asked any more say nothing.
    other = search_paths(model, [replace(changed, id="two")], of_token, config, place)
    assert (other.rows[0].id, other.rows[0].prompt) == ("two", changed.prompt)


def test_the_control_of_questions_that_asked_something_else_is_refused(tmp_path):
    answers = Answers(lambda question, path: 0 if path == WHOLE else hash(path) % 16 + 3)
    place, config = tmp_path / "a.jsonl", SearchConfig(simulations=20, probe=3)
    rows = search_paths(stack(), wrong_ones(4), answers, config, place).rows
    assert {row.question for row in read_paths(control_file(place))} <= {one.content() for one in wrong_ones(4)}
    assert control_of(place, rows).probe == 3
    changed = [replace(row, question="x") for row in rows]
    with pytest.raises(DataError, match=r"a\.control\.jsonl has question 'w\d' with another prompt or answer"):
        control_of(place, changed)
    place.unlink()
    changed = [replace(one, prompt=(*one.prompt, 9)) for one in wrong_ones(4)]
    with pytest.raises(DataError, match=r"a\.control\.jsonl has question 'w\d' with another prompt"):
        search_paths(stack(), changed, answers, config, place)
    assert not place.exists()


def test_a_file_knows_a_reward_by_the_name_that_it_was_given(tmp_path):
    """A function is called the same after it has been changed."""

    def half(question, run):
        return 1.0

    model, place, config = stack(), tmp_path / "a.jsonl", SearchConfig(simulations=2)
    with pytest.raises(ConfigError, match=r"reward '.*half' has no attribute name, by which a file of paths knows it"):
        search_paths(model, [QUESTION], half, config, place)
    assert list(tmp_path.iterdir()) == []
    assert search_paths(model, [QUESTION], half, config).rows[0].base_right
    half.name = "half-1"
    search_paths(model, [QUESTION], half, config, place)
    half.name = "half-2"
    with pytest.raises(DataError, match="another search"):
        search_paths(model, [QUESTION], half, config, place)


def test_a_file_is_written_by_one_process(tmp_path):
    with (
        PathsFile.open(tmp_path / "a.jsonl", "x"),
        pytest.raises(DataError, match="another process"),
        PathsFile.open(tmp_path / "a.jsonl", "x"),
    ):
        pass


def test_no_questions_and_the_same_twice():
    with pytest.raises(DataError, match="no questions"):
        search_paths(stack(), [], of_token)
    with pytest.raises(DataError, match="'one' comes twice"):
        search_paths(stack(), [QUESTION, QUESTION], of_token)
    with pytest.raises(DataError, match=f"has token {VOCABULARY}; the model has 0 to {VOCABULARY - 1}"):
        search_paths(stack(), [replace(QUESTION, prompt=(VOCABULARY,))], of_token)


def test_the_model_is_as_it_was():
    model = stack()
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    search_paths(model, asked(2), of_token, SearchConfig(simulations=5))
    assert model.module.training
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_quota_ends_the_search():
    wants = Wants(WHOLE)
    report = search_paths(stack(), asked(8), wants, SearchConfig(simulations=3, quota=2, flip_labels="drop"))
    assert len(report.rows) == 2
    assert {name for name, _ in wants.calls} == {"q0", "q1"}


# Flips


def test_the_test_of_flips_by_hand():
    assert binomial_tail(8, 10) == (45 + 10 + 1) / 1024
    assert binomial_tail(0, 3) == binomial_tail(0, 0) == 1.0
    flips = [Flip("a", True, False)] * 8 + [Flip("b", False, True)] * 2 + [Flip("c", True, True)] * 5
    report = FlipReport.of([*flips, Flip("d", False, False)])
    assert (report.probe, report.truth, report.decoy, report.only_truth, report.only_decoy) == (16, 13, 7, 8, 2)
    assert report.p_value == pytest.approx(56 / 1024)
    assert not report.is_real
    assert FlipReport.of([*flips, Flip("e", True, False)]).is_real
    assert not FlipReport.of([]).is_real


class Answers:
    """The whole model says token 0 of everything; on one path a token of a question's own."""

    name = "answers"

    def __init__(self, says):
        self._says = says

    def __call__(self, question, run):
        return float(question.answer[0] == self._says(question, run.path))


def wrong_ones(count=12):
    return [Question(f"w{number}", (number + 1, 2), (number + 3,)) for number in range(count)]


def test_flips_that_are_about_the_question_are_kept():
    """A path that gives each question its own answer, and no other one ever."""
    answers = Answers(lambda question, path: int(question.id[1:]) + 3 if 2 not in path else 0)
    report = search_paths(stack(), wrong_ones(), answers, SearchConfig(simulations=60))
    assert report.control.truth == 12
    assert report.control.decoy == 0
    assert report.keeps_flips
    assert len(labels_of(report.rows, flips=report.keeps_flips)) == 12
    assert report.to_dict()["flips"] == 12


def test_flips_that_any_answer_gets_are_no_labels(tmp_path):
    """Each path says another token, whatever is asked: the truth is reached, and so is a decoy."""
    answers = Answers(lambda question, path: 0 if path == WHOLE else hash(path) % 16 + 3)
    questions = wrong_ones()
    right = [Question("right", (1,), (0,))]
    config = SearchConfig(simulations=60, probe=5)
    report = search_paths(stack(), questions + right, answers, config, tmp_path / "a.jsonl")
    assert report.control.probe == 5
    assert not report.keeps_flips
    # Those of the probe were searched; the others have the reward of the whole model alone.
    assert sum(row.searched for row in report.rows) == 6
    assert labels_of(report.rows, flips=report.keeps_flips).ids == ("right",)
    assert control_of(tmp_path / "a.jsonl", report.rows) == report.control
    assert {row.id for row in read_paths(control_file(tmp_path / "a.jsonl"))} == {
        question.id for question in probe_of(questions, config)
    }
    with pytest.raises(DataError, match="none of 12 questions"):
        labels_of([row for row in report.rows if row.id != "right"])


def test_more_questions_leave_what_was_decided(tmp_path):
    """A question whose flips were not looked for counts in no later control: it was not asked for the truth."""
    answers = Answers(lambda question, path: 0 if path == WHOLE else hash(path) % 16 + 3)
    config = SearchConfig(simulations=30, probe=2)
    first = search_paths(stack(), wrong_ones(6), answers, config, tmp_path / "a.jsonl")
    assert sum(row.searched for row in first.rows) == 2
    second = search_paths(stack(), wrong_ones(12), answers, config, tmp_path / "a.jsonl")
    again = {row.id: row for row in second.rows}
    assert all(again[row.id] == row for row in first.rows)
    assert second.control.probe == sum(row.searched for row in second.rows) >= 2
    assert control_of(tmp_path / "a.jsonl", second.rows) == second.control
    left = [question for question in wrong_ones(6) if not again[question.id].searched]
    assert search_paths(stack(), left, answers, config, tmp_path / "a.jsonl").control.probe == 0


def test_nothing_is_left_where_nothing_was_found(tmp_path):
    def nothing(question, run):
        return None

    nothing.name = "nothing"
    with pytest.raises(DataError, match="must be a finite number"):
        search_paths(stack(), asked(2), nothing, None, tmp_path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flips", "searched"), [("keep", 3), ("drop", 0)])
def test_flips_without_a_control(flips, searched, tmp_path):
    report = search_paths(
        stack(), wrong_ones(3), Wants((0,)), SearchConfig(simulations=5, flip_labels=flips), tmp_path / "a.jsonl"
    )
    assert report.control is None
    assert sum(row.searched for row in report.rows) == searched
    assert not control_file(tmp_path / "a.jsonl").exists()
    assert control_of(tmp_path / "a.jsonl", report.rows) is None


def test_decoys_are_other_wrong_answers():
    question = Question("a", (1,), (5,), ((5,), (6,), (7,)), 0, "five", ("five", "six", "seven"))
    made = list(decoys_of(question, [], 0))
    assert {(one.correct, one.answer, one.answer_text) for one in made} == {(1, (6,), "six"), (2, (7,), "seven")}
    assert made == list(decoys_of(question, [], 0))
    plain = wrong_ones(5)
    found = [one.answer for one in decoys_of(plain[0], plain, 0)]
    assert set(found) == {one.answer for one in plain[1:]}
    assert found == [one.answer for one in decoys_of(plain[0], plain[::-1], 0)]


# Labels


def test_labels_and_their_quota():
    rows = search_paths(
        stack(), wrong_ones(6) + asked(6), Wants(WHOLE, (0, 1)), SearchConfig(simulations=40, flip_labels="keep")
    ).rows
    made = [
        replace(row, base_right=bool(number % 2), path=(0, 1) if number % 2 else (0, 0, 3))
        for number, row in enumerate(rows)
    ]
    assert len(labels_of(made)) == 6
    labels = labels_of(made, flips=True)
    assert (len(labels), labels.num_flips, labels.num_blocks) == (12, 6, 5)
    assert labels.decision_NL[0].tolist() == [2, 0, 0, 1, 0]
    assert labels.count_C.tolist() == [6 * 3 + 6 * 3, 6 * 2 + 6, 6]
    assert labels.mean_layers == pytest.approx(2.5)
    some = labels_of(made, flips=True, quota=10, flip_share=0.3)
    assert (len(some), some.num_flips) == (9, 3)
    assert some.ids == tuple(name for name in labels.ids if name in some.ids)
    assert len(labels_of(made, quota=2)) == 2
    assert labels.model == labels.take([1, 2]).model == stack().fingerprint()
    with pytest.raises(DataError, match="rows are of different models"):
        labels_of([*made, replace(made[1], model="another")])


# The file

GOOD = {
    "id": "a",
    "base_reward": 1.0,
    "base_right": True,
    "path": [0, 1],
    "good": ["11000"],
    "evaluations": 2,
    "simulations": 3,
    "blocks": 9,
    "blocks_naive": 12,
    "seed": 1,
    "num_blocks": 5,
    "searched": True,
    "prompt": [1],
    "search": "x",
    "question": "q",
    "model": "m",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": [[0, 1]]}, "list of blocks"),
        ({"path": [[]]}, "list of blocks"),
        ({"path": [True]}, "list of blocks"),
        ({"path": [0, 9]}, "block 9"),
        ({"path": [1, 0]}, "goes back"),
        ({"path": [0, 0, 0]}, "3 times"),
        ({"path": "01"}, "path is '01'"),
        ({"path": 3}, "path is 3"),
        ({"good": ["110"]}, "texts of 5 digits"),
        ({"good": ["11030"]}, "texts of 5 digits"),
        ({"good": "11000"}, "texts of 5 digits"),
        ({"evaluations": -1}, "evaluations is -1"),
        ({"num_blocks": 1.5}, r"num_blocks is 1\.5"),
        ({"num_blocks": 0}, "from 1 to 4,096"),
        ({"num_blocks": 10**12}, "from 1 to 4,096"),
        ({"num_blocks": 10**400}, "from 1 to 4,096"),
        ({"base_reward": 10**400}, "must be a finite number"),
        ({"base_reward": float("inf")}, "this is no JSON|must be a finite number"),
        ({"prompt": []}, "at least one"),
        ({"prompt": [-1]}, "it must be tokens"),
        ({"prompt": None}, "it must be tokens"),
        ({"base_reward": "1"}, "base_reward is '1'"),
        ({"base_reward": True}, "base_reward is True"),
        ({"base_right": 1}, "base_right is 1; it must be true or false"),
        ({"searched": "yes"}, "searched is 'yes'"),
        ({"id": 3}, "id is 3; it must be a text"),
        ({"search": None}, "search is None; it must be a text"),
        ({"question": ""}, "question is ''; it must be a text"),
        ({"model": 7}, "model is 7; it must be a text"),
    ],
)
def test_rows_that_are_none(tmp_path, change, message):
    place = tmp_path / "a.jsonl"
    place.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "b", **change}) + "\n")
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_paths(place)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no paths"),
        ("\n", "holds no paths"),
        ("{\n" + json.dumps(GOOD) + "\n", "line 1: this is no JSON"),
        ("3\n", "no field 'id'"),
        ('{"id": "a"}\n', "no field 'base_reward'"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n", "'a' comes twice"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "b", "search": "y"}) + "\n", "different searches"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "id": "b", "model": "n"}) + "\n", "different searches"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    place = tmp_path / "a.jsonl"
    place.write_text(text)
    with pytest.raises(DataError, match=message):
        read_paths(place)
    with pytest.raises(DataError, match="cannot read"):
        read_paths(tmp_path / "none.jsonl")


def test_a_last_line_without_an_end_is_whole_or_was_cut(tmp_path):
    place, second = tmp_path / "a.jsonl", json.dumps({**GOOD, "id": "b"})
    place.write_text(json.dumps(GOOD) + "\n" + second)
    assert [row.id for row in read_paths(place)] == ["a", "b"]
    with PathsFile.open(place, "x") as file:
        file.add(replace(file.rows["a"], id="c"))
    assert [row.id for row in read_paths(place)] == ["a", "b", "c"]
    place.write_text(json.dumps(GOOD) + "\n" + second[:-5])
    assert [row.id for row in read_paths(place)] == ["a"]
    with PathsFile.open(place, "x") as file:
        file.add(replace(file.rows["a"], id="c"))
        with pytest.raises(DataError, match="already"):
            file.add(file.rows["a"])
    assert [row.id for row in read_paths(place)] == ["a", "c"]
    with pytest.raises(DataError, match="no file"), PathsFile.open(tmp_path, "x"):
        pass


ROW = (json.dumps({**GOOD, "search": "x"}) + "\n").encode()


# A file is written to where it is of a search, cut off at any byte: nothing else loses a byte.
@pytest.mark.parametrize("length", range(0, len(ROW), 7))
@pytest.mark.parametrize("before", [b"", ROW.replace(b'"a"', b'"first"', 1)])
def test_a_row_that_was_cut_off_anywhere_is_gone_on_from(tmp_path, length, before):
    place = tmp_path / "a.jsonl"
    place.write_bytes(before + ROW[:length])
    with PathsFile.open(place, "x"):
        pass
    assert place.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "my only thesis, one long line",
        "sk-1234",
        "3",
        "[1, 2",
        '{"a": 1',
        '{"id": "a"}',
        '{"id": "a", "prompt": [1',
        '{"id": "a", "base" ',
        '{"id": 3',
        " {",
        "\x00\x01",
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.control.jsonl"])
def test_a_file_of_something_else_stays_as_it_is(tmp_path, text, name):
    place = tmp_path / name
    place.write_text(text)
    with pytest.raises(DataError, match=f"{name}"):
        search_paths(stack(), [QUESTION], NextToken(), SearchConfig(flip_labels="drop"), tmp_path / "a.jsonl")
    assert place.read_text() == text
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("order", [1, -1])
def test_two_names_of_a_file_are_one_file(tmp_path, link, order):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "sub").mkdir()
    getattr(tmp_path / "sub/b.jsonl", link)(tmp_path / "a.jsonl")
    first, second = ("a.jsonl", "sub/b.jsonl")[::order]
    with (
        PathsFile.open(tmp_path / first, "x"),
        pytest.raises(DataError, match=r"being written by another process"),
        PathsFile.open(tmp_path / second, "x"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "b.jsonl", "sub"]


def test_a_full_disk_is_told_with_the_file_and_leaves_whole_rows(tmp_path):
    script = f"""
import json, resource, signal
from anabranch.depth.dr_llm.records import PathsFile, PathRow, read_paths
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
table = json.loads({json.dumps(GOOD)!r})
row = PathRow(**table | {{"path": (0, 1), "good": (), "prompt": (1,)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from dataclasses import replace
try:
    with PathsFile.open({str(tmp_path / "a.jsonl")!r}, "x") as file:
        for number in range(9):
            file.add(replace(row, id=str(number)))
except Exception as error:
    print(type(error).__name__, error, len(read_paths({str(tmp_path / "a.jsonl")!r})))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "a.jsonl" in ran.stdout, ran.stdout
    assert (tmp_path / "a.jsonl").read_bytes().endswith(b"\n")


def test_a_control_that_has_not_begun_is_none(tmp_path):
    rows = [PathRow(**{**GOOD, "path": (0, 1), "good": (), "prompt": (1,)})]
    for begun in (b"", ROW[:40]):
        control_file(tmp_path / "a.jsonl").write_bytes(begun)
        assert control_of(tmp_path / "a.jsonl", rows) is None


def test_what_paths_have_in_common():
    assert [in_common(*pair) for pair in (((0, 1), (0, 2)), ((0, 1), (0, 1, 1)), ((), (1,)), ((1,), (2,)))] == [
        1,
        2,
        0,
        0,
    ]


def test_digits_say_a_path():
    assert digits_of((0, 2, 2, 4), 5) == "10201"
    assert steps_of_digits("10201") == (0, 2, 2, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("simulations", 0),
        ("random_share", 2.0),
        ("penalty", -1.0),
        ("widening", 0.0),
        ("stop_saving", 0),
        ("flip_labels", "maybe"),
        ("probe", 0),
        ("significance", 1.0),
        ("quota", 0),
        ("seed", -1),
        ("exploration", float("nan")),
    ],
)
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ConfigError, match=name):
        SearchConfig(**{name: value})
