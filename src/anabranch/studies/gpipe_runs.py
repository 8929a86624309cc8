"""The runs of the study of GPipe (`anabranch.studies.gpipe`): a config and a function for each part."""
# Shapes: B sequences, L positions, K stages, M micro-batches

import itertools
import statistics
import time
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.cluster import GPipe, SavedBytes
from anabranch.cluster.gpipe.pipe import Checkpoint
from anabranch.cluster.ranks import run_ranks
from anabranch.config import Config, configclass
from anabranch.data import DataConfig
from anabranch.studies.harness import Metrics, Progress

_MODES: tuple[Checkpoint, ...] = ("always", "except_last", "never")


@configclass
class Exact(Config):
    """Gradients of every way against the unsplit model's: ``mlp``, ``cnn`` or ``lm``."""

    model: str
    stages: tuple[int, ...] = (1, 2, 4)
    micro_batches: tuple[int, ...] = (1, 2, 3, 8)
    items: int = 8


@configclass
class Bubble(Config):
    """K ranks whose stages sleep."""

    stages: int
    micro_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    sleep_s: float = 0.03
    repeats: int = 3


@configclass
class Speed(Config):
    """Two ranks of one thread against one process of one thread, on transformer layers."""

    width: int = 256
    layers: int = 8
    sequences: int = 16
    length: int = 128
    micro_batches: int = 8
    rounds: int = 5


@configclass
class Memory(Config):
    """Bytes that are kept, over depth."""

    depths: tuple[int, ...] = (8, 16, 32, 64)
    width: int = 128
    items: int = 512
    micro_batches: int = 16
    # Of a budget that is filled by the deepest model that fits.
    budget_depth: int = 16


@configclass
class Transparency(Config):
    """A small language model of text, trained in so many stages."""

    stages: int
    steps: int = 300
    width: int = 64
    layers: int = 4
    batch: int = 16
    length: int = 64
    micro_batches: int = 4

    def content_digest(self) -> str:
        """Of the text that is learned."""
        return DataConfig(sequence_length=self.length).content_digest()


Part = Exact | Bubble | Speed | Memory | Transparency


def run(config: Part, seed: int, progress: Progress) -> Metrics:
    """One arm of any part."""
    if isinstance(config, Exact):
        return run_exact(config, seed)
    if isinstance(config, Bubble):
        return run_bubble(config, progress)
    if isinstance(config, Speed):
        return run_speed(config, seed)
    return run_memory(config, seed) if isinstance(config, Memory) else run_transparency(config, seed, progress)


# E1


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(F.relu(self.norm(x)))
        return x + mixed


def model_of(name: str, seed: int, *, norms_in_evaluation: bool = False) -> nn.Sequential:
    """A small model in float64. A batch norm's statistics are a micro-batch's by definition, so its gradients are compared without."""
    torch.manual_seed(seed)
    layers: list[nn.Module]
    if name == "mlp":
        layers = [part for _ in range(4) for part in (nn.Linear(16, 16), nn.Tanh())]
    elif name == "cnn":
        layers = [nn.Conv2d(3, 8, 3, padding=1), *(_Residual(8) for _ in range(4)), nn.Flatten(), nn.Linear(8 * 36, 4)]
    else:
        layers = [nn.Embedding(31, 16)]
        layers += [
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(4)
        ]
        layers += [nn.Linear(16, 31)]
    model = nn.Sequential(*layers).double()
    if norms_in_evaluation:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model


def data_of(name: str, items: int, seed: int) -> tuple[Tensor, Tensor]:
    """A batch of random numbers, or of random tokens."""
    generator = torch.Generator().manual_seed(seed + 1)
    if name == "lm":
        tokens = torch.randint(31, (2, items, 12), generator=generator)
        return tokens[0], tokens[1]
    shape, out = ((items, 16), (items, 16)) if name == "mlp" else ((items, 3, 6, 6), (items, 4))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, out))  # type: ignore[return-value]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of tokens, squares of numbers."""
    if target.dtype == torch.int64:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())
    return F.mse_loss(output, target)


def run_exact(config: Exact, seed: int) -> Metrics:
    """``gradient``: the largest relative difference over all ways; ``statistics``: of deferred running statistics; ``ways``."""
    x, target = data_of(config.model, config.items, seed)
    whole = model_of(config.model, seed, norms_in_evaluation=True)
    loss_of(whole(x), target).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    worst, ways = 0.0, 0
    for stages, micro_batches, mode in itertools.product(config.stages, config.micro_batches, _MODES):
        for schedule in ("gpipe", "1f1b"):
            pipe = GPipe(
                model_of(config.model, seed, norms_in_evaluation=True),
                stages,
                micro_batches,
                mode,
                schedule=schedule,
            )
            pipe.step(x, target, loss_of)
            for name, parameter in pipe.named_parameters():
                assert parameter.grad is not None
                scale = wanted[name].abs().max()
                worst = max(worst, float((parameter.grad - wanted[name]).abs().max() / scale))
            ways += 1
    return {
        "gradient": worst,
        "ways": ways,
        **({"statistics": _statistics(config, seed)} if config.model == "cnn" else {}),
    }


def _statistics(config: Exact, seed: int) -> float:
    """The largest relative difference of the first batch norm's running statistics: deeper ones see other inputs."""
    x, target = data_of("cnn", config.items, seed)
    whole = model_of("cnn", seed)
    whole(x)
    expected = next(module for module in whole.modules() if isinstance(module, nn.BatchNorm2d))
    worst = 0.0
    for micro_batches, mode in itertools.product(config.micro_batches, _MODES):
        model = model_of("cnn", seed)
        GPipe(model, 2, micro_batches, mode, deferred_batch_norm=True).step(x, target, loss_of)
        found = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        for name in ("running_mean", "running_var"):
            one, other = getattr(found, name), getattr(expected, name)
            worst = max(worst, float((one - other).abs().max() / other.abs().max()))
    return worst


# E2


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None


class Sleeping(nn.Module):
    """Takes the same time forward and backward, and no processor."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` times 1, later."""
        made: Tensor = _Sleep.apply(x * self.weight, self.seconds)
        return made


def sleeping_steps(rank: int, world: int, micro_batches: tuple[int, ...], sleep_s: float, repeats: int) -> list[float]:
    """Seconds of a step for each M: medians, in a rank."""
    taken = []
    for number in micro_batches:
        model = nn.Sequential(*(Sleeping(sleep_s) for _ in range(world)))
        pipe = GPipe(model, micro_batches=number, checkpoint="never", runner="distributed")
        x = torch.zeros(number, 4)
        times = []
        # The first step exchanges headers.
        for _ in range(repeats + 1):
            dist.barrier()
            begin = time.perf_counter()
            pipe.step(x, x, F.mse_loss)
            dist.barrier()
            times.append(time.perf_counter() - begin)
        taken.append(statistics.median(times[1:]))
    return taken


def run_bubble(config: Bubble, progress: Progress) -> Metrics:
    """``time_off``: the largest |measured / law - 1| over M; ``idle_off``: the largest difference of idle shares."""
    law_s = [(number + config.stages - 1) * 2 * config.sleep_s for number in config.micro_batches]
    progress(f"{config.stages} ranks, M = {', '.join(map(str, config.micro_batches))}")
    bound = 60 + 4 * (config.repeats + 1) * sum(law_s)
    taken = run_ranks(
        sleeping_steps, config.stages, config.micro_batches, config.sleep_s, config.repeats, timeout_s=bound
    )[0]
    idle = [1 - number * 2 * config.sleep_s / found for number, found in zip(config.micro_batches, taken, strict=True)]
    wanted = [(config.stages - 1) / (number + config.stages - 1) for number in config.micro_batches]
    return {
        "time_off": max(abs(found / law - 1) for found, law in zip(taken, law_s, strict=True)),
        "idle_off": max(abs(found - law) for found, law in zip(idle, wanted, strict=True)),
        "seconds": taken,
    }


# E3


def transformer(width: int, layers: int, seed: int) -> nn.Sequential:
    """Layers of torch's own."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
    )


def timed_steps(rank: int, world: int, table: dict[str, int], seed: int, rounds: int) -> dict[str, Any]:
    """Seconds and losses of steps, of a pipeline where there are two ranks and of the model alone otherwise; and seconds of products."""
    model = transformer(table["width"], table["layers"], seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, table["sequences"], table["length"], table["width"])
    x, target = torch.randn(shape, generator=generator).unbind()
    pipe = None
    if world > 1:
        half = [table["layers"] // world] * world
        pipe = GPipe(
            model, balance=half, micro_batches=table["micro_batches"], checkpoint="never", runner="distributed"
        )
    learns = model if pipe is None else pipe
    optimizer = torch.optim.SGD(learns.parameters(), 1e-2)
    a = torch.randn(512, 512)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(60):
        a @ a
    products = time.perf_counter() - begin
    times, losses = [], []
    for _ in range(rounds + 1):
        optimizer.zero_grad()
        dist.barrier()
        begin = time.perf_counter()
        if pipe is None:
            loss = F.mse_loss(model(x), target)
            loss.backward()
        else:
            loss = pipe.step(x, target, F.mse_loss)
        dist.barrier()
        times.append(time.perf_counter() - begin)
        losses.append(float(loss))
        optimizer.step()
    return {"seconds": statistics.median(times[1:]), "losses": losses, "products": products}


def run_speed(config: Speed, seed: int) -> Metrics:
    """``speedup`` over one process, ``loss_off``: the largest relative difference of a loss, ``cores``: speed of two at once over one."""
    table = {
        "width": config.width,
        "layers": config.layers,
        "sequences": config.sequences,
        "length": config.length,
        "micro_batches": config.micro_batches,
    }
    one = run_ranks(timed_steps, 1, table, seed, config.rounds, timeout_s=600)[0]
    two = run_ranks(timed_steps, 2, table, seed, config.rounds, timeout_s=600)
    off = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(two[0]["losses"], one["losses"], strict=True))
    return {
        "speedup": one["seconds"] / two[0]["seconds"],
        "loss_off": off,
        "cores": one["products"] / max(found["products"] for found in two),
        "step_ms": two[0]["seconds"] * 1e3,
    }


# E4


def kept_bytes(config: Memory, depth: int, mode: Checkpoint | Literal["naive"], stages: int, seed: int) -> float:
    """The most bytes that the fullest stage keeps between forward and backward; ``naive`` is the unsplit model with its whole batch."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh()) for _ in range(depth)))
    x, target = torch.randn(2, config.items, config.width).unbind()
    if mode == "naive":
        with SavedBytes(ignored=model.parameters()) as meter:
            F.mse_loss(model(x), target).backward()
        return float(meter.most)
    pipe = GPipe(model, stages, config.micro_batches, mode)
    meters = pipe.measure_saved()
    pipe.step(x, target, F.mse_loss)
    return float(max(meter.most for meter in meters))


def run_memory(config: Memory, seed: int) -> Metrics:
    """``slope_ratio`` of ``always`` over ``naive``, and how much deeper than naive fits a budget on one stage and on four."""
    depths = config.depths
    modes: tuple[Checkpoint | Literal["naive"], ...] = ("naive", "never", "always")
    curves = {mode: [kept_bytes(config, depth, mode, 1, seed) for depth in depths] for mode in modes}
    slopes = {mode: (curve[-1] - curve[0]) / (depths[-1] - depths[0]) for mode, curve in curves.items()}
    budget = kept_bytes(config, config.budget_depth, "naive", 1, seed)
    deepest = {stages: _deepest(config, stages, budget, seed) for stages in (1, 4)}
    return {
        "slope_ratio": slopes["always"] / slopes["naive"],
        "never_ratio": slopes["never"] / slopes["naive"],
        "depth_gain_1": deepest[1] / config.budget_depth,
        "depth_gain_4": deepest[4] / config.budget_depth,
        "curves": curves,
    }


def _deepest(config: Memory, stages: int, budget: float, seed: int) -> int:
    """The largest depth whose fullest stage keeps no more than the budget, to a sixteenth."""
    low, high = stages, config.budget_depth * 64
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        fits = kept_bytes(config, middle, "always", stages, seed) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low


# E5


def run_transparency(config: Transparency, seed: int, progress: Progress) -> Metrics:
    """``validation``: nats per token after training; ``first`` and ``last`` training losses."""
    data = DataConfig(sequence_length=config.length).build()
    torch.manual_seed(seed)
    vocab = data.tokenizer.vocab_size
    model = nn.Sequential(
        nn.Embedding(vocab, config.width),
        *(Causal(config.width) for _ in range(config.layers)),
        nn.LayerNorm(config.width),
        nn.Linear(config.width, vocab),
    )
    pipe = GPipe(model, config.stages, config.micro_batches, seed=seed)
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    stream = data.train(seed=seed)
    losses = []
    for step in range(config.steps):
        batch = stream.next_batch(config.batch)
        optimizer.zero_grad()
        losses.append(float(pipe.step(batch.token_BL, batch.target_BL, token_loss)))
        optimizer.step()
        if step % 50 == 0:
            progress(f"step {step} of {config.steps}, loss {losses[-1]:.3f}")
    pipe.eval()
    total, count = 0.0, 0
    for batch in data.validation(batch_size=config.batch, num_windows=4 * config.batch):
        total += float(token_loss(pipe(batch.token_BL), batch.target_BL)) * len(batch.token_BL)
        count += len(batch.token_BL)
    return {"validation": total / count, "first": losses[0], "last": losses[-1]}


class Causal(nn.Module):
    """A block of attention and feed-forward with dropout, which sees what came before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, D]`` to the same."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        made: Tensor = self.layer(x, src_mask=mask, is_causal=True)
        return made


def token_loss(logits_BLV: Tensor, target_BL: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten())
