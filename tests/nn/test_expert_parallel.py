"""Experts split over two gloo processes give what one process gives: outputs and all gradients."""

import os
import subprocess
import sys
import textwrap

SCRIPT = textwrap.dedent(
    """
    import sys, time, torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.nn.parallel import DistributedDataParallel
    from anabranch.errors import ConfigError
    from anabranch.nn.expert_parallel import ExpertExchange, expert_mesh, shard_experts, sharded_parameters
    from anabranch.nn.pool import ExpertPool
    from anabranch.routing.context import RoutingContext
    from anabranch.routing.decision import Routing

    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    E, K, D, F = 6, 2, 16, 32

    def full_pool(experts=E):
        return ExpertPool(experts, D, F, init_std=0.3, generator=torch.Generator().manual_seed(0))

    mesh = expert_mesh("cpu", 2)

    def shared_pool(experts=E, average_gradients=False):
        pool = full_pool(experts)
        shard_experts(pool, mesh, average_gradients=average_gradients)
        return pool

    def whole_gradient(weight):
        return weight.grad.full_tensor()

    def data(split, kind):
        "The whole batch, and this rank's part of it; items before `split` are rank 0's."
        g = torch.Generator().manual_seed(1)
        x, weight = torch.randn(11, D, generator=g), torch.rand(11, K, generator=g)
        score = torch.rand(11, E, generator=g)
        score[:, 4] = -1.0  # an idle expert
        if kind == "all to the first":
            score[:, E // 2 :] = -1.0
        index = score.topk(K, dim=-1).indices
        if kind == "unused choices":
            unused = torch.rand(11, K, generator=g) < 0.4
            index, weight = index.masked_fill(unused, -1), weight.masked_fill(unused, 0.0)
        dy = torch.randn(11, D, generator=g)
        mine = slice(0, split) if rank == 0 else slice(split, 11)
        whole = (x, weight, index, score, dy)
        return whole, tuple(t[mine] for t in whole), mine

    def work(pool, x, weight, index, score, dy, weight_on):
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = pool(x, Routing(index, weight, score), weight_on=weight_on)
        y.backward(dy)
        return y.detach(), x.grad, weight.grad

    def near(a, b, what, tolerance=1e-6):
        error = (a - b).abs().max().item() / max(1.0, b.abs().max().item()) if b.numel() else 0.0
        assert a.shape == b.shape and error <= tolerance, (what, error)

    def equals_one_process():
        for split in (5, 0):
            for kind in ("mixed", "all to the first", "unused choices"):
                for weight_on in ("output", "input"):
                    whole, part, mine = data(split, kind)
                    single, shared = full_pool(), shared_pool()
                    expected, ours = work(single, *whole, weight_on), work(shared, *part, weight_on)
                    for name, a, b in zip(("y", "dx", "dweight"), ours, expected):
                        near(a, b[mine], (split, kind, weight_on, name))
                    assert shared.w13.to_local().shape == (E // 2, 2 * F, D)
                    assert torch.equal(shared.w13.full_tensor(), single.w13)
                    near(whole_gradient(shared.w13), single.w13.grad, "dw13")
                    near(whole_gradient(shared.w2), single.w2.grad, "dw2")
                    assert not whole_gradient(shared.w13)[4].any()
        whole, part, mine = data(5, "mixed")
        with torch.autocast("cpu", torch.bfloat16):
            low = work(shared_pool(), *part, "output")
        assert low[0].dtype == torch.bfloat16 and low[1].dtype == torch.float32
        near(low[0].float(), work(full_pool(), *whole, "output")[0][mine], "bf16", 2e-2)
    def trains_beside_data_parallel():
        class Layer(nn.Module):
            def __init__(self, pool):
                super().__init__()
                self.gate, self.pool = nn.Linear(D, E, bias=False), pool
                nn.init.normal_(self.gate.weight, generator=torch.Generator().manual_seed(3))
            def forward(self, x):
                score = self.gate(x).softmax(-1)
                weight, index = score.topk(K, dim=-1)
                return self.pool(x, Routing(index, weight, score))

        x = torch.randn(8, D, generator=torch.Generator().manual_seed(2))
        alone = Layer(full_pool())
        alone(x).square().mean().backward()
        layer = Layer(shared_pool(average_gradients=True))
        assert list(layer.state_dict()) == list(alone.state_dict())
        names = sharded_parameters(layer)
        assert names == ["pool.w13", "pool.w2"], names
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layer, names)
        together = DistributedDataParallel(layer)
        together(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
        near(layer.gate.weight.grad, alone.gate.weight.grad, "gate")
        near(whole_gradient(layer.pool.w13), alone.pool.w13.grad, "w13")
        near(whole_gradient(layer.pool.w2), alone.pool.w2.grad, "w2")
    def refuses_what_does_not_divide():
        try:
            expert_mesh("cpu", 3)
        except ConfigError as error:
            assert "shared by 3 processes, and there are 2; use a number that divides 2" in str(error)
        else:
            raise AssertionError("2 processes in groups of 3 were accepted")
        try:
            shared_pool(5)
        except ConfigError as error:
            assert "5 experts cannot be split over 2 processes; use a number of processes that divides 5" in str(error)
        else:
            raise AssertionError("5 experts over 2 processes were accepted")
    def differentiates_twice():
        "A penalty on gradients: what travels in the backward pass is differentiated as well."
        whole, part, mine = data(5, "mixed")
        found = []
        for pool, (x, weight, index, score, dy) in ((full_pool(), whole), (shared_pool(), part)):
            x = x.clone().requires_grad_()
            y = pool(x, Routing(index, weight, score))
            (gradient,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
        near(found[1], found[0][mine], "second derivative", 1e-5)
    def gathers_over_calls():
        "A pool that layers share: its gradients add up in place, and travel once."
        whole, part, mine = data(5, "mixed")
        found = []
        for pool, (x, weight, index, score, dy) in ((full_pool(), whole), (shared_pool(), part)):
            pool.is_shared, context, routing = True, RoutingContext(), Routing(index, weight, score)
            y = pool(pool(x, routing, context=context), routing, context=context)
            y.backward(dy)
            found.append(pool)
        for name in ("w13", "w2"):
            near(whole_gradient(getattr(found[1], name)), getattr(found[0], name).grad, name, 1e-5)
    def rows_travel_in_the_type_of_the_products():
        exchange, types = dist.all_to_all_single, []
        def watched(received, sent, *arguments, **options):
            types.append(sent.dtype)
            return exchange(received, sent, *arguments, **options)
        dist.all_to_all_single = watched
        whole, part, mine = data(5, "mixed")
        for weight_on in ("output", "input"):
            with torch.autocast("cpu", torch.bfloat16):
                work(shared_pool(), *part, weight_on)
        dist.all_to_all_single = exchange
        assert set(types) == {torch.int64, torch.bfloat16}, types
    def sums_the_gradient_of_its_weights_alone():
        "What the gradient also goes to keeps its own: this process's, not the sum."
        weight, beside = (torch.ones(3, requires_grad=True) for _ in range(2))
        spread = DTensor.from_local(weight, expert_mesh("cpu", 1), [Replicate(), Shard(0)], run_check=False)
        own, shown = torch.full((3,), rank + 1.0), beside * 2  # made first, so the backward pass comes to it last
        ((ExpertExchange(expert_mesh("cpu", 1), 2).local(spread) + shown) * own).sum().backward()
        near(weight.grad, torch.full((3,), (1.0 + 2.0) / 2), "of the weight")
        near(beside.grad, 2 * own, "beside it")
    equals_one_process()
    rows_travel_in_the_type_of_the_products()
    sums_the_gradient_of_its_weights_alone()
    gathers_over_calls()
    differentiates_twice()
    trains_beside_data_parallel()
    refuses_what_does_not_divide()
    dist.barrier()
    time.sleep(0.2)  # threads of gloo may still want the interpreter's lock, and the end would wait for them holding it
    dist.destroy_process_group()
    """
)


def test_two_processes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=-1, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
