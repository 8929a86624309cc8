"""`NestedLowRank`: what it adds while it learns and afterwards."""

import pytest
import torch

from anabranch.adapters import NestedLowRank
from anabranch.nn import BuildContext
from anabranch.nn.linear import Projection


@pytest.mark.parametrize("used", [1, 3])
def test_a_share_of_what_goes_in_is_left_out_while_it_learns(used):
    config = NestedLowRank.Config(rank=3, alpha=6.0, dropout=0.5)
    layer = config.build(Projection("q", 8, 5), BuildContext(8, generator=torch.Generator().manual_seed(0)))
    layer.b.data.normal_(generator=torch.Generator().manual_seed(1))
    layer.used = used
    # Ones, so that what is left out can be told from what goes through.
    x = torch.ones(4, 8)
    torch.manual_seed(2)
    kept = torch.nn.functional.dropout(x, 0.5)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}
    torch.manual_seed(2)
    torch.testing.assert_close(layer.train()(x), 6.0 / used * kept @ layer.a[:used].T @ layer.b[:, :used].T)
    torch.testing.assert_close(layer.eval()(x), 2.0 * x @ layer.a.T @ layer.b.T)
