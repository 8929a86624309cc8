"""Every method of `anabranch adapt`, on a small model: those of the registry, so that one that comes is looked at by each contract at once.

What cannot be asked of a method it says itself (`Method.draws`, `Method.needs_task`, its card); no test knows methods by name. Known here
is alone what they begin from, where that is a folder.
"""

import json
from typing import get_args, get_type_hints

import torch

from anabranch.adapters import save_peft
from anabranch.adapters.adapt import AdaptTask, Catalogued, method_named, method_names
from anabranch.adapters.catalogue import CARDS, apply
from anabranch.adapters.own_folder import write_own
from anabranch.data import ByteTokenizer
from anabranch.errors import ConfigError
from anabranch.lm import Decoder, export_huggingface, load_model
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.train import Constant, TaskRunConfig, TrainConfig

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=32,
    num_layers=2,
    # Some methods move biases.
    attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, qkv_bias=True),
    feed_forward=SwiGLU.Config(hidden_dim=48),
    max_positions=64,
    # Its head is not learned, and must be able to say something.
    init_std=0.2,
)
# What fits it, by the names of options; all else is as it comes.
SMALL = {
    "rank": 2,
    "width": 4,
    "number": 3,
    "experts": 3,
    "skills": 2,
    "heads": 2,
    "top_k": 1,
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
TASKS = ("back", "up")
TOKENS = torch.tensor([[3, 17, 60, 8, 90, 41, 7, 1], [0, 5, 22, 1, 59, 30, 2, 2]])
# What methods begin from: the names of folders of `make_place`, by those that may.
FOLDERS = {
    "gate": {"adapter": "law"},
    "lora_mixer": {"adapters": ("law", "sql")},
    "adapter-fusion": {"adapters": ("law-bottleneck", "sql-bottleneck")},
    "poly": {"start": "poly-start"},
    "mhr": {"start": "mhr-start"},
}


def make_place(root):
    """A model that reads bytes, adapters to begin from, and rows of two tasks, in ``root``."""
    export_huggingface(root / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build(), family="qwen2")
    for seed, name in enumerate(("law", "sql")):
        made, _ = load_model(root / "base")
        apply(made, "lora", rank=2, targets=("q", "v"), seed=seed)
        save_peft(root / name, drawn(made, seed), family="qwen2")
        made, _ = load_model(root / "base")
        apply(made, "adapter-pfeiffer", width=3, seed=seed)
        write_own(root / f"{name}-bottleneck", drawn(made, seed))
    for name in ("poly", "mhr"):
        made, _ = load_model(root / "base")
        _small(name).build().begin(made, ["one", "two"], seed=3)
        write_own(root / f"{name}-start", drawn(made, 3))
    made, _ = load_model(root / "base")
    _small("dynmole").build().begin(made, [], seed=3)
    write_own(root / "dynmole-start", drawn(made, 3))
    words = ["ab", "cde", "fghi", "jk", "lmnop", "q", "rst", "uv"]
    rows = [
        {"task": task, "input": word, "output": word[::-1] if task == "back" else word.upper()}
        for word in words
        for task in TASKS
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def cases():
    """Names of methods, each with what it may begin from, and when labels choose: ``mhr``, ``mhr from z``, ``lora_mixer in anneal``, ..."""
    found = []
    for name in method_names():
        method = method_named(name).owner
        found += [f"{name} in {stages}" for stages in _choices(method, "stages")[1:]]
        assert set(FOLDERS.get(name, {})) == set(method.folders), (
            f"{name} may begin from {method.folders}: make such a folder"
        )
        if not method.folders:
            found.append(name)
            continue
        if _begins_alone(name):
            found.append(name)
        found += [f"{name} from {mode}" for mode in _choices(method, "mode") or method.folders]
    return found


def _choices(method, field):
    """What a field of its config may be, the usual first; none where it has no such field."""
    return get_args(get_type_hints(method.Config).get(field))


def name_of(case):
    """The method of one of `cases`."""
    return case.partition(" from ")[0].partition(" in ")[0]


def method_of(case, place):
    """The config of one of `cases`."""
    name, begun, stages = name_of(case), case.partition(" from ")[2], case.partition(" in ")[2]
    if not begun:
        return _small(name).replace(**({"stages": stages} if stages else {}))
    told = {
        field: tuple(str(place / one) for one in folder) if isinstance(folder, tuple) else str(place / folder)
        for field, folder in FOLDERS[name].items()
    }
    # What is given has sizes of its own.
    usual = method_named(name)
    own = {field: getattr(usual, field) for field in ("experts", "rank") if name == "lora_mixer"}
    return _small(name).replace(**told, **own, **({} if begun in told else {"mode": begun}))


def run_of(case, place, *, dtype=None, held_out=0.0, **train):
    """A short training of one of `cases`."""
    task = AdaptTask.Config(
        model=str(place / "base"),
        data=str(place / "rows.jsonl"),
        method=method_of(case, place),
        held_out=held_out,
        dtype=dtype,
    )
    usual = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "eval_every": None,
        "checkpoint_every": None,
        "log_every": 1,
        "device": "cpu",
        "schedule": Constant.Config(),
    }
    return TaskRunConfig(task=task, train=TrainConfig(**(usual | train)))


def _small(name):
    found = method_named(name)
    fields = type(found).__dataclass_fields__
    options = CARDS[name].options if isinstance(found, Catalogued.Config) else fields
    return found.replace(**{option: value for option, value in SMALL.items() if option in options and option in fields})


def _begins_alone(name):
    """Whether it needs no folder."""
    try:
        _small(name).build().begin(CONFIG.build(), TASKS, seed=0)
    except ConfigError:
        return False
    return True


def drawn(model, seed):
    """The model, with other numbers in what learns."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model
