"""The arm of a state space in the study of LoRA-Mixer: what is counted right, and that it is whole from words to claims."""

import copy
import math

import pytest
import torch

from anabranch import extras
from anabranch.adapters import load_mixture
from anabranch.data import ByteTokenizer
from anabranch.errors import MissingExtraError
from anabranch.studies import lora_mixer_ssm
from anabranch.studies.adapter_bench import LEARNED, BenchSize, bench_words, name_of
from anabranch.studies.lora_mixer import Size, make, run
from anabranch.studies.lora_mixer_ssm import (
    IGNORED,
    TARGETS,
    StateSpaceSize,
    accuracy,
    labelled,
    state_space,
    trained_expert,
    with_adapter,
)

pytest.importorskip("transformers")
SPACE = StateSpaceSize(dim=16, state=4, base_steps=2, base_batch=4, expert_steps=2, router_steps=2, batch_size=4)
SIZE = Size(ssm=SPACE, rank=2)
PAIRS = LEARNED[:2]
WORDS = bench_words(BenchSize(words_learned=20, words_measured=6))[0]


def rows_of(pair):
    return labelled([pair], WORDS, per_task=3, seed=0)


def answers(model, rows):
    """Ids that greedy decoding gives after each prompt, by the model alone, one row at a time and without padding."""
    found = []
    for token_L, target_L, mask_L in zip(rows.token_NL, rows.target_NL, rows.mask_NL, strict=True):
        asked = target_L != IGNORED
        prompt = token_L[mask_L & (torch.cumsum(asked, 0) <= 1)]
        made = model.generate(prompt[None], max_new_tokens=int(asked.sum()), do_sample=False, eos_token_id=-1)
        found.append(made[0, len(prompt) :].tolist())
    return found


def test_what_is_right_is_what_greedy_decoding_gives(tmp_path):
    rows = labelled(PAIRS, WORDS, per_task=3, seed=0)
    experts = {
        name_of(pair): trained_expert(state_space(SPACE), rows_of(pair), tmp_path / str(number), SIZE, seed=number)
        for number, pair in enumerate(PAIRS)
    }
    model = load_mixture(experts, state_space(SPACE), top_k=1)
    assert accuracy(model, rows) == 0.0
    # A row whose answer is what the mixture says is right; another is not.
    target_NL = rows.target_NL.clone()
    target_NL[2][target_NL[2] != IGNORED] = torch.tensor(answers(model, rows)[2])
    token_NL = rows.token_NL.clone()
    asked = (target_NL[2] != IGNORED).nonzero().flatten()
    token_NL[2, asked[1:]] = target_NL[2, asked[:-1]]
    said = type(rows)(token_NL, target_NL, rows.expert_N, rows.mask_NL)
    assert accuracy(model, said) == pytest.approx(1 / 6)


def test_the_oracle_is_each_expert_in_the_matrices(tmp_path):
    rows = labelled(PAIRS, WORDS, per_task=2, seed=0)
    base = state_space(SPACE)
    folders = [
        trained_expert(base, rows_of(pair), tmp_path / str(number), SIZE, seed=number)
        for number, pair in enumerate(PAIRS)
    ]
    mixture = load_mixture(dict(zip("ab", folders, strict=True)), copy.deepcopy(base))
    for number, folder in enumerate(folders):
        plain = with_adapter(base, folder)
        own = rows.expert_N == number
        token_BL, mask_BL = rows.token_NL[own], rows.mask_NL[own]
        with torch.no_grad():
            wanted = plain(input_ids=token_BL, attention_mask=mask_BL.long(), use_cache=False).logits
            labels = lora_mixer_ssm.labelled_rows(rows.expert_N[own], token_BL.shape[1])
            with lora_mixer_ssm.passing(mixture, mask_BL=mask_BL, labels=labels):
                found = mixture(input_ids=token_BL, attention_mask=mask_BL.long(), use_cache=False).logits
        torch.testing.assert_close(found[mask_BL], wanted[mask_BL], rtol=1e-4, atol=1e-5)
    adapted = {name.rpartition(".")[2] for name in lora_mixer_ssm.read_peft(folders[0]).pairs}
    assert adapted == set(TARGETS)


def test_rows_are_of_the_bench():
    rows = labelled(PAIRS, WORDS, per_task=2, seed=0)
    tokenizer = ByteTokenizer.Config().build()
    assert rows.expert_N.tolist() == [0, 0, 1, 1]
    first = rows.target_NL[0]
    assert first[first != IGNORED].tolist()[-1] == tokenizer.eos_id
    text = tokenizer.decode(rows.token_NL[0][rows.mask_NL[0]].tolist())
    assert text.startswith(f"{name_of(PAIRS[0])}: ")


def test_without_transformers_it_is_said_what_to_install(monkeypatch):
    here = extras.is_installed
    monkeypatch.setattr(extras, "is_installed", lambda module: module != "transformers" and here(module))
    with pytest.raises(
        MissingExtraError, match=r"the arm ssm of the study needs transformers; pip install 'anabranch\[huggingface\]'"
    ):
        state_space(SPACE)


@pytest.mark.slow
def test_the_quick_form_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    config = next(arm.config for arm in make().arms if arm.name == "ssm")
    found = run(config, 0, lambda text: None)
    assert set(found) == {"accuracy", "oracle", "uniform", "nats", "evenness"}
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["evenness"] <= 1
    # The base is kept, and gives the same numbers.
    assert run(config, 0, lambda text: None) == found
