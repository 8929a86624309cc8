"""Block influence against a loop by hand, and the path of ShortGPT."""

import pytest
import torch
import torch.nn.functional as F

from anabranch.depth.influence import block_cosines, block_influence, least_influence_first, without_least
from anabranch.depth.stack import stack_of
from anabranch.errors import ConfigError, DataError
from skipped_models import decoder, tokens


def by_hand(model, token_BL):
    context = model.context(token_BL)
    x_BLD, rows = model.embed(token_BL), []
    with torch.no_grad():
        for block in model.blocks:
            y_BLD = block(x_BLD, context)
            rows.append(1 - F.cosine_similarity(x_BLD, y_BLD, dim=-1))
            x_BLD = y_BLD
    return torch.stack(rows)


def test_influence_is_one_less_the_mean_cosine():
    model, token_BL = decoder(), tokens(2, 9)
    expected = by_hand(model, token_BL).mean((1, 2))
    assert block_influence(stack_of(model), [token_BL]) == pytest.approx(expected.tolist(), abs=1e-6)


def test_batches_count_by_their_tokens():
    model, long, short = decoder(), tokens(1, 20), tokens(1, 4, seed=1)
    mean = (by_hand(model, long).sum(2) + by_hand(model, short).sum(2))[:, 0] / 24
    assert block_influence(stack_of(model), [long, short]) == pytest.approx(mean.tolist(), abs=1e-6)


def test_padding_counts_for_nothing():
    model, real = decoder(), tokens(1, 6)
    padded, mask = F.pad(real, (4, 0), value=3), F.pad(torch.ones(1, 6), (4, 0))
    stack = stack_of(model)
    assert block_influence(stack, [(padded, mask)]) == pytest.approx(block_influence(stack, [real]), abs=1e-5)
    assert block_cosines(stack, padded, mask)[:, :, :4].isnan().all()


def test_the_path_of_shortgpt():
    influence = [0.9, 0.1, 0.3, 0.1, 0.5]
    assert least_influence_first(influence) == [1, 3, 2, 4, 0]
    assert without_least(influence, 0) == (0, 1, 2, 3, 4)
    assert without_least(influence, 3) == (0, 4)
    assert without_least(influence, 5) == ()
    for wrong in (-1, 6):
        with pytest.raises(ConfigError, match="to be removed of 5"):
            without_least(influence, wrong)


@pytest.mark.parametrize(
    "wrong", [[], [torch.zeros(3)], [torch.zeros(1, 0).long()], [(tokens(1, 3), torch.ones(1, 4))], [torch.zeros(1, 3)]]
)
def test_wrong_batches(wrong):
    with pytest.raises(DataError):
        block_influence(stack_of(decoder(2)), wrong)


def test_a_broken_model_is_named():
    model = decoder(2)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight.fill_(torch.nan)
    with pytest.raises(DataError, match="block 1 gives numbers that are not finite"):
        block_influence(stack_of(model), [tokens(1, 4)])
