"""What skipping costs, told without looking ahead; baselines at as much work; the redundancy matrix; and the file."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from anabranch.depth.ftp import (
    FactorConfig,
    RouterConfig,
    TokenRouter,
    TokenSkipper,
    compare,
    equal_work_path,
    evaluate,
    evaluate_items,
    evaluate_path,
    evaluate_truncated,
    perplexity,
    redundancy_report,
)
from anabranch.depth.influence import block_influence
from anabranch.depth.stack import run_path, stack_of
from anabranch.errors import CheckpointError, ConfigError, DataError, InputError, NotFiniteError
from damage import damaged, each, refuse_or_read
from skipped_models import BLOCKS, decoder, items, tokens
from skipped_models import router as undecided

SCHEDULE = (0.0, 0.4, 0.6, 0.3, 0.2)


def skipper_of(router=None, **options):
    return TokenSkipper(decoder(), SCHEDULE, router or undecided(), **options)


def nats_of(logits_LV, target):
    return float(F.cross_entropy(logits_LV.detach(), torch.tensor(target), reduction="sum"))


# Likelihoods


def test_nothing_skipped_is_the_dense_likelihood():
    model, data = decoder(), items()
    found = evaluate_items(TokenSkipper(model, [0.0] * BLOCKS), data)
    dense = evaluate_path(stack_of(model), data)
    expected = 0.0
    for prompt, continuation in data:
        logits = model(torch.tensor([prompt + continuation])).logits_BLV[0]
        expected += nats_of(logits[len(prompt) - 1 : -1], continuation)
    assert (found.nats, dense.nats) == (pytest.approx(expected, rel=1e-5), pytest.approx(expected, rel=1e-5))
    assert found.tokens == dense.tokens == 12
    assert (found.saved, dense.saved, found.work) == (0, 0, dense.work)
    assert found.agreement(dense) == 1
    assert sum(value * 4 for value in found.item_nats) == pytest.approx(found.nats)


@pytest.mark.parametrize("kv", ["drop", "keep"])
def test_a_continuation_is_measured_as_it_would_be_decoded(kv):
    skipper, (prompt, continuation) = skipper_of(kv=kv), items(1)[0]
    found = evaluate(skipper, prompt, continuation)
    prefilled = skipper.prefill(prompt)
    rows, logits = [], prefilled.logits_BV
    for token in continuation:
        rows.append(logits[0])
        logits = skipper.decode([[token]], prefilled)[:, -1]
    assert found.nats == pytest.approx(nats_of(torch.stack(rows), continuation), rel=1e-5)
    assert found.following == (int(rows[0].argmax()),)
    one = evaluate(skipper, prompt, continuation[:1])
    assert one.nats == pytest.approx(nats_of(rows[0][None], continuation[:1]), rel=1e-5)
    assert one.report.decoded == 0
    assert found.report.decoded == 3
    assert found.work == sum(found.report.work)


def test_what_comes_later_changes_nothing_that_was_decided():
    """The causality rule: of two continuations with a common beginning, that beginning is measured alike."""
    skipper, prompt = skipper_of(), tokens(1, 12)[0].tolist()
    first, second = [3, 4, 5], [3, 4, 9, 9, 1]
    found = [evaluate(skipper, prompt, [*row]) for row in (first, second)]
    assert found[0].report.skipped == found[1].report.skipped
    short = [evaluate(skipper, prompt, row[:2]).nats for row in (first, second)]
    assert short[0] == short[1]


def test_pruned_text_has_a_perplexity_only_where_nothing_looks_ahead():
    text = tokens(1, 14)
    for skipper in (
        skipper_of(),
        skipper_of("static"),
        skipper_of("random"),
        skipper_of(mode="threshold"),
        skipper_of(factors=FactorConfig(causal=True)),
        TokenSkipper(decoder(), SCHEDULE, TokenRouter(RouterConfig(inputs="hidden", dim=32))),
    ):
        with pytest.raises(ConfigError, match="would leak its future"):
            perplexity(skipper, text)
    model = decoder()
    for schedule in ([0.0] * BLOCKS, [0.0, 1.0, 0.0, 0.0, 1.0]):
        found = math.log(perplexity(TokenSkipper(model, schedule), text))
        path = [layer for layer, one in enumerate(schedule) if not one]
        with torch.no_grad():
            logits = run_path(stack_of(model), text[:, :-1], path)
        assert found == pytest.approx(float(F.cross_entropy(logits[0], text[0, 1:])), rel=1e-5)


@pytest.mark.parametrize("config", [None, RouterConfig(inputs="hidden", dim=32)])
def test_causal_decisions_do_not_know_later_tokens(config):
    skipper = TokenSkipper(
        decoder(),
        SCHEDULE,
        undecided(config=config),
        mode="threshold",
        factors=FactorConfig(causal=True, positions=20),
    )
    text, other = tokens(1, 16), tokens(1, 16)
    other[0, 10:] = (other[0, 10:] + 7) % 31
    one, two = skipper.prefill(text), skipper.prefill(other)
    assert torch.equal(one.keep_IBL[:, :, :10], two.keep_IBL[:, :, :10])
    torch.testing.assert_close(skipper.uncached(one)[:, :10], skipper.uncached(two)[:, :10], rtol=1e-4, atol=1e-5)
    assert not one.keep_IBL.all()
    # Piece by piece it is what it is at once.
    nats = [nats_of(skipper.prefill(text[:, :end]).logits_BV, [int(text[0, end])]) for end in range(1, 16)]
    if config is None or config.inputs == "factors":
        assert math.log(perplexity(skipper, text)) == pytest.approx(sum(nats) / 15, rel=1e-4)


def test_truncation_is_the_dense_model_on_the_shorter_prompt():
    stack, (prompt, continuation) = stack_of(decoder()), items(1)[0]
    found = evaluate_truncated(stack, [(prompt, continuation)], 0.3)
    shorter = evaluate_path(stack, [(prompt[:1] + prompt[4:], continuation)])
    assert (found.nats, found.work) == (shorter.nats, shorter.work)
    assert found.dense == evaluate_path(stack, [(prompt, continuation)]).dense > found.work
    # With all blocks alike, static skipping is truncation but for the places of tokens.
    assert evaluate_truncated(stack, [(prompt, continuation)], 0).nats == pytest.approx(
        evaluate_path(stack, [(prompt, continuation)]).nats
    )


def test_shortgpt_has_at_least_the_work():
    stack = stack_of(decoder())
    influence, lengths = [0.9, 0.1, 0.5, 0.2, 0.8], [10, 20]
    whole = sum(stack.count(layer, length, length) for layer in range(BLOCKS) for length in lengths)
    each_block = sum(stack.count(0, length, length) for length in lengths)
    assert equal_work_path(stack, influence, lengths, whole) == (0, 1, 2, 3, 4)
    assert equal_work_path(stack, influence, lengths, whole - each_block + 1) == (0, 1, 2, 3, 4)
    assert equal_work_path(stack, influence, lengths, whole - each_block) == (0, 2, 3, 4)
    assert equal_work_path(stack, influence, lengths, whole - 2 * each_block) == (0, 2, 4)
    assert equal_work_path(stack, influence, lengths, 0) == ()


def test_a_comparison_has_every_baseline_at_its_work():
    skipper, data = skipper_of(), items(4, prompt=20)
    stack = skipper.stack
    influence = block_influence(stack, [torch.tensor([row[0]]) for row in data])
    rows = {row.name: row for row in compare(skipper, data, influence)}
    assert list(rows) == ["dense", "ours", "searched", "static", "random", "truncation", "shortgpt"]
    assert rows["dense"].found.saved == 0
    assert rows["ours"].found.nats == evaluate_items(skipper, data).nats
    assert rows["shortgpt"].found.work >= rows["ours"].found.work
    assert rows["searched"].found.work == rows["ours"].found.work, "topk computes as many tokens as the static router"
    assert rows["random"].found.work == rows["static"].found.work
    assert rows["static"].found.report.target_sparsity == pytest.approx(skipper.sparsity)
    for row in rows.values():
        assert json.dumps(row.found.to_dict())
        assert len(row.found.following) == 4


@pytest.mark.parametrize(
    ("prompt", "continuation", "error"),
    [
        ([], [1], DataError),
        ([1], [], DataError),
        ([1], [77], InputError),
        ("ab", [1], InputError),
        (None, [1], InputError),
        ([1] * 2048, [1], DataError),
    ],
)
def test_wrong_pairs(prompt, continuation, error):
    with pytest.raises(error):
        evaluate(skipper_of(), prompt, continuation)


def test_wrong_text_and_broken_models():
    with pytest.raises(InputError, match="perplexity needs at least 2"):
        perplexity(TokenSkipper(decoder(), [0.0] * BLOCKS), [[3]])
    model = decoder()
    with torch.no_grad():
        model.blocks[2].attention.qkv.weight.fill_(torch.nan)
    data = items()
    with pytest.raises(NotFiniteError, match="the pruned model gives logits that are not numbers"):
        evaluate_items(TokenSkipper(model, SCHEDULE), data)
    with pytest.raises(NotFiniteError):
        evaluate_items(TokenSkipper(model, SCHEDULE, TokenRouter()), data)
    with pytest.raises(NotFiniteError):
        evaluate_path(stack_of(model), data)


# The redundancy matrix


def test_the_matrix_counts_cosines_above_each_threshold():
    model, token_BL = decoder(), tokens(3, 8)
    found = redundancy_report(model, [token_BL[:2], token_BL[2:]], (0.0, 0.5, 0.9))
    context, x_BLD, rows = model.context(token_BL), model.embed(token_BL), []
    with torch.no_grad():
        for block in model.blocks:
            y_BLD = block(x_BLD, context)
            rows.append(F.cosine_similarity(x_BLD, y_BLD, dim=-1).flatten())
            x_BLD = y_BLD
    cosine_IN = torch.stack(rows)
    for column, limit in enumerate(found.thresholds):
        expected = (cosine_IN > limit).float().mean(1)
        assert [row[column] for row in found.share] == pytest.approx(expected.tolist(), abs=0.05)
    assert found.mean == pytest.approx(cosine_IN.mean(1).tolist(), abs=1e-5)
    assert found.tokens == 24
    assert found.overall[0] == pytest.approx(sum(row[0] for row in found.share) / BLOCKS)
    lines = str(found).splitlines()
    assert len(lines) == BLOCKS + 2
    assert lines[0].split() == ["block", "mean", "cos", ">", "0", ">", "0.5", ">", "0.9"]
    assert json.dumps(found.to_dict())


def test_a_model_that_changes_nothing_is_all_redundant():
    model = decoder()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.feed_forward.w2.weight.zero_()
    assert redundancy_report(model, [tokens(1, 6)], (0.99,)).overall == (1.0,)


def test_wrong_matrices():
    with pytest.raises(DataError, match="there are no tokens"):
        redundancy_report(decoder(2), [])
    for limit in (1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="a threshold is"):
            redundancy_report(decoder(2), [tokens(1, 4)], (limit,))


# The file


def file_of(tmp_path, router=None, **options):
    skipper = skipper_of(router, **options)
    skipper.save(tmp_path / "skipper.safetensors")
    return skipper, tmp_path / "skipper.safetensors"


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (None, {}),
        (
            None,
            {"mode": "threshold", "kv": "keep", "one_pass": True, "factors": FactorConfig(causal=True, most_score=3.0)},
        ),
        ("static", {"kv": "keep"}),
        ("random", {"seed": 7}),
    ],
)
def test_what_is_saved_comes_back(tmp_path, router, options):
    skipper, path = file_of(tmp_path, router, **options)
    assert path.stat().st_size < 10_000
    found = TokenSkipper.load(path, decoder())
    for name in ("schedule", "mode", "kv", "one_pass", "factors", "seed"):
        assert getattr(found, name) == getattr(skipper, name)
    one, two = (each_one.prefill(tokens(1, 20)) for each_one in (skipper, found))
    assert torch.equal(one.logits_BV, two.logits_BV)
    assert torch.equal(one.keep_IBL, two.keep_IBL)


def test_a_file_for_as_many_blocks_as_a_real_model_is_small(tmp_path):
    model = decoder(80)
    TokenSkipper(model, [0.0, *[0.3] * 79], TokenRouter()).save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_size < 10_000


def test_a_file_is_of_one_model(tmp_path):
    _, path = file_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of a model with fingerprint [0-9a-f]{12}; this one has"):
        TokenSkipper.load(path, decoder(seed=1))
    with pytest.raises(CheckpointError, match="is of a model of 5 blocks; this one has 4"):
        TokenSkipper.load(path, decoder(4))


def test_damaged_files_are_refused(tmp_path):
    _, path = file_of(tmp_path)
    data, model, read = path.read_bytes(), decoder(), 0
    for source in each(150):
        path.write_bytes(damaged(data, source))
        read += refuse_or_read(lambda: TokenSkipper.load(path, model), source.name)
    assert read < 15
    for content in (b"", b"x", b"\x00" * 40, data[:-1], data[: len(data) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            TokenSkipper.load(path, model)
    with pytest.raises(CheckpointError, match="is not there; anabranch depth prune makes one"):
        TokenSkipper.load(tmp_path / "none", model)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "is of version 2; this version of anabranch reads 1"),
        ({"mode": "best"}, "mode is 'best'"),
        ({"kv": None}, "kv is None"),
        ({"by_place": "static"}, "no router, or two"),
        ({"router": None}, "no router, or two"),
        ({"router": {"hidden": 3}}, "damaged or no skipper"),
        ({"factors": {"refresh": 0}}, "damaged or no skipper"),
        ({"seed": "x"}, "damaged or no skipper"),
        ({"seed": 10**30}, "seed is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": float("inf")}, "seed is inf"),
        ({"seed": True}, "seed is True"),
        ({"one_pass": "no"}, "one_pass is 'no'"),
        ({"fingerprint": [1]}, r"its fingerprint \[1\]"),
        ({"router": {"inputs": "hidden", "hidden": 4096, "dim": 10**9}}, "first matrix is .*, and its settings are of"),
        (
            {"router": {"inputs": "hidden", "hidden": 4096, "dim": 200_000}},
            "first matrix is .*, and its settings are of",
        ),
    ],
)
def test_changed_content_is_refused(tmp_path, change, told):
    from safetensors.torch import load_file, save_file

    from anabranch.depth.ftp.saving import _FIELD, _digest

    _, path = file_of(tmp_path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        content = {**json.loads(file.metadata()[_FIELD].partition(" ")[2]), **change}
    text = json.dumps(content)
    save_file(tensors, path, {_FIELD: f"{_digest(tensors, text)} {text}"})
    with pytest.raises(CheckpointError, match=told):
        TokenSkipper.load(path, decoder())
    save_file({**tensors, "router.first.bias": torch.full((64,), torch.nan)}, path, {_FIELD: f"no {text}"})
    with pytest.raises(CheckpointError, match="does not match its digest"):
        TokenSkipper.load(path, decoder())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32, torch.bool])
def test_numbers_of_types_that_no_skipper_has_are_refused(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    from anabranch.depth.ftp.saving import _FIELD, _digest

    _, path = file_of(tmp_path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        text = file.metadata()[_FIELD].partition(" ")[2]
    for name in tensors:
        other = {**tensors, name: torch.zeros(tensors[name].shape).to(dtype)}
        save_file(other, path, {_FIELD: f"{_digest(other, text)} {text}"})
        with pytest.raises(CheckpointError, match=f"{name} is of {str(dtype).removeprefix('torch.')}"):
            TokenSkipper.load(path, decoder())


def test_numbers_that_are_none_are_refused(tmp_path):
    from anabranch.depth.ftp.saving import read_skipper

    skipper, path = file_of(tmp_path)
    with torch.no_grad():
        skipper.router.first.bias[0] = torch.nan
    skipper.save(path)
    with pytest.raises(CheckpointError, match=r"router\.first\.bias has numbers that are not finite"):
        read_skipper(path)
