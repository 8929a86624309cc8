"""``anabranch adapters gates``: which rows of a file an adapter's gates are of."""

import json

import pytest
import torch

from anabranch.adapters import save_peft
from anabranch.adapters.catalogue import apply
from anabranch.adapters.glider.folder import read_described
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, export_huggingface, load_model
from anabranch.nn import SelfAttention, SwiGLU

CONFIG = Decoder.Config(
    vocab_size=257,
    dim=16,
    num_layers=1,
    attention=SelfAttention.Config(num_heads=2),
    feed_forward=SwiGLU.Config(hidden_dim=24),
    max_positions=64,
)
ROWS = [
    {"task": task, "input": f"{task} {number}", "output": word}
    for number, word in enumerate(("ab", "cde", "fghi", "jk"))
    for task in ("one", "two")
]


@pytest.fixture
def gates_of(here, tmp_path):
    """The gates of a new adapter, from such rows with such options."""
    export_huggingface(tmp_path / "base", CONFIG.build(seed=1), ByteTokenizer.Config().build(), family="llama")

    def of(rows, *options):
        adapter = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        model, _ = load_model(tmp_path / "base")
        apply(model, "lora", rank=2)
        save_peft(adapter, model, family="llama")
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        code, out, err = here(
            "adapters", "gates", adapter, "--model", tmp_path / "base", "--data", data, "--json", *options
        )
        assert code == 0, err
        return json.loads(out)["rows"], read_described(adapter).gates

    return of


@pytest.mark.parametrize("task", [None, "one", "two"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_first_rows_of_the_task_make_them_wherever_these_stand(gates_of, task, rows):
    own = [row for row in ROWS if task in (None, row["task"])][:rows]
    options = [] if task is None else ["--task", task]
    used, found = gates_of(ROWS, *options, "--rows", rows)
    wanted = gates_of(own)[1]
    assert used == len(own)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
