"""Every method that `adapt` offers: a server does what its card says of rows of one batch with adapters of their own."""

import pytest
import torch

from adapter_models import make_base
from anabranch.adapters.adapt import Catalogued, method_named, method_names
from anabranch.adapters.catalogue import CARDS, apply
from anabranch.adapters.fusing import fuse_adapter
from anabranch.adapters.own_folder import write_own
from anabranch.errors import AnabranchError
from anabranch.lm import load_model
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from served_adapters import Runs, scores

# What fits a small model; all else as cards say.
SMALL = {
    "rank": 2,
    "width": 4,
    "number": 3,
    "size": 16,
    "tokens": 3,
    "reduction": 4,
    "drop": 1,
    "entries": 20,
    "block": 4,
    "group": 8,
    "vectors": 8,
    "length": 8,
    "hidden": 8,
}
# Methods without a card, whose adapters are routers that choose for each token.
OF_ROUTERS = {"dynmole", "lora_mixer"}
# Its gates stand beside an adapter of another method, and serve in a pool of such.
OF_A_POOL = {"gate"}
# Of these rows name a task.
BY_TASK = {"poly", "mhr"}
PROMPT, OTHER = tuple(range(3, 24)), tuple(range(30, 40))


def test_all_methods_are_looked_at():
    assert {name for name in method_names() if name not in CARDS} == OF_ROUTERS | OF_A_POOL


@pytest.mark.parametrize("name", sorted(set(method_names()) - OF_A_POOL))
def test_the_card_says_what_the_server_does(tmp_path, name):
    make_base(tmp_path / "base", "llama")
    card = CARDS.get(name)
    for seed in (1, 2):
        if card is not None and card.trains_base:
            # It writes no adapter, but a model.
            make_base(tmp_path / f"{seed}", "llama")
        else:
            write(tmp_path / f"{seed}", tmp_path / "base", name, seed)
    load = tuple(f"{seed}={tmp_path / str(seed)}" for seed in (1, 2))
    config = ServingConfig(num_blocks=100, block_tokens=4, dtype="float32", adapters=AdaptersConfig(load=load))
    model = load_model(tmp_path / "base")[0]
    if card is not None and card.mixed == "no":
        with pytest.raises(AnabranchError, match=r"adapters fuse|no folders of adapters|holds no") as told:
            Engine.of(model, config)
        if "adapters fuse" in str(told.value):
            # It is what helps; of SSF a matrix without a bias takes in no shift.
            fuse_adapter(model, tmp_path / "1", beside=name == "ssf")
            [answer] = Runs(Engine.of(model.eval(), config.replace(adapters=AdaptersConfig())))([(None, PROMPT)])
            assert len(answer.tokens) == 8
        else:
            assert card.trains_base
        return
    runs = Runs(Engine.of(model, config))
    more = {"task": "one"} if name in BY_TASK else {}
    asked = [("1", PROMPT), ("2", PROMPT), ("1", OTHER)]
    together = [scores(output) for output in runs(asked, **more)]
    alone = [scores(output) for one in asked for output in runs([one], **more)]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert together[0] != pytest.approx(together[1], abs=1e-2)


def write(folder, base, name, seed):
    """An adapter of a method whose numbers are drawn."""
    model = load_model(base)[0]
    method = config_of(name)
    if method is None:
        apply(model, name, rank=2, seed=seed)
    else:
        method = method.build()
        method.begin(model, ["one", "two"], seed=seed)
        method.look(model, (model(torch.tensor([PROMPT])).logits_BLV.square().mean() for _ in range(2)))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    if method is None:
        write_own(folder, model, base=str(base))
    else:
        method.write(folder, model, str(base))


def config_of(name):
    """Of a method as `adapt` has it; None for the one that it has in Python alone."""
    if name == "lt-sft":
        return None
    found = method_named(name)
    fields = type(found).__dataclass_fields__
    options = CARDS[name].options if isinstance(found, Catalogued.Config) else fields
    return found.replace(**{option: value for option, value in SMALL.items() if option in options and option in fields})
