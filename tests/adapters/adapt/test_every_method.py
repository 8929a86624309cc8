"""What is asked of every method that `adapt` trains, those that come too: the matrix of methods and of what users do with a model.

Each column is one test here, but for two that stand elsewhere: what was written does the same on another copy of the base
(test_fixed_base.py), and a server does what a card says (tests/serving/engine/test_serving_every_method.py).
"""

import copy
import functools
import itertools
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from anabranch.adapters.adapt import method_names
from anabranch.adapters.graft import layers_of
from anabranch.adapters.tasks import goes_by_task, on_tasks, task_rows
from anabranch.adapters.tuners import PeftTuner
from anabranch.adapters.use import use_of_tables
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.lm import SamplingConfig, generate, load_model
from anabranch.routing import record_routing
from anabranch.routing.discovery import find_routers
from anabranch.testing import check_task, run_ranks
from anabranch.train import Trainer, read_metrics
from anabranch.train.optimizer import full_tensor
from every_method import FOLDERS, TASKS, TOKENS, cases, drawn, make_place, method_of, name_of, run_of

CASES = cases()
RANKS = 2
WAYS = ["ddp", "fsdp"]
# Of losses in bfloat16. RandLoRA's scale is 20 in 1, and numbers that start as nothing go the sign of a gradient's way at first, whichever
# sign rounding leaves it.
ROUNDED = {"randlora": 6e-2}
# Of how far a tensor moved: the same numbers are summed in another order.
TOLERANCE = 3e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("every"))


def test_every_method_is_looked_at():
    assert {name_of(case) for case in CASES} == set(method_names())


# Training, and going on with it


@pytest.mark.parametrize("case", CASES)
def test_it_trains_and_goes_on_to_the_bit(place, case):
    check_task(run_of(case, place, held_out=0.25), ranks=False)


FROM_FOLDERS = [case for case in CASES if " from " in case]


@pytest.mark.parametrize("other", ["law", "law-bottleneck", "poly-start", "mhr-start", "dynmole-start", "base"])
@pytest.mark.parametrize("case", [case for case in FROM_FOLDERS if case.split()[-1] not in ("z", "random")])
def test_a_folder_of_another_kind_is_refused_in_a_line(place, tmp_path, case, other):
    """Whatever a user names to begin from: what it holds is said, or it is begun from."""
    given = FOLDERS[name_of(case)]
    run = run_of(case, place, steps=1)
    begun = {
        field: str(place / other) if isinstance(names, str) else (str(place / other), str(place / names[0]))
        for field, names in given.items()
    }
    run = run.replace(task=run.task.replace(method=run.task.method.replace(**begun)))
    said = ""
    try:
        Trainer(run, tmp_path / "run").close()
    except (ConfigError, CheckpointError) as error:
        said = str(error)
    own = [name for names in given.values() for name in ([names] if isinstance(names, str) else names)]
    assert other in said or (not said and other in (*own, *STARTS))
    assert "\n" not in said


STARTS = ("poly-start", "mhr-start")


@pytest.mark.parametrize("case", FROM_FOLDERS)
def test_a_run_goes_on_from_the_folders_that_it_began_from(place, tmp_path, case):
    """Copied to another place or with a note beside they are the same; with another number they are not, and a method that reads them
    again says so."""
    for name in {
        name for names in FOLDERS[name_of(case)].values() for name in ([names] if isinstance(names, str) else names)
    }:
        shutil.copytree(place / name, tmp_path / name)
    (tmp_path / "base").symlink_to(place / "base")
    (tmp_path / "rows.jsonl").write_bytes((place / "rows.jsonl").read_bytes())
    first = Trainer(run_of(case, tmp_path, steps=1), tmp_path / "run")
    first.fit()
    changed = tmp_path / next(iter(name for name in os.listdir(tmp_path) if name not in ("base", "rows.jsonl", "run")))
    (changed / "README.md").write_text("a note")
    table = next(changed / name for name in ("adapter_config.json", "adapter.json") if (changed / name).exists())
    table.write_text(json.dumps(json.loads(table.read_text()), indent=7))
    (changed / "adapter_model.bin").write_text("nobody reads this")
    assert Trainer(run_of(case, tmp_path, steps=2), tmp_path / "run", resume=True).fit().step == 2
    weights = next(path for path in changed.iterdir() if path.suffix == ".safetensors")
    tensors = load_file(weights)
    name = min(name for name, value in tensors.items() if value.numel())
    save_file({**tensors, name: tensors[name] * 3}, weights, {"format": "pt"})
    says = pytest.raises(DataError, match=r"method\.\w+ names adapters with other numbers")
    with says if first.task.method.began_from() else nullcontext():
        assert Trainer(run_of(case, tmp_path, steps=3), tmp_path / "run", resume=True).fit().step == 3


# Two processes


@pytest.fixture(scope="module", params=WAYS)
def taught(place, tmp_path_factory, request):
    """A folder with what two processes have learned, one pair of them for all cases, as starting them takes longer."""
    out = tmp_path_factory.mktemp(request.param)
    run_ranks(_learn, RANKS, str(place), str(out), request.param, backend=None, timeout_s=1800)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_teach_what_one_does(place, taught, tmp_path, case):
    """Each with half of the batch: to rounding what one learns of both halves, and of the whole where the method does not say why not."""
    ours, theirs = (load_file(taught / f"{CASES.index(case)}-{rank}.safetensors") for rank in range(RANKS))
    assert ours.keys() == theirs.keys()
    if not ours:
        pytest.skip(f"{case} says that it cannot be spread over processes")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    begun, halves = learned(case, place, tmp_path / "halves", accumulation=RANKS)
    assert difference(ours, halves, begun) is None
    begun, whole = learned(case, place, tmp_path / "whole")
    # A reason that is none any more is taken out.
    why, told = method_of(case, place).build().parts_differ, difference(ours, whole, begun)
    assert bool(told) == bool(why), told or why


def _learn(rank, world, place, out, way):
    dist.init_process_group("gloo")
    for number, case in enumerate(CASES):
        try:
            _, found = learned(case, Path(place), Path(out) / f"{way}-{number}", first=rank, every=world, parallel=way)
        except Exception as error:
            if way == "fsdp" and "learns numbers that blocks share" in str(error):
                save_file({}, Path(out) / f"{number}-{rank}.safetensors")
                continue
            raise RuntimeError(f"{case} under {way}: {error}") from error
        save_file(found, Path(out) / f"{number}-{rank}.safetensors")


def learned(case, place, out, *, first=0, every=1, **train):
    """All that an adapter is, before and after a training, in which a half of a batch draws the same in whichever process it is."""
    trainer = Trainer(run_of(case, place, steps=3, **train), out)
    numbers = itertools.count(first, every)
    trainer.model.register_forward_pre_hook(lambda *_: torch.manual_seed(next(numbers)) and None)
    begun = _state(trainer)
    trainer.fit()
    return begun, _state(trainer)


def _state(trainer):
    names = set(trainer.task.method.kept(trainer.model.decoder))
    state = trainer.model.decoder.state_dict()
    return {name: full_tensor(value.detach()).clone().contiguous() for name, value in state.items() if name in names}


def difference(found, wanted, begun):
    """The tensor that differs most, over how far it moved; None where none does."""
    assert found.keys() == wanted.keys()
    moved = {name: (wanted[name].double() - begun[name].double()).abs().max() for name in wanted}
    assert any(moved.values())
    apart = {
        name: float((value.double() - wanted[name].double()).abs().max() / moved[name].clamp_min(1e-6))
        for name, value in found.items()
    }
    worst = max(apart, key=apart.get)
    return f"{worst} differs by {apart[worst]:.1g} of how far it moved" if apart[worst] > TOLERANCE else None


# What is done with an adapted model


@pytest.fixture(scope="module")
def adapted(place):
    """By case: a model with the method's layers on it, whose numbers are drawn."""

    @functools.cache
    def made(case):
        model, _ = load_model(place / "base")
        method = method_of(case, place).build()
        method.begin(model, TASKS, seed=0)
        method.look(model, (model(TOKENS).logits_BLV.square().mean() for _ in range(2)))
        return drawn(model, 1).eval()

    return made


def told(model, *tasks):
    return on_tasks(model, tasks) if goes_by_task(model) else nullcontext()


@pytest.mark.parametrize("case", CASES)
def test_generated_with_a_cache_it_is_what_whole_passes_say(adapted, case):
    """Prompts of other lengths side by side, each by its own task; each token by a pass over all before it."""
    model, prompts = adapted(case), [[3, 17, 60, 8], [5, 22]]
    with told(model, *TASKS):
        made = generate(model, prompts, SamplingConfig(max_tokens=5, temperature=0))
    for prompt, tokens, task in zip(prompts, made, TASKS, strict=True):
        assert len(tokens) == 5
        with torch.no_grad(), told(model, task):
            logits_LV = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits_BLV[0, len(prompt) - 1 :]
        best_L = logits_LV.amax(-1)
        torch.testing.assert_close(
            logits_LV.gather(1, torch.tensor(tokens)[:, None])[:, 0], best_L, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("case", CASES)
def test_who_chose_what_is_recorded(adapted, case):
    """Of each router beside matrices by token, and off the tables of what goes by task; what chooses nothing says so."""
    model = adapted(case)
    with torch.no_grad(), told(model, *TASKS):
        wanted = model(TOKENS).logits_BLV
    routers = find_routers(model)
    if routers:
        with torch.no_grad(), told(model, *TASKS), record_routing(model) as recorder:
            assert torch.equal(model(TOKENS).logits_BLV, wanted)
        trace = recorder.trace()
        assert {layer.name for layer in trace.layers} == set(routers)
        for layer in trace.layers:
            assert set(trace.decisions(layer.layer).item_N.tolist()) == {0, 1}
        return
    with pytest.raises(ConfigError, match="has no Router to record"), record_routing(model):
        pass
    if goes_by_task(model):
        use = use_of_tables(model)
        assert use.tasks == TASKS
        assert use.share_TE.sum(1) == pytest.approx([1.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_into_one_graph_it_has_the_same_gradients(adapted, case):
    torch.compiler.reset()
    plain, compiled = (copy.deepcopy(adapted(case)).train() for _ in range(2))
    wanted = gradients(plain, plain)
    # What peft computes is called between the parts of a compiled model.
    is_ours = not any(isinstance(layer, PeftTuner) for layer in layers_of(compiled).values())
    found = gradients(compiled, torch.compile(compiled, fullgraph=is_ours, backend="eager"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= 1e-3 * float(value.abs().max()), name


def gradients(model, call):
    torch.manual_seed(0)
    state = task_rows(model, list(TASKS), TOKENS.shape[1]) if goes_by_task(model) else None
    call(TOKENS, TOKENS.roll(-1, 1), state=state).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16_it_learns_as_in_float32(place, tmp_path, case, dtype):
    """By autocast over a base as it is stored, and beside one in bfloat16, where the adapter stays in float32."""
    found = []
    for precision in ("float32", "bfloat16"):
        half = dtype if precision == "bfloat16" else None
        trainer = Trainer(run_of(case, place, steps=2, precision=precision, dtype=half), tmp_path / precision)
        result = trainer.fit()
        assert (result.status, result.skipped_steps) == ("finished", 0)
        found.append([record["loss"] for record in read_metrics(trainer.out)])
        if not trainer.task.method.trains_base:
            learns = {one.dtype for one in trainer.model.parameters() if one.requires_grad}
            assert learns == {torch.float32}
    assert found[1] == pytest.approx(found[0], rel=ROUNDED.get(case, 1e-2))
