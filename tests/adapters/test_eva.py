"""The start of EVA where inputs are ill-conditioned: one token of a thousand times the size of others hides no direction."""

import torch
from torch import nn

from anabranch.adapters.eva import start_by_inputs
from anabranch.adapters.graft import layers_of
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.put_on import put_on
from anabranch.lm import Decoder


def test_one_massive_activation_hides_no_direction():
    generator = torch.Generator().manual_seed(0)
    # One token of 1e6 beside directions of 1 to 8 behind, further apart than float32 tells squares.
    size_R = torch.tensor([1e6, 8.0, 4.0, 2.0])
    left_NR = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64)).Q
    right_RC = torch.linalg.qr(torch.randn(32, 4, generator=generator, dtype=torch.float64)).Q.mT
    x_NC = ((left_NR * size_R) @ right_RC).float()
    model = put_on(Decoder.Config(num_layers=1, dim=32).build(seed=0), {"*.attention.q": LowRank.Config(rank=4)})
    (layer,) = layers_of(model).values()
    held = nn.ModuleList([layer])

    def losses():
        layer(x_NC)
        yield x_NC.sum()

    start_by_inputs(held, losses())
    cosine_R = (layer.a.double() * right_RC).sum(-1).abs()
    torch.testing.assert_close(cosine_R[:3], torch.ones(3, dtype=torch.float64), atol=1e-2, rtol=0)
