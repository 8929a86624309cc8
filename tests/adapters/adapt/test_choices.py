"""Wrong choices: T-Few's losses against a loop over texts, what is read and cut, and the trainer's contract."""

import json
import math

import pytest
import torch

from anabranch.adapters.adapt import AdaptTask, Lora
from anabranch.adapters.adapt.choices import Wrong, encoded_choices, likeliest, wrong_choices
from anabranch.adapters.adapt.rows import Row, digest_of, read_rows
from anabranch.adapters.mhr.method import Mhr
from anabranch.data import ByteTokenizer
from anabranch.errors import DataError
from anabranch.lm import Decoder, save_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.testing import check_task
from anabranch.train import TaskContext, TaskRunConfig, TrainConfig, Trainer

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=2,
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    init_std=0.2,
)
BYTES = ByteTokenizer.Config().build()
WORDS = ["ab", "cde", "fghi", "jk", "lmnop", "q", "rst", "uv"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model that reads bytes, and rows of which some have wrong choices, one to three of them."""
    root = tmp_path_factory.mktemp("choices")
    save_model(root / "base", CONFIG.build(seed=1), BYTES)
    rows = []
    for number, word in enumerate(WORDS):
        choices = [word.upper(), *(other.upper() for other in WORDS[:number][-3:])]
        for task in ("up", "also"):
            row = {"task": task, "input": f"{task}: {word}", "output": word.upper()}
            rows.append({**row, "choices": choices} if number else row)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def config(place, method=None, *, train=(), **changes):
    settings = {"steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2, "log_every": 1, "device": "cpu"}
    given = {"unlikelihood": 1.0, "length_normalized": 1.0, "held_out": 0.3, **changes}
    paths = {"model": str(place / "base"), "data": str(place / "rows.jsonl")}
    return TaskRunConfig(
        task=AdaptTask.Config(**paths, method=method or Lora.Config(rank=2), **given),
        train=TrainConfig(**{**settings, **dict(train)}),
    )


def context_of(run):
    return TaskContext(run.train, run.train.batch_size)


def nats_of(model, prompt, said, **told):
    """-log p of each token of ``said`` behind ``prompt``, each alone."""
    ids = torch.tensor(prompt + said)
    log_p = model(ids[None, :-1], **told).logits_BLV[0].log_softmax(-1)
    return -log_p[torch.arange(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]


def told_ids(task, row):
    """(prompt, answer, wrong choices) of a learned row, as ids."""
    length, start = int(task.learned.length_N[row]), int(task.learned.start_N[row])
    ids = task.learned.token_NL[row, :length].tolist()
    token_NWT, length_NW = task.choices[0]
    wrong = [token_NWT[row, place, :size].tolist() for place, size in enumerate(length_NW[row].tolist()) if size]
    return ids[:start], ids[start:], wrong


def test_the_losses_are_those_of_a_loop_over_texts(place):
    run = config(place, unlikelihood=0.5, length_normalized=2.0)
    task = run.task.build()
    model = task.build_model(context_of(run)).eval()
    rows = list(range(len(task.learned)))
    batch = tuple(tensor[rows] for tensor in (*task.learned.tensors, *task.choices[0]))
    losses = task.step(model, batch, context_of(run))
    answer, unlikely, preferred = [], [], []
    for row in rows:
        prompt, said, wrong = told_ids(task, row)
        right = nats_of(task.base, prompt, said).mean()
        others = [nats_of(task.base, prompt, ids) for ids in wrong]
        answer.append(right)
        tokens = torch.cat(others) if others else torch.zeros(0)
        unlikely.append(-(1 - (-tokens).exp()).log().sum() / max(1, len(tokens)))
        scores = torch.stack([-right, *(-nats.mean() for nats in others)])
        preferred.append(scores.logsumexp(0) + right)
    assert {len(told_ids(task, row)[2]) for row in rows} >= {0, 1, 3}
    expected = {"answer": answer, "wrong_choices": unlikely, "preference": preferred}
    factors = {"answer": 1.0, "wrong_choices": 0.5, "preference": 2.0}
    assert list(losses.terms) == list(expected)
    for name, values in expected.items():
        wanted = factors[name] * torch.stack(values).mean()
        torch.testing.assert_close(losses.terms[name], wanted, rtol=1e-5, atol=1e-6)


def test_each_loss_alone_and_a_batch_without_choices(place):
    for changes, names in (
        ({"length_normalized": 0.0}, ["answer", "wrong_choices"]),
        ({"unlikelihood": 0.0}, ["answer", "preference"]),
    ):
        run = config(place, **changes)
        task = run.task.build()
        model = task.build_model(context_of(run))
        tensors = *task.learned.tensors, *task.choices[0]
        losses = task.step(model, tuple(tensor[:3] for tensor in tensors), context_of(run))
        assert list(losses.terms) == names
        none_N = (task.choices[0][1] > 0).sum(1) == 0
        losses = task.step(model, tuple(tensor[none_N] for tensor in tensors), context_of(run))
        assert float(losses.terms[names[1]]) == 0
        losses.total.backward()
    plain = config(place, unlikelihood=0.0, length_normalized=0.0).task.build()
    assert plain.choices == ((), ())


def test_by_hand():
    """A row of probabilities 1/2 and 1/4 (two tokens), one wrong choice of 1/8, and a row that has none."""
    wrong = Wrong(*(torch.tensor([]) for _ in range(3)), row_X=torch.tensor([0]), place_X=torch.tensor([1]))
    nats = torch.tensor([1, 2, 4, 3]) * math.log(2)
    mean = torch.tensor([1.5, 4, 3]) * math.log(2)
    unlikely, preferred = wrong.losses(nats, torch.tensor([0, 0, 1, 2]), mean, 2, 3)
    # -log(1 - 1/8);  -log( 2^-1.5 / (2^-1.5 + 2^-3) )
    torch.testing.assert_close(unlikely, torch.tensor([-math.log(7 / 8), 0.0]))
    torch.testing.assert_close(preferred, torch.tensor([math.log(1 + 2**-1.5), 0.0]))
    assert likeliest(mean[:2], mean[2:], torch.tensor([0])).tolist() == [True, True]
    assert likeliest(torch.tensor([4.0]), torch.tensor([5.0, 3.0]), torch.tensor([0, 0])).tolist() == [False]


def test_a_token_of_probability_one_ends_in_a_number():
    wrong = Wrong(*(torch.tensor([]) for _ in range(3)), row_X=torch.tensor([0]), place_X=torch.tensor([0]))
    nats = torch.tensor([1.0, 0.0], requires_grad=True)
    unlikely, _ = wrong.losses(nats, torch.tensor([0, 1]), nats, 1, 1)
    unlikely.sum().backward()
    assert torch.isfinite(unlikely).all()
    assert torch.isfinite(nats.grad).all()


def test_a_prompt_loses_its_front_where_prompt_and_choice_are_too_long():
    rows = [Row("", "p", "a", wrong=("xyz", "w", "left out")), Row("", "p", "a")]
    found = encoded_choices(rows, BYTES, 6, 2)
    end = BYTES.eos_id
    assert found.length_NW.tolist() == [[4, 2], [0, 0]]
    assert found.token_NWT[0].tolist() == [[*b"xyz", end], [ord("w"), end, 0, 0]]
    token_BL = torch.tensor([[1, 2, 3, 4, 9, 9], [5, 9, 0, 0, 0, 0]])
    wrong = wrong_choices(token_BL, torch.tensor([4, 1]), found.token_NWT, found.length_NW, 6)
    assert wrong.row_X.tolist() == [0, 0]
    rows = [ids[:length] for ids, length in zip(wrong.token_XL.tolist(), wrong.length_X.tolist(), strict=True)]
    # Prompt and choice are 4 + 4 tokens, of 6; and 4 + 2.
    assert rows == [[3, 4, *b"xyz", end], [1, 2, 3, 4, ord("w"), end]]
    assert wrong.start_X.tolist() == [2, 4]
    # A choice alone fills all but a token.
    assert encoded_choices([Row("", "p", "a", wrong=("0123456789",))], BYTES, 6, 2).length_NW.tolist() == [[5]]
    assert wrong_choices(token_BL, torch.tensor([4, 1]), found.token_NWT, torch.zeros(2, 2).long(), 6) is None


def test_what_rows_say(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"input": "x", "output": "a", "choices": ["a", "b", "b", 3]},
        {"input": "x", "output": ["a", "b"], "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}},
        {"input": "x", "output": "a", "choices": ["b"], "split": "test"},
        {"input": "x", "output": "a"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(path)
    assert [row.wrong for row in rows] == [("b", "3"), ("c",), ("b",), ()]
    assert digest_of(rows[2:3]) != digest_of(rows[3:])
    for wrong in ("b", [["b"]], [""], {"b": 1}, [None]):
        path.write_text(json.dumps({"input": "x", "output": "a", "choices": wrong}))
        if isinstance(wrong, dict):
            assert read_rows(path)[0].wrong == ()
        else:
            with pytest.raises(DataError, match=r"line 1: choices is .* must be a list of texts"):
                read_rows(path)


def test_losses_of_choices_that_nobody_has_are_an_error(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "x", "output": "a", "choices": ["a"]}\n' * 4)
    with pytest.raises(DataError, match=r'has wrong choices, .* give rows "choices": \[...\]'):
        config(place).task.replace(data=str(tmp_path / "rows.jsonl")).build()


def test_the_evaluation_says_how_many_answers_are_preferred(place):
    run = config(place, evaluation=str(place / "rows.jsonl"))
    task = run.task.build()
    model = task.build_model(context_of(run)).eval()
    with torch.no_grad():
        found = task.evaluate(model, task.validation_data(context_of(run)), context_of(run))
        right = []
        for row in range(len(task.learned)):
            prompt, said, wrong = told_ids(task, row)
            mean = nats_of(task.base, prompt, said).mean()
            if wrong:
                right.append(all(mean < nats_of(task.base, prompt, ids).mean() for ids in wrong))
    assert 0 < sum(right) < len(right) == 14
    assert found["choice_accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_contract_of_tasks(place):
    check_task(config(place), ranks=False)


@pytest.mark.slow
def test_the_contract_of_tasks_by_task_and_in_two_processes(place):
    check_task(config(place, Mhr.Config(skills=2, heads=2, rank=2)))


@pytest.mark.slow
def test_wrong_choices_become_less_likely_than_without_the_losses(place, tmp_path):
    """At equal steps, on what is learned: the mean of -log p of wrong choices is greater, and all answers are preferred."""
    same, found = str(place / "rows.jsonl"), []
    for factor in (0.0, 1.0):
        train = {"steps": 60, "learning_rate": 0.02, "eval_every": None}
        run = config(place, Lora.Config(targets=("all",)), train=train, evaluation=same, unlikelihood=factor)
        trainer = Trainer(run, tmp_path / str(factor))
        result = trainer.fit()
        task = trainer.task
        with torch.no_grad():
            nats = [
                nats_of(task.base.eval(), prompt, ids).mean()
                for prompt, _, wrong in (told_ids(task, row) for row in range(len(task.learned)))
                for ids in wrong
            ]
        found.append(float(torch.stack(nats).mean()))
        assert result.measures["choice_accuracy"] > task.before["choice_accuracy"]
    assert found[1] > found[0]


def test_a_wrong_choice_that_is_as_likely_is_not_beaten():
    right_B, wrong_X = torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.5])
    assert likeliest(right_B, wrong_X, torch.tensor([0, 1])).tolist() == [False, True]
