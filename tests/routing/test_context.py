import torch

from anabranch.routing import RoutingContext


class Scale:
    """A load sink that adds up what it is given."""

    def __init__(self):
        self.total = torch.zeros(2)
        self.calls = 0

    def add_load(self, load_E, open_E=None):
        self.total += load_E
        self.calls += 1


def test_losses_are_averaged_over_the_layers_that_emitted_them():
    context = RoutingContext()
    for value in (1.0, 2.0, 6.0):
        context.emit_loss("a", torch.tensor(value))
    context.emit_loss("b", torch.tensor(5.0))
    assert {name: loss.item() for name, loss in context.mean_losses().items()} == {"a": 3.0, "b": 5.0}
    assert RoutingContext().mean_losses() == {}


def test_loads_reach_their_sink_at_commit_and_only_once():
    context, scale = RoutingContext(), Scale()
    context.emit_load(scale, torch.tensor([1, 2]))
    context.emit_load(scale, torch.tensor([3, 0]))
    assert scale.calls == 0
    context.commit()
    context.commit()
    assert scale.total.tolist() == [4.0, 2.0]
    assert scale.calls == 2


def test_a_fork_sees_the_same_state_and_collects_on_its_own():
    context = RoutingContext(sequence_length=3, training=True, state={"hidden": 1})
    fork = context.fork()
    fork.emit_loss("a", torch.tensor(1.0))
    fork.emit_load(Scale(), torch.ones(2))
    fork.state["hidden"] = 2
    assert context.losses == {}
    assert context.loads == []
    assert context.state["hidden"] == 2
    assert fork.sequence_length == 3
    assert fork.training


def test_merge_takes_over_what_a_fork_collected_in_order():
    context, scale = RoutingContext(), Scale()
    context.emit_loss("a", torch.tensor(1.0))
    fork = context.fork()
    fork.emit_loss("a", torch.tensor(3.0))
    fork.emit_load(scale, torch.ones(2))
    context.merge(*fork.collected())
    context.commit()
    assert context.mean_losses()["a"].item() == 2.0
    assert scale.total.tolist() == [1.0, 1.0]


def test_a_subclass_forks_into_its_own_class():
    class Wider(RoutingContext):
        pass

    assert type(Wider().fork()) is Wider


class Product:
    """A loss over layers: the product of its parts."""

    def __init__(self, name):
        self.name = name

    def close(self, parts):
        return self.name, torch.stack([value for (value,) in parts]).prod()


def test_a_loss_over_layers_gets_its_own_parts_and_counts_as_one_entry():
    first, second, context = Product("pool"), Product("pool"), RoutingContext()
    for value in (2.0, 3.0):
        context.emit_part(first, (torch.tensor(value),))
    fork = context.fork()
    fork.emit_part(second, (torch.tensor(10.0),))
    assert fork.parts != context.parts
    context.merge(*fork.collected())
    context.emit_loss("other", torch.tensor(1.0))
    for _ in range(2):  # reading does not use anything up
        assert {name: loss.item() for name, loss in context.mean_losses().items()} == {
            "other": 1.0,
            "pool": (6 + 10) / 2,
        }


def test_metrics_are_means_over_layers_without_gradient():
    context = RoutingContext()
    context.emit_metric("drop_ratio", torch.tensor(0.5, requires_grad=True))
    fork = context.fork()
    fork.emit_metric("drop_ratio", torch.tensor(0.0))
    context.merge(*fork.collected())
    assert context.mean_metrics()["drop_ratio"].item() == 0.25
    assert not context.mean_metrics()["drop_ratio"].requires_grad


def test_once_gives_a_fork_what_the_first_pass_saw():
    context, owner, value = RoutingContext(), object(), torch.tensor(1.0)
    assert context.once(owner, value.clone).item() == 1.0
    value += 1
    assert context.fork().once(owner, value.clone).item() == 1.0
    assert context.once(object(), value.clone).item() == 2.0
    assert RoutingContext().once(owner, value.clone).item() == 2.0
