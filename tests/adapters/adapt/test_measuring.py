"""Rows measured: scores by hand, likelihoods against a plain pass, and the same alone as beside others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.adapt import Row, measure_rows, read_rows, rouge_l
from anabranch.adapters.adapt.measuring import is_exact
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError, DataError
from anabranch.lm import Decoder

ROWS = [
    Row("upper", "say ab", "AB"),
    Row("upper", "say cde, please", "CDE", others=("C D E",)),
    Row("", "what is it?", "a longer answer than the others"),
]


@pytest.fixture(scope="module")
def model():
    return Decoder.Config(dim=32, num_layers=2, max_positions=64).build(seed=2)


@pytest.mark.parametrize(
    ("text", "wanted", "score"),
    [
        # 3 of 4 words and of 4, in order: F = 2 * 3 / 8.
        ("the cat sat down", "the cat sat up", 0.75),
        # The longest common subsequence of a b c d and a c b d has 3.
        ("a b c d", "a c b d", 0.75),
        ("The cat.", "the CAT", 1.0),
        ("b a", "a", 2 / 3),
        ("", "a", 0.0),
        ("!", "?", 1.0),
    ],
)
def test_rouge_l_by_hand(text, wanted, score):
    assert rouge_l(text, wanted) == pytest.approx(score)


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_a_plain_recursion(one, other):
    def common(left, right):
        if not left or not right:
            return 0
        if left[-1] == right[-1]:
            return common(left[:-1], right[:-1]) + 1
        return max(common(left[:-1], right), common(left, right[:-1]))

    wanted = 2 * common(one, other) / (len(one) + len(other)) if one and other else float(one == other)
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(wanted)
    assert rouge_l(" ".join(one), " ".join(other)) == rouge_l(" ".join(other), " ".join(one))


def test_exact_but_for_case_and_punctuation():
    assert is_exact(" Yes.", ["no", "yes"])
    assert not is_exact("yes it is", ["yes"])
    assert is_exact("=)", ["=) "])
    assert not is_exact("=)", ["=("])


@torch.no_grad()
def test_likelihoods_are_those_of_a_plain_pass(model):
    tokenizer = ByteTokenizer.Config().build()
    nats, tokens = 0.0, 0
    for row in ROWS:
        asked, said = tokenizer.encode(row.prompt + "\n"), [*tokenizer.encode(row.answer), tokenizer.eos_id]
        log_p = model.eval()(torch.tensor([asked + said])).logits_BLV.log_softmax(-1)[0]
        nats -= sum(float(log_p[len(asked) - 1 + place, token]) for place, token in enumerate(said))
        tokens += len(said)
    scores = measure_rows(model, tokenizer, ROWS)
    assert (scores.all.rows, scores.all.tokens) == (3, tokens)
    assert scores.all.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert scores.by_task.keys() == {"upper"}
    assert scores.by_task["upper"].rows == 2
    assert "rouge_l" not in scores.all.to_dict()


def test_answers_are_the_same_alone(model):
    tokenizer = ByteTokenizer.Config().build()
    together = measure_rows(model, tokenizer, ROWS, max_new_tokens=6, batch_size=3)
    alone = [measure_rows(model, tokenizer, [row], max_new_tokens=6).all for row in ROWS]
    assert together.all.rouge_l == pytest.approx(sum(one.rouge_l for one in alone) / 3)
    assert together.all.exact == pytest.approx(sum(one.exact for one in alone) / 3)


def test_an_answer_that_is_right_counts_whichever_of_several_it_is(model, monkeypatch):
    tokenizer = ByteTokenizer.Config().build()
    import anabranch.adapters.adapt.measuring as measuring

    monkeypatch.setattr(
        measuring, "generate", lambda model, prompts, sampling: [tokenizer.encode("c d e")] * len(prompts)
    )
    score = measure_rows(model, tokenizer, ROWS[1:2], max_new_tokens=8).all
    assert (score.rouge_l, score.exact) == (1.0, 1.0)


def test_all_answers_of_a_row_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"input": "a", "output": ["x", "", "y", "x"], "split": "test"}\n{"input": "b", "answer": "z"}'
    )
    first, second = read_rows(tmp_path / "rows.jsonl")
    assert (first.answer, first.others, first.is_held_out) == ("x", ("y",), True)
    assert (second.answer, second.others, second.is_held_out) == ("z", (), False)


def test_rows_are_told_their_tasks_and_what_they_ask(tmp_path):
    """Whatever a block around the pass tells: it is made of its parts, which have to ask."""
    from anabranch.adapters import LowRank, save_peft
    from anabranch.adapters.glider import GliderConfig, GliderPool
    from anabranch.adapters.mhr import MultiHeadRouted
    from anabranch.adapters.put_on import put_on
    from anabranch.adapters.tasks import on_tasks
    from anabranch.nn import SelfAttention, SwiGLU

    tokenizer = ByteTokenizer.Config().build()
    config = Decoder.Config(
        dim=32,
        num_layers=2,
        max_positions=64,
        attention=SelfAttention.Config(num_heads=4),
        feed_forward=SwiGLU.Config(hidden_dim=48),
    )

    def moved(model):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 3.0)
        return model

    routed = moved(
        put_on(
            config.build(seed=1), {"*.q": MultiHeadRouted.Config(tasks=("upper", "other"), skills=2, heads=2, rank=2)}
        )
    )
    rows = [Row(task, "say ab", "AB") for task in ("upper", "other")]
    together = measure_rows(routed, tokenizer, rows, telling=lambda some: on_tasks(routed, [row.task for row in some]))
    alone = [
        measure_rows(
            routed, tokenizer, rows[:1], telling=lambda some, name=name: on_tasks(routed, name)
        ).all.nats_per_token
        for name in ("upper", "other")
    ]
    assert [score.nats_per_token for score in together.by_task.values()] == pytest.approx(alone[::-1], rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-4)
    pool = GliderPool(GliderConfig(local="none", top_k=1, weight=100.0))
    for seed, (name, asked) in enumerate({"law": "name the law", "sql": "write a query"}.items()):
        made = config.replace(linears={"*.down": LowRank.Config(rank=2)}).build(seed=seed).requires_grad_(True)
        save_peft(tmp_path / name, moved(made))
        pool.add(tmp_path / name, instruction=asked)
    pool.matcher.fit()
    model = pool.onto(config.build(seed=1))
    found = {
        asked: measure_rows(
            model, tokenizer, rows[:1], telling=lambda some, asked=asked: pool.answering([asked])
        ).all.nats_per_token
        for asked in ("which law is it", "a query in sql")
    }
    assert found["which law is it"] != pytest.approx(found["a query in sql"], rel=1e-4)


def test_what_cannot_be_measured(model):
    tokenizer = ByteTokenizer.Config().build()
    with pytest.raises(DataError, match="no rows"):
        measure_rows(model, tokenizer, [])
    with pytest.raises(ConfigError, match="rows may have 8 tokens, and answers 8"):
        measure_rows(model, tokenizer, ROWS, most_tokens=8, max_new_tokens=8)
