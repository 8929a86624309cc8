"""GraphRouter's networks: against loops over nodes and edges, against each other, and what they must not see."""

import numpy as np
import pytest
import torch

from anabranch.routers.graphrouter import train
from anabranch.routers.graphrouter.encoding import Encoding, layers
from anabranch.routers.graphrouter.graph import best
from anabranch.routers.graphrouter.memory import Memory, learned_arrays
from anabranch.routers.graphrouter.neighbours import Neighbours, nearest
from anabranch.routers.graphrouter.network import Block, Edges, Hetero, Network, Nodes
from anabranch.routers.graphrouter.plus_network import (
    Material,
    PlusNetwork,
    Support,
    episode_loss,
    fit_plus,
    virtual_models,
)
from anabranch.routers.graphrouter.settings import Episodes, Training
from anabranch.routers.graphrouter.train import Table, features, fit_network, mask

MODES = ("reference", "mean", "hetero")
SUMS_ROUND = {"abs": 2e-5, "rel": 1e-4}  # float32 sums in another order
N, M, T, D, V, HIDDEN = 12, 4, 3, 6, 5, 2


def make(mode, seed=0, dtype=torch.float32, **changes):
    sizes = {"query_dim": D, "task_dim": V, "model_dim": V, "hidden": HIDDEN} | changes
    torch.manual_seed(seed)
    network = Hetero(**sizes) if mode == "hetero" else Network(**sizes, mean=mode == "mean")
    for k in range(2):  # as after some training
        network.norm[k].running_mean.uniform_(-0.5, 0.5)
        network.norm[k].running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(network.norm[k].weight, 0.5, 1.5)
        torch.nn.init.uniform_(network.norm[k].bias, -0.5, 0.5)
        torch.nn.init.uniform_(network.bias[k], -0.5, 0.5)
    return network.to(dtype).eval()


def inputs(seed=0, dtype=torch.float32, n=N, m=M):
    rng = np.random.default_rng(seed)
    share = np.eye(T)[rng.integers(0, T, n)] * 0.7 + 0.1
    values = (rng.normal(size=(n, D)), share, rng.normal(size=(T, V)), rng.normal(size=(m, V)))
    edge, visible = rng.uniform(size=(n, m, 3)), rng.uniform(size=(n, m)) < 0.6
    nodes = Nodes(*(torch.from_numpy(value).to(dtype) for value in values))
    return nodes, torch.from_numpy(edge).to(dtype), torch.from_numpy(visible)


def numbers(network):
    return {name: value.detach().double().numpy() for name, value in network.state_dict().items()}


def naive(network, mode, nodes, edge, visible):
    """The equations, node by node and edge by edge, in float64; BatchNorm frozen."""
    w = numbers(network)
    query, share, task, model = (
        value.double().numpy() for value in (nodes.query_ND, nodes.share_NT, nodes.task_TV, nodes.model_MV)
    )
    edge, visible = edge.double().numpy(), visible.numpy()
    n, m, t = len(query), len(model), len(task)

    def lin(name, x):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def norm(k, x):
        value = (x - w[f"norm.{k}.running_mean"]) / np.sqrt(w[f"norm.{k}.running_var"] + 1e-5)
        value = value * w[f"norm.{k}.weight"] + w[f"norm.{k}.bias"]
        return np.maximum(value, 0) if k == 0 else value

    xt = [lin("task", task[i]) for i in range(t)]
    xm = [lin("model", model[j]) for j in range(m)]
    if mode == "hetero":
        xq = [lin("query", query[i]) for i in range(n)]
    else:
        xq = [np.concatenate([sum(share[i, k] * xt[k] for k in range(t)), lin("query", query[i])]) for i in range(n)]
    a = [[np.maximum(lin("edge", edge[i, j]), 0) for j in range(m)] for i in range(n)]
    first = [x.copy() for x in xq]
    for k in range(2):
        new_m = []
        for j in range(m):
            rows = [i for i in range(n) if visible[i, j]]
            total = sum(
                (lin(f"from_node.{k}", xq[i]) + lin(f"from_edge.{k}", a[i][j]) for i in rows), np.zeros(2 * HIDDEN)
            )
            new_m.append(xm[j] + (total if mode == "reference" else total / max(len(rows), 1)) + w[f"bias.{k}"])
        new_q, new_t = [], []
        for i in range(n):
            value = xq[i] + w[f"bias.{k}"]
            if mode == "hetero":
                columns = [j for j in range(m) if visible[i, j]]
                total = sum(
                    (lin(f"from_model.{k}", xm[j]) + lin(f"edge_to_query.{k}", a[i][j]) for j in columns),
                    np.zeros(2 * HIDDEN),
                )
                value = (
                    value
                    + lin(f"from_task.{k}", sum(share[i, s] * xt[s] for s in range(t)))
                    + total / max(len(columns), 1)
                )
            new_q.append(value)
        for s in range(t if mode == "hetero" else 0):
            mean = sum(share[i, s] * xq[i] for i in range(n)) / share[:, s].sum()
            new_t.append(xt[s] + lin(f"to_task.{k}", mean) + w[f"bias.{k}"])
        xq, xm = [norm(k, x) for x in new_q], [norm(k, x) for x in new_m]
        xt = [norm(k, x) for x in new_t]
    left = xq if mode == "hetero" else first
    return np.array([[np.mean(left[i] * xm[j]) for j in range(m)] for i in range(n)])


def test_reference_by_hand():
    """One number wide in each half; W, V, b by hand; BatchNorm the identity."""
    network = Network(1, 1, 1, 1, mean=False).double().eval()
    with torch.no_grad():
        for layer in (network.task, network.query, network.model, network.edge, *network.from_node, *network.from_edge):
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
        network.task.weight.fill_(1.0)
        network.query.weight.fill_(2.0)
        network.model.weight[:] = torch.tensor([[1.0], [-1.0]])
        network.edge.weight[:] = torch.eye(3)
        for k in range(2):
            network.from_node[k].weight[:] = torch.eye(2)
            network.from_edge[k].weight[:] = torch.tensor(
                [[1.0, 0, 0], [0, 0, 1.0]]
            )  # utility to the first number, effect to the second
            network.norm[k].running_var.fill_(1 - 1e-5)
        network.bias[0].fill_(0.5)
    nodes = Nodes(
        *(torch.tensor(value, dtype=torch.float64) for value in ([[0.5], [1.0]], [[1.0], [1.0]], [[3.0]], [[1.0]]))
    )
    edge = torch.tensor([[[0.2, 0.9, 0.7]], [[-0.4, 0.1, 0.3]]], dtype=torch.float64)
    # x_q = (3, 1), (3, 2); x_m = (1, -1). ReLU of edges: (.2, .9, .7), (0, .1, .3)
    # layer 1, both visible: x_m = (1, -1) + (6, 3) + (.2, 1.0) + .5 = (7.7, 3.5); x_q = (3.5, 1.5), (3.5, 2.5)
    # layer 2: x_m = (7.7, 3.5) + (7, 4) + (.2, 1.0) = (14.9, 8.5); logit = mean of x_q(0) x_m
    logit = network(nodes, Block(edge, torch.ones(2, 1, dtype=torch.float64)))
    assert logit.flatten().tolist() == pytest.approx([(3 * 14.9 + 8.5) / 2, (3 * 14.9 + 2 * 8.5) / 2])


@pytest.mark.parametrize("mode", MODES)
def test_network_is_the_equations(mode):
    nodes, edge, visible = inputs(dtype=torch.float64)
    network = make(mode, dtype=torch.float64)
    found = network(nodes, Block(edge, visible.double()))
    assert found.detach().numpy() == pytest.approx(naive(network, mode, nodes, edge, visible), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_block_and_list_of_edges_agree(mode, training, dtype):
    nodes, edge, visible = inputs(dtype=dtype)
    network = make(mode, dtype=dtype).train(training)
    query, model = visible.nonzero(as_tuple=True)
    dense = network(nodes, Block(edge, visible.to(dtype)))
    sparse = network(nodes, Edges(query, model, edge[query, model], N, M))
    assert torch.allclose(dense, sparse, atol=1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_queries_and_models_is_no_matter(mode):
    nodes, edge, visible = inputs(dtype=torch.float64)
    network = make(mode, dtype=torch.float64)
    rows, columns = torch.randperm(N), torch.randperm(M)
    found = network(nodes, Block(edge, visible.double()))
    turned = Nodes(nodes.query_ND[rows], nodes.share_NT[rows], nodes.task_TV, nodes.model_MV[columns])
    other = network(turned, Block(edge[rows][:, columns], visible[rows][:, columns].double()))
    assert torch.allclose(other, found[rows][:, columns], atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_visible_edges(mode):
    nodes, edge, _ = inputs()
    found = make(mode)(nodes, Block(edge, torch.zeros(N, M)))
    assert torch.isfinite(found).all()
    assert torch.equal(found, make(mode)(nodes, Block(edge * 7, torch.zeros(N, M))))


@pytest.mark.parametrize("mode", MODES)
def test_a_predicted_edge_is_not_seen(mode):
    """Its utility, cost and effect may be anything: not a bit of the output changes."""
    nodes, edge, _ = inputs()
    network = make(mode).train()
    hidden = mask(torch.ones(N, M, dtype=torch.bool), 0.5, torch.Generator().manual_seed(0), whole=mode == "hetero")
    other = torch.where(hidden[1][..., None], edge + 100, edge)
    assert not torch.equal(other, edge)
    seen = hidden[0].float()
    assert torch.equal(network(nodes, Block(edge, seen)), network(nodes, Block(other, seen)))


def test_masks_part_the_training_edges():
    train = torch.rand(50, 6) < 0.8
    draw = torch.Generator().manual_seed(1)
    for whole in (False, True):
        visible, predicted = mask(train, 0.5, draw, whole=whole)
        assert torch.equal(visible | predicted, train)
        assert not (visible & predicted).any()
    assert not (visible.any(1) & predicted.any(1)).any()  # whole queries


def trained(mode, seed=0, n=48, steps=15, held=True, spoil=None):
    """Queries of three tasks; the model of a task's number is its best. ``spoil`` changes the effects of validation queries."""
    rng = np.random.default_rng(seed)
    task = np.arange(n) % T
    values = rng.normal(size=(n, D)), np.eye(T)[task], rng.normal(size=(T, V)), rng.normal(size=(T, V))
    nodes = Nodes(*(torch.from_numpy(value).float() for value in values))
    effect = 0.8 * np.eye(T)[task] + 0.1 * rng.uniform(size=(n, T))
    effect[rng.uniform(size=(n, T)) < 0.1] = np.nan
    held_N = (np.arange(n) % 8 == 0) & held
    if spoil is not None:
        effect[held_N] = spoil
    table = Table(effect, np.where(np.isfinite(effect), rng.uniform(size=(n, T)), np.nan), held_N, "balance")
    network = make(mode, seed)
    fit_network(network, nodes, table, Training(steps=steps, draws=2, lr=0.05, check_every=5), seed)
    return network, nodes, table


@pytest.mark.parametrize("mode", MODES)
def test_training_finds_the_best_models_and_freezes_batch_norm(mode):
    network, nodes, table = trained(mode, steps=120)
    assert not network.training
    edges = Block(torch.from_numpy(features(table)), torch.zeros(48, T))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logit = network(nodes, edges)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    seen = network(
        nodes, Block(edges.edge, torch.from_numpy(np.isfinite(table.utility_NM) & ~table.held_N[:, None]).float())
    )
    label = torch.from_numpy(best(table.utility_NM))
    right = label[torch.arange(48), seen.argmax(1)]
    assert right.float().mean() > 0.6  # by chance 1 in 3
    assert logit.shape == (48, T)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_the_same_for_a_seed(mode):
    one, other = trained(mode)[0].state_dict(), trained(mode)[0].state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", MODES)
def test_validation_queries_are_never_trained_on(mode, monkeypatch):
    looks = iter(range(100))
    monkeypatch.setattr(train, "_earned", lambda *_: float(next(looks)))  # keeps the last weights, whatever they earn
    one, other = (trained(mode, spoil=value)[0].state_dict() for value in (0.1, 0.9))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", MODES)
def test_few_edges_are_a_list_with_the_same_gradients(mode):
    nodes, edge, visible = inputs(dtype=torch.float64)
    label, found = best(edge[..., 0].numpy()), []
    for sparse in (False, True):
        network = make(mode, dtype=torch.float64).train()
        made = train.messages(edge, visible, sparse=sparse)
        assert isinstance(made, Edges if sparse else Block)
        made = made if sparse else Block(edge, visible.double())
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            network(nodes, made)[~visible], torch.from_numpy(label)[~visible].double()
        )
        loss.backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-10)


def test_when_edges_are_few():
    assert train.is_sparse(torch.arange(100).reshape(20, 5) < 15)
    assert not train.is_sparse(torch.arange(100).reshape(20, 5) < 25)


def test_nothing_to_train_on_leaves_a_network_that_scores():
    network = make("mean")
    nodes, _, _ = inputs(n=2)
    table = Table(np.full((2, M), 0.5), np.zeros((2, M)), np.ones(2, bool), "performance")
    fit_network(network, nodes, table, Training(steps=3, draws=1), 0)
    assert torch.isfinite(network(nodes, Block(torch.zeros(2, M, 3), torch.zeros(2, M)))).all()


# The encoding at rest


@pytest.mark.parametrize("mode", MODES)
def test_encoding_at_rest_is_the_network(mode):
    nodes, edge, visible = inputs()
    network = make(mode)
    rest = Encoding(layers(network), mode, nodes.task_TV.numpy(), nodes.model_MV.numpy())
    rest.add(nodes.query_ND.numpy(), nodes.share_NT.numpy(), edge.numpy(), visible.float().numpy())
    rest.refresh()
    if mode != "hetero":
        found = network(nodes, Block(edge, visible.float())).detach().numpy()
        assert rest.logits(nodes.query_ND.numpy(), nodes.share_NT.numpy()) == pytest.approx(found, **SUMS_ROUND)
        return
    # a new query has no edges, and is no part of its task's mean: let it weigh nothing there
    new, _, _ = inputs(seed=5, n=1)
    nothing = torch.full((1, T), 1e-9)
    joined = Nodes(
        torch.cat([nodes.query_ND, new.query_ND]), torch.cat([nodes.share_NT, nothing]), nodes.task_TV, nodes.model_MV
    )
    edges = Block(torch.cat([edge, edge[:1]]), torch.cat([visible.float(), torch.zeros(1, M)]))
    found = network(joined, edges)[-1:].detach().numpy()
    assert rest.logits(new.query_ND.numpy(), nothing.numpy()) == pytest.approx(found, **SUMS_ROUND)


@pytest.mark.parametrize("mode", MODES)
def test_edges_one_by_one_are_edges_at_once(mode):
    nodes, edge, visible = inputs()
    weights = layers(make(mode))
    args = [value.numpy() for value in (nodes.query_ND, nodes.share_NT, edge, visible.float())]
    together, apart = (Encoding(weights, mode, nodes.task_TV.numpy(), nodes.model_MV.numpy()) for _ in range(2))
    together.add(*args)
    for row in range(N):
        apart.add(*(value[row : row + 1] for value in args))
    for made in (together, apart):
        made.refresh()
    assert apart.model_MH == pytest.approx(together.model_MH, **SUMS_ROUND)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_joins_is_as_if_it_had_been_there(mode):
    nodes, edge, visible = inputs()
    weights = layers(make(mode))
    visible[:, -1] = False
    args = [value.numpy() for value in (nodes.query_ND, nodes.share_NT, edge, visible.float())]
    there = Encoding(weights, mode, nodes.task_TV.numpy(), nodes.model_MV.numpy())
    there.add(*args)
    there.refresh()
    joined = Encoding(weights, mode, nodes.task_TV.numpy(), nodes.model_MV.numpy()[:-1])
    joined.add(args[0], args[1], args[2][:, :-1], args[3][:, :-1])
    joined.add_model(nodes.model_MV.numpy()[-1])
    assert joined.model_MH == pytest.approx(there.model_MH, **SUMS_ROUND)


# Plus


def plus_case(seed=0, n=60, m=4, width=3, centres=5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    share = rng.dirichlet(np.ones(T), n).astype(np.float32)
    value = rng.uniform(size=(2, n, m))
    value[:, rng.uniform(size=(n, m)) < 0.2] = np.nan
    network = PlusNetwork(x[:centres], V, width, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed))
    support = Support(
        torch.from_numpy(x),
        torch.from_numpy(share),
        torch.from_numpy(np.nan_to_num(value)).float(),
        torch.from_numpy(np.isfinite(value)).float(),
        (0.7, 1.4),
    )
    return network, support, value, torch.from_numpy(rng.normal(size=(m, V))).float()


def queries(count=7, seed=9):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), rng.dirichlet(np.ones(T), count).astype(np.float32)


def rest_of(network, support, value, k, exact_below=10_000):
    x = support.vector_ND.numpy()
    seen = np.isfinite(value)
    mean = np.where(seen, value, 0).sum(1) / seen.sum(1)
    stores = Neighbours(D, exact_below), Neighbours(D, exact_below)
    stores[0].add(x)
    return Memory.fill(learned_arrays(network), mean, support.kappa_2, k, stores, support.share_NT.numpy(), value, 1000)


def forward(network, support, x, share, model, k):
    row, like = nearest(x, support.vector_ND.numpy(), k)
    found = network(
        support, torch.from_numpy(x), torch.from_numpy(share), torch.from_numpy(row), torch.from_numpy(like), model
    )
    return [value.detach().numpy() for value in found]


def test_memory_at_rest_is_the_network():
    network, support, value, model = plus_case()
    memory = rest_of(network, support, value, 6)
    x, share = queries()
    effect, cost = forward(network, support, x, share, model, 6)
    looked = memory.look(x, share)
    said = memory.mean_2M[0] + looked.sum_2QC[0][:, :1] + looked.sum_2QC[0][:, 1:] + memory.described(x, model.numpy())
    assert said == pytest.approx(effect, **SUMS_ROUND)
    assert memory.mean_2M[1] + looked.sum_2QC[1][:, :1] + looked.sum_2QC[1][:, 1:] == pytest.approx(cost, **SUMS_ROUND)
    one = np.concatenate([memory.look(x[at : at + 1], share[at : at + 1]).sum_2QC for at in range(len(x))], 1)
    assert one == pytest.approx(memory.look(x, share).sum_2QC, abs=1e-5)


def test_without_its_own_row():
    """What is said of a stored query without itself is what a graph says from which its edges were taken (they stay in the means)."""
    network, support, value, _ = plus_case()
    memory = rest_of(network, support, value, 8)
    rows = np.array([3, 40, -1, 17])
    x, share = support.vector_ND.numpy()[rows], support.share_NT.numpy()[rows]
    found = memory.look(x, share, without=rows).sum_2QC
    assert found[:, 2] == pytest.approx(memory.look(x[2:3], share[2:3]).sum_2QC[:, 0], abs=1e-6)
    for at, row in enumerate(rows[[0, 1, 3]]):
        gates = memory.gates(memory.fitted, np.arange(60)).astype(float)
        part = memory.parts(support.vector_ND.numpy(), support.share_NT.numpy()).astype(float)
        others = np.arange(60) != row
        bank, total = memory.banks[0], np.zeros(5)  # the first bank by hand, effects
        up, down = part[others, bank].T @ gates[others, 0], part[others, bank].T @ gates[others, 1]
        total += part[row, bank] @ (memory.weight_2F1[0, bank] * up / (down + memory.caution_2F1[0, bank]))
        bank = memory.banks[1]
        said = part[:, memory.banks[0]] @ memory.profile_2FC[0, memory.banks[0], :5]
        left = gates[:, 0] - gates[:, 1] * said  # what the first bank left, by the profiles of all
        up, down = part[others, bank].T @ left[others], part[others, bank].T @ gates[others, 1]
        total += part[row, bank] @ (memory.weight_2F1[0, bank] * up / (down + memory.caution_2F1[0, bank]))
        near, alpha = (
            memory.look(x[[0, 1, 3]][at : at + 1], share[[0, 1, 3]][at : at + 1], without=np.array([row])),
            None,
        )
        assert row not in near.row_QJ
        alpha = near.alpha_QJ[0]
        stored = memory.fitted.edge_N4C[near.row_QJ[0], :, :5]
        total += (
            memory.learned["l.weight_23"][0, 2]
            * (alpha @ stored[:, 0])
            / (alpha @ stored[:, 1] + memory.learned["l.caution_23"][0, 2])
        )
        assert found[0, [0, 1, 3][at]] == pytest.approx(total, abs=1e-5)


def test_plus_by_hand():
    """Two queries, two models, one task, one centre, both visible, kappa 1: messages, what they leave, and attention, number by number."""
    network = PlusNetwork(np.array([[1.0, 0.0]], np.float32), 1, 1, 0)
    with torch.no_grad():
        network.attend_DA.zero_()
        network.query_DA.zero_()
        network.focus.fill_(0.0)  # exp: 1
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    value = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    support = Support(x, torch.ones(2, 1), torch.stack([value, value]), torch.ones(2, 2, 2), (1.0, 1.0))
    target = torch.tensor([[1.0, 0.0]])
    effect, _ = network(
        support, target, torch.ones(1, 1), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), torch.zeros(2, 1)
    )
    # means .5, 0; excess (.5, 0), (-.5, 0); others + kappa = 2; left_11 = .5 - 0/2, left_12 = 0 - .5/2; levels .5/3, -.5/3
    left = np.array([[0.5, -0.25], [-0.5, 0.25]])
    level = np.array([0.5, -0.5]) / 3
    gate = np.concatenate([level[:, None], left], 1) * 2 / 3  # weights 2/3 each
    weight = np.full((2, 3), 2 / 3)
    total = np.zeros(3)
    for caution in (1.0, 10.0):  # phi is 1 for everybody
        profile = gate.sum(0) / (weight.sum(0) + caution)
        total += profile
        gate = gate - weight * profile
    alpha = np.array([1.0, np.exp(-1.0)])
    total += (alpha @ gate) / (alpha @ weight + 30)
    assert effect[0].tolist() == pytest.approx([0.5 + total[0] + total[1], total[0] + total[2]], abs=1e-6)


def test_order_is_no_matter_in_plus():
    network, support, _, model = plus_case()
    x, share = queries()
    columns = np.array([2, 0, 3, 1])
    rows = np.random.default_rng(0).permutation(len(support.vector_ND))
    turned = Support(
        support.vector_ND[rows],
        support.share_NT[rows],
        support.value_2NM[:, rows][:, :, columns],
        support.seen_2NM[:, rows][:, :, columns],
        support.kappa_2,
    )
    before, after = forward(network, support, x, share, model, 6), forward(network, turned, x, share, model[columns], 6)
    for one, other in zip(before, after, strict=True):
        assert other == pytest.approx(one[:, columns], abs=1e-5)


def material(network_case, held=()):
    _, support, _, model = network_case
    row, like = nearest(support.vector_ND.numpy(), support.vector_ND.numpy(), 13)
    like[row == np.arange(len(row))[:, None]] = -np.inf
    train = torch.ones(len(row), dtype=torch.bool)
    train[list(held)] = False
    task = torch.from_numpy(np.arange(len(row)) % T)
    return Material(support, torch.from_numpy(row), torch.from_numpy(like), task, model, train)


def test_a_hidden_query_sees_nothing_of_itself():
    """In an episode, what is predicted of a hidden query does not change by a bit when its own edges do."""
    case = plus_case()
    network, support, _, model = case
    target, used = torch.arange(0, 60, 2), torch.arange(1, 60, 2)
    from anabranch.routers.graphrouter.plus_network import among, taken

    made = material(case)
    near = among(made, target, used, 6)
    assert (used[near[0]] % 2 == 1).all()  # neighbours are visible ones

    def predicted(value):
        part = taken(support, used, value, support.seen_2NM, 1.0)
        return network(part, support.vector_ND[target], support.share_NT[target], *near, model)

    changed = support.value_2NM.clone()
    changed[:, target] += 5
    for one, other in zip(predicted(support.value_2NM), predicted(changed), strict=True):
        assert torch.equal(one, other)


def test_validation_queries_take_no_part_in_episodes():
    case = plus_case()
    held = list(range(0, 60, 5))
    network = case[0]
    made = material(case, held)
    loss = episode_loss(network, made, Episodes(), 6, torch.Generator().manual_seed(0))
    made.support.value_2NM[:, held] += 9
    assert torch.equal(loss, episode_loss(network, made, Episodes(), 6, torch.Generator().manual_seed(0)))


def test_episodes_have_finite_gradients_and_lower_the_loss():
    case = plus_case()
    network, made, settings = case[0], material(case), Episodes(steps=60, lr=0.02, virtual=0.0, least_rate=1.0)

    def loss():
        draws = (torch.Generator().manual_seed(seed) for seed in range(20))
        return sum(float(episode_loss(network, made, settings, 6, draw).detach()) for draw in draws)

    before = loss()
    fit_plus(network, made, settings, 6, 0, None)
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    assert loss() < before


def test_a_virtual_model_is_in_each_task_a_real_one():
    made = material(plus_case())
    draw = torch.Generator().manual_seed(3)
    changed = False
    for _ in range(10):
        value, seen, _ = virtual_models(made, Episodes(virtual=1.0), draw)
        for task in range(T):
            rows = made.task_N == task
            real = [(made.support.value_2NM[:, rows, m], made.support.seen_2NM[:, rows, m]) for m in range(4)]
            for column in range(4):
                part = value[:, rows, column], seen[:, rows, column]
                assert any(torch.equal(part[0], v) and torch.equal(part[1], s) for v, s in real)
        changed |= not torch.equal(value, made.support.value_2NM)
    assert changed


def test_the_best_weights_are_kept():
    case = plus_case()
    network, made = case[0], material(case)
    first = {name: value.clone() for name, value in network.state_dict().items()}
    looks = iter([3.0, 1.0, 2.0])
    fit_plus(network, made, Episodes(steps=4, check_every=2), 6, 0, lambda: next(looks))
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())
