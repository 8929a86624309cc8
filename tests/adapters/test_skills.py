"""`SkilledLowRank`, Poly: tasks of rows, and how skills are mixed; what it computes is in test_kinds too."""

import pytest
import torch
from safetensors.torch import load_file

from adapter_kinds import close, opened, put_on, tasks_for
from adapter_models import CONFIGS, TASKS, TOKENS, drawn, linear_layers, logits, make_base, make_kind, with_deltas
from anabranch.adapters import load_peft, save_peft
from anabranch.adapters.skills import SkilledLowRank
from anabranch.adapters.tasks import on_tasks, told_tasks
from anabranch.errors import ConfigError, InputError
from anabranch.lm import load_model
from anabranch.nn import BuildContext


def test_each_row_has_its_task(places):
    model = load_peft(places["llama"][0] / "poly", opened(places))
    alone = [logits(put_on_task(places, task)) for task in range(TASKS)]
    with torch.no_grad():
        found = model(TOKENS, state=tasks_for(model, [2, 0], 6)).logits_BLV
        cache = model.new_cache(6)
        parts = [model(TOKENS[:, i : i + 3], cache=cache, state=tasks_for(model, [2, 0], 3)).logits_BLV for i in (0, 3)]
    close(found, torch.stack((alone[2][0], alone[0][1])))
    close(torch.cat(parts, dim=1), found)
    assert (alone[0] - alone[1]).abs().max() > 0.01


def test_tasks_are_told_by_name_to_what_knows_of_none(places):
    model = load_peft(places["llama"][0] / "poly", opened(places))
    with on_tasks(model, "1"):
        close(logits(model), logits(put_on_task(places, 1)), 1e-6)


def put_on_task(places, task):
    return load_peft(places["llama"][0] / "poly", opened(places), task=task)


def test_tasks_that_cannot_be_are_told(places):
    folder = places["llama"][0] / "poly"
    model = load_peft(folder, opened(places))
    with pytest.raises(
        InputError, match=r"the adapter has 3 tasks, and no row says which .* or load the adapter with a task"
    ):
        logits(model)
    for task in (3, -1):
        with pytest.raises(InputError, match=rf"task '{task}' is not one of the 3 that the model was trained for"):
            tasks_for(model, [task, 0], 6)
        with pytest.raises(InputError, match=rf"task {task} is told; the adapter has 0 to 2"):
            model(TOKENS, state=told_tasks(torch.tensor([task, 0]), 6))
    for tasks, length in (([0, 1, 2], 4), ([0], 6)):
        with pytest.raises(InputError, match=r"tasks are told of \[\d, \d\] rows and tokens in a pass of \[2, 6\]"):
            model(TOKENS, state=tasks_for(model, tasks, length))
    for task in (3, -1):
        with pytest.raises(ConfigError, match=f"task is {task}; .* has 0 to 2"):
            load_peft(folder, opened(places), task=task)
    with pytest.raises(ConfigError, match=r"task is 0, and .* is IA3, which has no tasks; leave it out"):
        load_peft(places["llama"][0] / "ia3", opened(places), task=0)
    with pytest.raises(ConfigError, match="no layer of the model routes by task"):
        tasks_for(put_on(places, "dora"), [0, 0], 6)


def test_skills_of_gathered_items_are_those_of_their_rows():
    """Experts get items of several rows; each is mixed by the task of its own."""
    config = CONFIGS["olmoe"]().replace(
        linears={"*.experts.*.down": SkilledLowRank.Config(rank=2, num_tasks=2, num_skills=3, num_splits=2)}
    )
    model = config.build(seed=0).eval()
    for name, parameter in model.named_parameters():
        if ".b" in name or name.endswith("logits"):
            parameter.data.copy_(drawn(name, parameter.shape) * 3)
    with torch.no_grad():
        together = model(TOKENS, state=told_tasks(torch.tensor([1, 0]), 6)).logits_BLV
        rows = [
            model(TOKENS[row : row + 1], state=told_tasks(torch.tensor([task]), 6)).logits_BLV
            for row, task in enumerate([1, 0])
        ]
        same = model(TOKENS, state=told_tasks(torch.tensor([0, 0]), 6)).logits_BLV
    close(together, torch.cat(rows))
    assert not torch.allclose(together[0], same[0], atol=1e-4)


def test_skills_are_drawn_anew_while_they_learn(places):
    """Relaxed Bernoulli: about as much of each on average as in evaluation, for each row apart."""
    layer = SkilledLowRank.Config(num_tasks=2, num_skills=4).build(*alone())
    layer.logits.data.copy_(drawn("logits", (2, 4)))
    torch.manual_seed(0)
    drawn_w = layer.train().weights(torch.zeros(4000, dtype=torch.int64))
    assert drawn_w.unique(dim=0).shape[0] == 4000
    close(drawn_w.sum(-1), torch.ones(4000, 1))
    still = layer.eval().weights(torch.zeros(1, dtype=torch.int64))
    assert (drawn_w.mean(0) - still[0]).abs().max() < 0.05


def alone():
    context = BuildContext(8)
    return context.projection("a", 8, 8), context


@pytest.mark.parametrize("piece", [2, 4])
def test_latents_in_a_cache_have_a_matrix_for_each_task(piece):
    config = CONFIGS["deepseek_v2"]().replace(linears={"*.kv_up": SkilledLowRank.Config(rank=2, num_tasks=3)})
    model = config.build(seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".beside." in name:
                parameter.copy_(drawn(name, parameter.shape))
        whole, cache = model(TOKENS, state=tasks_for(model, [2, 0], 6)).logits_BLV, model.new_cache(6)
        for start in range(0, 6, piece):
            part = TOKENS[:, start : start + piece]
            found = model(part, cache=cache, state=tasks_for(model, [2, 0], part.shape[1])).logits_BLV
            torch.testing.assert_close(found, whole[:, start : start + piece], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0, 3:], whole[1, 3:])


def test_splits_that_do_not_divide_are_refused():
    context = BuildContext(8)
    with pytest.raises(ConfigError, match="num_splits is 3, which does not divide the 8 inputs of a"):
        SkilledLowRank.Config(num_splits=3).build(context.projection("a", 8, 9), context)
    with pytest.raises(ConfigError, match="num_splits is 2, which does not divide the 9 outputs of a"):
        SkilledLowRank.Config(num_splits=2).build(context.projection("a", 8, 9), context)
    with pytest.raises(ConfigError, match="task is 2; there are 0 to 1"):
        SkilledLowRank.Config(num_tasks=2, task=2)


@pytest.mark.parametrize("splits", [1, 2])
def test_outputs_that_stand_in_another_order(splits, tmp_path):
    """Rows of some matrices of DeepSeek-V2 do here: of one split the order is followed; several are of rows next to each other."""
    base = make_base(tmp_path / "base", "deepseek_v2")
    words = ["q_b_proj", "o_proj"]
    made = make_kind(tmp_path / "a", "poly", base, "deepseek_v2", words=words, splits=splits)
    model = load_model(tmp_path / "base")[0].eval()
    before = logits(model)
    if splits > 1:
        with pytest.raises(
            ConfigError, match="in another order here than in transformers, and 2 splits of them cannot"
        ):
            load_peft(tmp_path / "a", model)
        assert torch.equal(logits(model), before)
        assert all(parameter.requires_grad for parameter in model.parameters())
        return
    deltas = {}
    for module in linear_layers(base, words):
        a, b, mixed = (made[f"base_model.model.{module}.{name}"] for name in ENDINGS)
        weight = mixed[1].sigmoid() / mixed[1].sigmoid().sum()
        a_CR, b_RO = torch.einsum("k,kcr->cr", weight, a[0]), torch.einsum("k,kro->ro", weight, b[0])
        deltas[f"base_model.model.{module}.lora_A.weight"] = a_CR.T
        deltas[f"base_model.model.{module}.lora_B.weight"] = b_RO.T / 3
    scales = dict.fromkeys(linear_layers(base, words), 1.0)
    wanted = load_model(with_deltas(tmp_path / "changed", tmp_path / "base", base, deltas, scales))[0]
    load_peft(tmp_path / "a", model, task=1)
    close(logits(model), logits(wanted))
    save_peft(tmp_path / "copy", model)
    copy = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert all(torch.equal(copy[name], made[name]) for name in made)


ENDINGS = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
