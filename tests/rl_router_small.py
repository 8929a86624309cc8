"""A router's training that is over in a second."""

from anabranch.lm.decoder import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.nn.feed_forward import SwiGLU

# Fields of `router_training`, by path.
SMALL = {
    "task.world.entities": 10,
    "task.world.relations": 2,
    "task.world.experts": 2,
    "task.model.dim": 32,
    "task.model.num_layers": 1,
    "task.model.attention.num_heads": 2,
    "task.model.feed_forward.hidden_dim": 32,
    "task.questions": 4,
    "task.group": 2,
    "task.slots": 8,
    "task.eval_episodes": 8,
    "warm.traces": 32,
    "warm.batch_size": 8,
}


def tiny_decoder(vocab_size):
    """A policy that is made at once."""
    return Decoder.Config(
        vocab_size=vocab_size,
        dim=32,
        num_layers=1,
        max_positions=128,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=32),
    )
