"""PVChat: the model, what learns in which stage, what stays to the bit, and what is measured."""

import copy
import math
import os
import signal

import pytest
import torch

from anabranch.errors import CheckpointError, ConfigError, DataError, InputError
from anabranch.heads.config import HeadRouting
from anabranch.heads.pvchat import (
    Clip,
    ClipTask,
    Composed,
    Composer,
    Learning,
    OneShotSet,
    Pretraining,
    PVChat,
    Questions,
    Subject,
    Vocabulary,
    exam,
    learn,
    measure,
    portraits,
    pretrain,
    rows_learning,
)
from anabranch.heads.pvchat.learn import generic_part
from anabranch.heads.pvchat.measure import _score
from anabranch.heads.pvchat.model import parts_of
from anabranch.heads.pvchat.questions import KINDS, says_yes
from anabranch.heads.pvchat.training import _LEARNS
from anabranch.heads.pvchat.vocabulary import PAD
from anabranch.train import TaskRunConfig, TrainConfig, Trainer
from drawn_subjects import made_subjects

RELU = HeadRouting(num_shared=5, routing="relu", target=0.5)
SMALL = PVChat.Config(frames=4, dim=32, num_queries=4, personal_tokens=3, heads=RELU, lora_rank=2)
SUBJECTS = made_subjects(6, 3)
NAMES = [f"<{subject.name}>" for subject in SUBJECTS[:5]]
DATA = OneShotSet.Config(positives=2, augmented=1, hard_negatives=2, easy_negatives=1, wordings=2)
LEARNING = Learning(data=DATA, image_steps=2, video_steps=3, batch_size=4)


def model_of(config=SMALL, names=NAMES, seed=0):
    made = PVChat(config, Vocabulary(names), seed=seed)
    # Weights that begin at nothing would hide what they do.
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.05, generator=generator)
    return made.eval()


def questions_of(model, count=6, seed=0):
    composer = Composer(Composer.Config(frames=model.config.frames, size=model.config.size))
    parts = generic_part(SUBJECTS[:5], count, composer, wordings=1, seed=seed)
    return Questions.of(parts, model.vocabulary, model.config.frames, model.config.size)


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# The model


def test_the_paper_s_shape_fits():
    full = PVChat(PVChat.Config(heads=RELU), Vocabulary([f"<{number}>" for number in range(90)]))
    assert sum(parameter.numel() for parameter in full.parameters()) < 3_000_000
    assert len(full.routed()) == 3  # self and cross in layer 2, self in layer 3
    assert {module.report()["shared"] for module in full.routed()} == {5}
    assert full.personal.shape == (90, 16, 64)


def test_every_parameter_is_of_a_part_and_learns_somewhere():
    found = parts_of(model_of())
    assert set(found.values()) == set().union(*_LEARNS.values())
    assert found["decoder.embedding.weight"] == "words"
    assert found["personal"] == "personal"
    assert found["queries.query"] == "queries"
    assert {part for name, part in found.items() if ".gate." in name} == {"router"}
    assert {part for name, part in found.items() if name.startswith("encoder.layers.0.")} == {"vision"}
    assert {part for name, part in found.items() if name.startswith("encoder.layers.1.")} == {"upper_vision"}


def test_routed_heads_change_nothing_when_they_are_put_on():
    plain = model_of(SMALL.replace(heads=HeadRouting(num_shared=5, routing="none")))
    questions = questions_of(plain)
    given = questions.frame_CFCHW[questions.clip_N], questions.subject_NS, questions.token_NKL
    before = plain(*given)[0]
    for heads in (RELU, HeadRouting(num_shared=5, routing="topk", top_k=3)):
        routed = copy.deepcopy(plain).with_heads(heads)
        assert len(routed.routed()) == 3
        assert torch.allclose(routed(*given)[0], before, atol=1e-5)
        assert routed.config.heads == heads
    with pytest.raises(ConfigError, match="are routed already"):
        routed.with_heads(RELU)
    assert plain.routed() == []
    assert plain.head_losses().item() == 0


def test_padding_and_others_of_a_batch_change_nothing():
    model = model_of()
    questions = questions_of(model)
    rows = torch.arange(len(questions))
    frame = questions.frame_CFCHW[questions.clip_N]
    whole, nats = model(frame, questions.subject_NS, questions.token_NKL, questions.target_NKL)
    for row in rows.tolist():
        for turn in range(questions.token_NKL.shape[1]):
            length = int((questions.target_NKL[row, turn] != -100).nonzero().max()) + 1
            alone, own = model(
                frame[row : row + 1],
                questions.subject_NS[row : row + 1],
                questions.token_NKL[row : row + 1, turn : turn + 1, :length],
                questions.target_NKL[row : row + 1, turn : turn + 1, :length],
            )
            assert torch.allclose(alone[0, 0], whole[row, turn, :length], atol=1e-4)
            assert own.item() == pytest.approx(nats[row, turn].item(), abs=1e-4)


def test_nobody_beside_a_subject_changes_nothing():
    model = model_of()
    clip = Composer(Composer.Config(frames=4)).compose(portraits(SUBJECTS)[:2], torch.Generator())
    frame = clip.frame_FCHW[None]
    alone, beside = model.look(frame, torch.tensor([[1]])), model.look(frame, torch.tensor([[1, -1]]))
    assert torch.allclose(alone, beside[:, : alone.shape[1]], atol=1e-5)
    assert not torch.allclose(alone, model.look(frame, torch.tensor([[2]])), atol=1e-3)


def test_two_subjects_in_one_question():
    model = model_of()
    clip = Composer(Composer.Config(frames=4)).compose(portraits(SUBJECTS)[:2], torch.Generator())
    assert isinstance(model.ask(clip, "are <s0> and <s1> here ?"), str)
    assert isinstance(model.ask(clip.first_frame(), "is <s0> here ?"), str)


def test_an_answer_is_the_likeliest_word_after_word():
    model = model_of()
    questions = questions_of(model)
    clip = Clip(questions.frame_CFCHW[0])
    text = "where is <s0> ?"
    said: list[int] = []
    ids = model.vocabulary.encode(text)
    with torch.no_grad():
        while len(said) < 12:
            logits = model(clip.frame_FCHW[None], torch.tensor([[0]]), torch.tensor([[ids + said]]))[0][0, 0, -1]
            logits[PAD] = -torch.inf
            if int(logits.argmax()) == 2:
                break
            said.append(int(logits.argmax()))
    assert model.ask(clip, text) == model.vocabulary.decode(said)


def test_a_model_reads_back_equal(tmp_path):
    model = model_of()
    model.add_subject("<new>")
    model.save(tmp_path / "m")
    read = PVChat.load(tmp_path / "m")
    assert read.config == model.config
    assert read.vocabulary.names == [*NAMES, "<new>"]
    assert all(
        torch.equal(one, other)
        for one, other in zip(read.state_dict().values(), model.state_dict().values(), strict=True)
    )
    model.save(tmp_path / "m")
    empty = PVChat(SMALL)
    empty.save(tmp_path / "empty")
    assert PVChat.load(tmp_path / "empty").personal.shape == (0, 3, 32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds mine\.txt"):
        model.save(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "x"}, "holds no PVChat model"),
        ({"schema": 9}, "schema in .* is 9"),
        ({"names": 3}, "no lists of words and names"),
        ({"names": ["a"]}, "does not describe a model: name is 'a'"),
        ({"words": ["a", "a"]}, "stands twice"),
        ({"model": {"dim": 7}}, "does not describe a model"),
        ({"model": {"dim": 2**20}}, "one of the two is damaged"),
        ({"names": []}, "has shape"),
    ],
)
def test_folders_that_hold_no_model(tmp_path, change, match):
    import json

    model_of().save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        PVChat.load(tmp_path / "m")


def test_models_that_cannot_be():
    for wrong, match in (
        ({"dim": 36}, "not a multiple of num_heads=8"),
        ({"size": 44}, "a multiple of 8"),
        ({"heads": HeadRouting(num_shared=8)}, "num_shared is 8"),
        ({"decoder_heads": 7}, "num_heads=7"),
    ):
        with pytest.raises(ConfigError, match=match):
            PVChat.Config(**wrong)
    model = model_of()
    long = Clip(torch.zeros(9, 3, 48, 48, dtype=torch.uint8))
    assert isinstance(model.ask(long, "is <s0> here ?"), str)
    with pytest.raises(InputError, match="clips of 9 frames of 48 x 48; this model takes 1 to 4"):
        model.look(long.frame_FCHW[None], torch.tensor([[0]]))
    for text, match in (("where ?", "names nobody"), ("<no>", "no subject is named"), ("", "names nobody")):
        with pytest.raises(InputError, match=match):
            model.ask(long, text)
    with pytest.raises(InputError, match="ask a shorter one"):
        model.ask(long, "<s0> " * 2000)


# Subjects


def test_a_new_subject_changes_nothing_of_the_others():
    model = model_of()
    questions = questions_of(model)
    given = questions.frame_CFCHW[questions.clip_N], questions.subject_NS, questions.token_NKL
    before, words, tokens = model(*given)[0], model.decoder.embedding.weight.clone(), model.personal.clone()
    assert model.add_subject("<new>") == 5
    assert torch.equal(model(*given)[0][..., :-1], before)
    assert torch.equal(model.decoder.embedding.weight[:-1], words)
    assert torch.equal(model.personal[:-1], tokens)
    assert model.decoder.config.vocab_size == len(model.vocabulary)
    assert model.rows_of(["<new>"]) == ([len(model.vocabulary) - 1], [5])
    with pytest.raises(ConfigError, match="in the vocabulary already"):
        model.add_subject("<new>")
    with pytest.raises(ConfigError, match="in the vocabulary already"):
        model.add_subject("<s0>")
    alone = PVChat(SMALL)
    assert alone.add_subject("<first>") == 0


def test_only_these_rows_learn():
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    before = parameter.detach().clone()
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0)
    with rows_learning(parameter, [1, 4]):
        for _ in range(3):
            optimizer.zero_grad()
            (parameter.exp().sum() + (parameter / 0).nan_to_num().sum() * 0).backward()
            optimizer.step()
    moved = (parameter != before).any(1)
    assert moved.tolist() == [False, True, False, False, True]
    optimizer.zero_grad()
    parameter.exp().sum().backward()
    assert bool((parameter.grad != 0).all())
    # A gradient that is infinite in another row is left out, not multiplied by zero.
    with rows_learning(parameter, [1]):
        parameter.grad = None
        (parameter * torch.full((5, 3), torch.inf)).sum().backward()
        assert parameter.grad[0].tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="row 5 is to learn, and the rows are 0 to 4"), rows_learning(parameter, [5]):
        pass


@pytest.mark.parametrize("routing", ["relu", "topk", "none"])
def test_learning_a_subject_leaves_all_else_to_the_bit(tmp_path, routing):
    model = model_of(SMALL.replace(heads=RELU.replace(routing=routing, target=None)))
    known = len(model.vocabulary)
    before = state(model)
    seen = []
    learned = learn(
        model,
        {"<Ab>": SUBJECTS[5].portrait(0)},
        portraits(SUBJECTS),
        tmp_path,
        LEARNING,
        device="cpu",
        on_event=lambda stage, event: seen.append(stage) if event.kind == "step" else None,
    )
    assert learned.is_finished
    assert seen == ["images"] * 2 + ["videos"] * 3
    after, parts = state(model), parts_of(model)
    assert torch.equal(after["decoder.embedding.weight"][:known], before["decoder.embedding.weight"])
    assert torch.equal(after["personal"][:5], before["personal"])
    moved = dict.fromkeys(set(parts.values()), False)
    for name, part in parts.items():
        if part in ("words", "personal"):
            continue
        moved[part] |= not torch.equal(after[name], before[name])
    stay = {"vision", "decoder", "words", "personal"} | ({"router"} if routing == "none" else set())
    assert {part for part, has_moved in moved.items() if not has_moved} == stay & set(moved)
    assert not any(parameter._backward_hooks for parameter in (model.personal, model.decoder.embedding.weight))
    # And what it begins with is not what it ends with.
    fresh = model_of(SMALL.replace(heads=RELU.replace(routing=routing, target=None)))
    fresh.add_subject("<Ab>", seed=0)
    assert not torch.equal(after["decoder.embedding.weight"][-1], fresh.decoder.embedding.weight[-1])
    assert not torch.equal(after["personal"][-1], fresh.personal[-1])


def test_images_alone_leave_vision_as_it_is(tmp_path):
    model = model_of()
    before = state(model)
    learn(
        model,
        {"<Ab>": SUBJECTS[5].portrait(0)},
        portraits(SUBJECTS),
        tmp_path,
        LEARNING.replace(video_steps=0),
        device="cpu",
    )
    after = state(model)
    still = [
        name for name, part in parts_of(model).items() if part in ("vision", "upper_vision", "projector", "decoder")
    ]
    assert all(torch.equal(after[name], before[name]) for name in still)


@pytest.mark.slow
def test_several_subjects_one_after_the_other(tmp_path):
    model = model_of()
    for number, name in enumerate(("<Ab>", "<Cd>")):
        learn(
            model,
            {name: SUBJECTS[5].portrait(number)},
            portraits(SUBJECTS),
            tmp_path / name[1:3],
            LEARNING,
            device="cpu",
        )
        if not number:
            first = model.personal[-1].detach().clone()
    assert model.vocabulary.names[-2:] == ["<Ab>", "<Cd>"]
    assert torch.equal(model.personal[-2], first)


def test_several_subjects_at_once(tmp_path):
    """Each is among the others of the other, and the rows of both learn."""
    model = model_of(names=NAMES[:4])
    known = len(model.vocabulary)
    before = state(model)
    references = {"<Ab>": SUBJECTS[4].portrait(0), "<Cd>": SUBJECTS[5].portrait(0)}
    bank = portraits(SUBJECTS[:4])
    learned = learn(model, references, bank, tmp_path, LEARNING, device="cpu")
    assert set(learned.balance) == set(learned.found) == {"<Ab>", "<Cd>"}
    seen = {subject for found in learned.found.values() for subject, _ in found}
    assert seen <= {subject.name for subject in SUBJECTS}
    after = state(model)
    assert torch.equal(after["decoder.embedding.weight"][:known], before["decoder.embedding.weight"])
    assert torch.equal(after["personal"][:4], before["personal"])
    assert not torch.allclose(after["personal"][4], after["personal"][5])
    fresh = model_of(names=NAMES[:4])
    for name in references:
        fresh.add_subject(name, seed=0)
    for row in (-1, -2):
        assert not torch.equal(after["personal"][row], fresh.personal[row])
        assert not torch.equal(after["decoder.embedding.weight"][row], fresh.decoder.embedding.weight[row])
    with pytest.raises(ConfigError, match="references is empty"):
        learn(model, {}, bank, tmp_path / "none", LEARNING, device="cpu")


def test_learning_that_fails_leaves_the_names_free(tmp_path):
    base = model_of()
    references, bank = {"<Ab>": SUBJECTS[5].portrait(0), "<Cd>": SUBJECTS[4].portrait(1)}, portraits(SUBJECTS)
    learn(copy.deepcopy(base), references, bank, tmp_path / "a", LEARNING.replace(video_steps=0), device="cpu")
    before = state(base)

    def stop(stage, event):
        raise RuntimeError("the disk is full")

    failing = [
        # The run there is of both.
        ({"<Ab>": references["<Ab>"]}, tmp_path / "a", {"resume": True}, ConfigError, "cannot resume"),
        # The second name is none.
        ({**references, "Ef": references["<Ab>"]}, tmp_path / "b", {}, ConfigError, "'Ef'"),
        # In the middle of training: rows and names go, see `learn`.
        (references, tmp_path / "c", {"on_event": stop}, RuntimeError, "disk is full"),
    ]
    for number, (given, out, options, error, match) in enumerate(failing):
        with pytest.raises(error, match=match):
            learn(base, given, bank, out, LEARNING, device="cpu", **options)
        assert base.vocabulary.names == NAMES
        assert len(base.vocabulary) == len(before["decoder.embedding.weight"]) == base.decoder.config.vocab_size
        after = state(base)
        same = after if number < 2 else {name: after[name] for name in ("decoder.embedding.weight", "personal")}
        assert all(torch.equal(tensor, before[name]) for name, tensor in same.items())
    assert base.decoder.embedding.weight.requires_grad
    # Who calls again is not told that they are taken, and a run that was interrupted goes on.
    assert learn(base, references, bank, tmp_path / "a", LEARNING, device="cpu", resume=True).is_finished
    assert base.vocabulary.names == [*NAMES, "<Ab>", "<Cd>"]


def test_rates_are_relative(tmp_path):
    model = model_of()
    model.add_subject("<Ab>")
    made = OneShotSet(DATA, "<Ab>", SUBJECTS[5].portrait(0), portraits(SUBJECTS))
    questions = Questions.of([made.part("images")], model.vocabulary, 4, 48)
    task = ClipTask.Config(stage="images", names=("<Ab>",)).build(model=model, questions=questions)
    named = dict(model.named_parameters())
    found = {part: task.speed(name, named[name]) for name, part in task.parts.items()}
    assert {part: speed.factor for part, speed in found.items()} == {
        "personal": 1.0,
        "words": 1.0,
        "queries": 0.1,
        "router": 0.01,
        "lora": 0.1,
        "vision": 0.1,
        "upper_vision": 0.1,
        "projector": 0.1,
        "decoder": 1.0,
    }
    assert (found["personal"].weight_decay, found["words"].weight_decay, found["queries"].weight_decay) == (0, 0, None)
    learns = {part for name, part in task.parts.items() if task.learns(name, named[name])}
    assert learns == {"personal", "words", "queries", "router", "lora"}
    still = ClipTask.Config(stage="videos", names=("<Ab>",), rates=LEARNING.rates.replace(vision=0.0)).build(
        model=model, questions=questions
    )
    assert {part for name, part in still.parts.items() if still.learns(name, named[name])} == learns


def test_losses_of_heads_are_added(tmp_path):
    model = model_of()
    questions = questions_of(model)
    task = ClipTask.Config().build(model=model.train(), questions=questions)
    rows = torch.arange(2)
    batch = tuple(tensor[rows] for tensor in questions.tensors)
    found = task.step(model, batch, None)
    assert list(found.terms) == ["answers", "heads"]
    frame = questions.frame_CFCHW[questions.clip_N[rows]]
    _, nats = model(frame, *batch[1:])
    assert found.terms["answers"].item() == pytest.approx(nats.mean().item(), rel=1e-5)
    added = found.terms["answers"] + found.terms["heads"]
    assert found.total.item() == pytest.approx(added.item(), rel=1e-6)
    # By hand: minus the logarithm of the probability of each word of an answer, their mean.
    logits = model.eval()(frame, *batch[1:3])[0]
    words = [
        -math.log(logits[0, 0, place].softmax(-1)[word].item())
        for place, word in enumerate(batch[3][0, 0])
        if word >= 0
    ]
    assert model(frame, *batch[1:])[1][0, 0].item() == pytest.approx(sum(words) / len(words), rel=1e-4)


# Pretraining, and what is measured


def test_pretraining_learns(tmp_path):
    config = Pretraining(model=SMALL, clips=12, wordings=1, steps=20, batch_size=6, learning_rate=5e-3, held_out=6)
    losses = []
    model, result = pretrain(
        SUBJECTS[:5],
        tmp_path / "run",
        config,
        device="cpu",
        on_event=lambda stage, event: losses.append(event.values["loss"]) if event.kind == "step" else None,
    )
    assert result.status == "finished"
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert model.vocabulary.names == NAMES
    assert {"exact", "balanced", "yes_share", "kinds"} <= result.measures.keys()


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path):
    config = Pretraining(model=SMALL, clips=8, wordings=1, steps=4, batch_size=4, held_out=0)
    whole, _ = pretrain(SUBJECTS[:5], tmp_path / "whole", config, device="cpu")

    def stop(stage, event):
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    _, result = pretrain(SUBJECTS[:5], tmp_path / "parted", config, device="cpu", on_event=stop)
    assert (result.status, result.step) == ("interrupted", 2)
    parted, result = pretrain(SUBJECTS[:5], tmp_path / "parted", config, device="cpu", resume=True)
    assert (result.status, result.step) == ("finished", 4)
    assert all(torch.equal(tensor, parted.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(DataError, match="cannot resume"):
        pretrain(SUBJECTS[:5], tmp_path / "parted", config.replace(clips=10), device="cpu", resume=True)


def test_learning_goes_on_where_it_was(tmp_path):
    """As an interrupted process would: the images are done, the videos are not."""
    base = model_of()
    whole, parted = copy.deepcopy(base), copy.deepcopy(base)
    given = {"<Ab>": SUBJECTS[5].portrait(0)}, portraits(SUBJECTS)
    learn(whole, *given, tmp_path / "whole", LEARNING, device="cpu")
    learn(parted, *given, tmp_path / "parted", LEARNING.replace(video_steps=0), device="cpu")
    again = copy.deepcopy(base)
    learn(again, *given, tmp_path / "parted", LEARNING, device="cpu", resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_score_in_one_pass_is_that_of_answers_that_are_spoken():
    model = model_of()
    shown = Subject("s0", SUBJECTS[0].ink_NSS[1:])
    questions = exam(model, "<s0>", shown, portraits(SUBJECTS), clips=8, seed=3)
    found = measure(model, questions, batch_size=3)
    said_yes, right, of_kind = [], {kind: [] for kind in KINDS}, questions.kind_NK
    for row in range(len(questions)):
        clip = Clip(questions.frame_CFCHW[questions.clip_N[row]])
        for turn in range(of_kind.shape[1]):
            token, target = questions.token_NKL[row, turn], questions.target_NKL[row, turn]
            first = int((target != -100).long().argmax())
            text = model.vocabulary.decode(token[: first + 1].tolist())
            answer = model.ask(clip, text)
            wanted = model.vocabulary.decode(target[target != -100].tolist())
            kind = KINDS[int(of_kind[row, turn])]
            right[kind].append(answer == wanted)
            if kind == "existence":
                said_yes.append((says_yes(answer), bool(questions.present_N[row])))
    for kind in KINDS:
        assert found.kinds[kind].exact == pytest.approx(sum(right[kind]) / len(right[kind]))
        assert found.kinds[kind].count == 8
    assert found.yes_share == pytest.approx(sum(yes for yes, _ in said_yes) / 8)
    there = [yes for yes, present in said_yes if present]
    absent = [not yes for yes, present in said_yes if not present]
    assert found.balanced == pytest.approx((sum(there) / 4 + sum(absent) / 4) / 2)


def test_a_score_by_hand():
    right = torch.tensor([[True, False], [True, True], [False, True]])
    yes = torch.tensor([[True, False], [True, False], [False, False]])
    kinds = torch.tensor([[0, 1], [0, 1], [0, -1]])
    found = _score(right, yes, kinds, torch.tensor([True, False, False]))
    existence = found.kinds["existence"]
    assert (existence.exact, existence.present, existence.absent, existence.count) == (pytest.approx(2 / 3), 1, 0.5, 3)
    assert (found.kinds["appearance"].exact, found.kinds["appearance"].count) == (0.5, 2)
    assert found.balanced == pytest.approx((1 + 0.5) / 2)
    assert found.yes_share == pytest.approx(2 / 3)
    assert math.isnan(found.kinds["action"].exact)
    assert found.to_dict()["kinds"]["action"]["exact"] is None
    assert found.exact == pytest.approx((0.75 + 0.5) / 2)


def test_whoever_says_yes_to_all_is_at_chance():
    kinds = torch.zeros(8, 1, dtype=torch.long)
    present = torch.arange(8) < 4
    found = _score(present[:, None], torch.ones(8, 1, dtype=torch.bool), kinds, present)
    assert (found.balanced, found.yes_share) == (0.5, 1.0)


def test_an_exam_is_half_and_half():
    model = model_of()
    questions = exam(model, "<s0>", SUBJECTS[0], portraits(SUBJECTS), clips=12, seed=3)
    assert questions.present_N.sum() == 6
    same = exam(model, "<s0>", SUBJECTS[0], portraits(SUBJECTS), clips=12, seed=3)
    other = exam(model, "<s0>", SUBJECTS[0], portraits(SUBJECTS), clips=12, seed=4)
    assert questions.digest() == same.digest() != other.digest()
    for wrong in ({"clips": 3}, {"bank": ()}):
        with pytest.raises(ConfigError, match="an exam needs at least 4 clips and one other"):
            exam(model, "<s0>", SUBJECTS[0], **{"bank": portraits(SUBJECTS), **wrong})


def test_generic_clips_show_every_second_time_who_is_asked_about():
    parts = generic_part(SUBJECTS, 40, Composer(Composer.Config(frames=2)), wordings=1, seed=0)
    rows = [row for part in parts for row in part.rows if row.kind == "existence"]
    assert len(rows) == 40
    assert sum(row.present for row in rows) == 20
    with pytest.raises(DataError, match="3 subjects; clips of several need at least 4"):
        generic_part(SUBJECTS[:3], 4, Composer(), wordings=1, seed=0)


def test_what_cannot_be_learned(tmp_path):
    model = model_of()
    with pytest.raises(ConfigError, match="both 0; nothing would be learned"):
        Learning(image_steps=0, video_steps=0)
    with pytest.raises(ConfigError, match="names is empty"):
        ClipTask.Config(stage="images")
    with pytest.raises(ConfigError, match="pretraining learns all of them"):
        ClipTask.Config(names=("<a>",))
    with pytest.raises(ConfigError, match="needs a model and questions"):
        Trainer(TaskRunConfig(task=ClipTask.Config(), train=TrainConfig(device="cpu")), tmp_path / "r")
    with pytest.raises(InputError, match="no subject is named '<no>'"):
        ClipTask.Config(stage="images", names=("<no>",)).build(model=model, questions=questions_of(model))
    clips = Composed(Composer(Composer.Config(frames=4))).clips(portraits(SUBJECTS)[:1], 2, torch.Generator())
    from anabranch.heads.pvchat import Part, ask_all

    mixed = [clips[0], clips[1].first_frame()]
    rows = ask_all(mixed, "<s0>", "s0", KINDS, 1, torch.Generator())
    with pytest.raises(DataError, match=r"clips of \[1, 4\] frames"):
        Questions.of([Part("<s0>", mixed, rows)], model.vocabulary, 4, 48)
    with pytest.raises(DataError, match="no questions to learn from"):
        Questions.of([Part("<s0>", clips, [])], model.vocabulary, 4, 48)
    with pytest.raises(ConfigError, match="in the vocabulary already"):
        learn(model, {"<s0>": SUBJECTS[5].portrait(0)}, portraits(SUBJECTS), tmp_path / "x", LEARNING, device="cpu")
    assert not (tmp_path / "x").exists()
    (tmp_path / "y" / "images").mkdir(parents=True)
    (tmp_path / "y" / "images" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="already holds a run"):
        learn(model, {"<Ab>": SUBJECTS[5].portrait(0)}, portraits(SUBJECTS), tmp_path / "y", LEARNING, device="cpu")
    # Nothing of that has added anybody.
    assert model.vocabulary.names == NAMES
