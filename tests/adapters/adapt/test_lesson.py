"""What a step learns besides answers: a lesson has the places of its own rows, and may see all rows twice."""

import json

import pytest
import torch

from anabranch.adapters.adapt import AdaptTask, Lora
from anabranch.adapters.adapt.lesson import Lesson, Lessons, Seen
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, save_model
from anabranch.train import TrainConfig
from anabranch.train.task import TaskContext

BATCH = (
    torch.tensor([[1, 2, 3], [4, 5, 0]]),
    torch.tensor([1, 1]),
    torch.tensor([3, 2]),
    torch.tensor([0, 1]),
)


def some(batch, first, last):
    return tuple(tensor[first:last] for tensor in batch)


def named(name, factor=1.0, **brings):
    """The mean of what it brings, or of the batch."""

    def losses(seen, own):
        found_R = seen.nats_R[own] if own.stop > own.start else seen.nats_R[:2]
        return {name: factor * found_R.mean()}

    return Lesson(losses, **brings)


def test_each_lesson_finds_its_own_rows_behind_the_batch():
    lessons = Lessons(BATCH, [named("a", rows=some(BATCH, 1, 2)), named("b", 2.0), named("c", rows=some(BATCH, 0, 2))])
    token_RL, start_R, length_R, task_R = lessons.rows
    assert token_RL.tolist() == [[1, 2, 3], [4, 5, 0], [4, 5, 0], [1, 2, 3], [4, 5, 0]]
    assert (start_R.tolist(), length_R.tolist(), task_R.tolist()) == ([1] * 5, [3, 2, 2, 3, 2], [0, 1, 1, 0, 1])
    assert lessons.told is lessons.rows
    # Two tokens in the first row, one in each other.
    row_M = torch.tensor([0, 0, 1, 2, 3, 4])
    seen = Seen.of(torch.tensor([1.0, 3.0, 4.0, 8.0, 16.0, 32.0]), torch.zeros(()), row_M, 5)
    assert seen.nats_R.tolist() == [2, 4, 8, 16, 32]
    assert {name: float(loss) for name, loss in lessons.losses(seen).items()} == {"a": 8, "b": 6, "c": 24}


def test_rows_of_other_lengths_are_padded_and_all_stand_there_twice_where_one_asks():
    longer = tuple(torch.tensor(value) for value in ([[7, 8, 9, 10]], [2], [4], [1]))
    lessons = Lessons(BATCH, [named("a", rows=longer), named("b", again=lambda rows, length: {"told": (rows, length)})])
    assert lessons.rows[0].shape == (3, 4)
    assert [tensor.tolist() for tensor in lessons.told] == [tensor.tolist() * 2 for tensor in lessons.rows]
    assert lessons.again(6, 3) == {"told": (6, 3)}


class Taught(Lora, kind=None):
    """LoRA, and the first row of each batch once more."""

    def lessons(self, batch):
        return [named("mine", 0.5, rows=some(batch, 0, 1))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_method_of_ones_own_teaches_in_the_one_pass_of_a_step(tmp_path, smoothing):
    save_model(tmp_path / "base", Decoder.Config(vocab_size=257, dim=16, num_layers=1).build(), ByteTokenizer())
    rows = [{"task": "a", "input": word, "output": word.upper()} for word in ("ab", "cde", "f")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = AdaptTask.Config(
        model=str(tmp_path / "base"),
        data=str(tmp_path / "rows.jsonl"),
        method=Lora.Config(),
        held_out=0,
        label_smoothing=smoothing,
    ).build()
    context = TaskContext(TrainConfig(steps=1, batch_size=3), 3)
    model = task.build_model(context)
    batch = task.learned.tensors
    plain = task.step(model, batch, context)
    task.method = Taught(task.method.config)
    calls = []
    model.register_forward_hook(lambda module, given, made: calls.append(len(made[0])))
    taught = task.step(model, batch, context)
    assert len(calls) == 1
    assert set(taught.terms) == {"answer", "mine"}
    torch.testing.assert_close(taught.terms["answer"], plain.terms["answer"])
    alone = task.step(model, some(batch, 0, 1), context)
    if not smoothing:
        # Half of it, and half of it once more.
        torch.testing.assert_close(alone.total, 1.5 * alone.terms["answer"])
    torch.testing.assert_close(taught.terms["mine"], alone.terms["mine"])
    tokens = float((batch[2] - 1).sum())
    assert task.counts(batch, context) == {"tokens": tokens + float(batch[2][0] - 1)}
