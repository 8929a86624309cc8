"""A router's training that is over in a second."""

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
