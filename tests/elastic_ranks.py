"""What ranks of elastic training do in tests: a small model with dropout, batches by step, and ends where a test wants them."""

import errno
import os
import signal
import time
from dataclasses import replace

import torch
from torch import nn

from anabranch.cluster import KeyedDropout
from anabranch.cluster.elastic import ElasticTrainer
from anabranch.cluster.elastic import trainer as trainer_module
from anabranch.errors import AnabranchError, CheckpointError

SECRET = "elastic"
WIDTH, CLASSES, LAYERS = 6, 3, 6


def layers_of(seed=0, *, dtype=torch.float32, dropout="keyed", rate=0.3):
    torch.manual_seed(seed)
    made = []
    for number in range(LAYERS - 1):
        drop = KeyedDropout(rate, layer=number) if dropout == "keyed" else nn.Dropout(rate)
        # Of unequal sizes, one of them smaller than a stage has ranks.
        made.append(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=number % 2 == 0), nn.Tanh(), drop))
    made.append(nn.Linear(WIDTH, CLASSES))
    made[2] = nn.Sequential(made[2], Scale())
    return [layer.to(dtype) for layer in made]


def raise_at(count):
    """A hook that divides by zero when it is called for the ``count``-th time."""
    left = [count]

    def hook(*told):
        left[0] -= 1
        1 / (left[0] > 0)

    return hook


def no_room(*told):
    """As a disk that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Told:
    """A context that keeps an error of another rank's own making, where it is to be told and not to end the process."""

    def __init__(self, is_kept):
        self.is_kept, self.error = is_kept, None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, *more):
        # What the coordinator says ends the process as ever, unless all is to be told.
        self.error = error
        return self.is_kept == "all" or (self.is_kept and not isinstance(error, AnabranchError))


def damage(trainer, owner):
    """Turn a bit of all that this rank keeps of another."""
    with trainer._links.changed:
        for (_, of), versions in trainer._snapshots.held.items():
            if of == owner:
                for version, snapshot in versions.items():
                    wrong = bytearray(snapshot.body)
                    wrong[len(wrong) // 2] ^= 16
                    versions[version] = replace(snapshot, body=bytes(wrong))


class Scale(nn.Module):
    """One number."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.by


def batch_of(step, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def halved(step):
    return 0.5 ** (step // 4)


OPTIONS = {"mesh": (2, 2), "global_batch": 10, "micro_batches": 3, "seed": 5, "learning_rate": halved}


def train(rank, world, address, steps, options=None, die=None, pace_s=0.0, own=None):
    """Train to ``steps`` steps. ``die``: {rank: (state, which time)}; the process ends there as if its machine did."""
    given = {**OPTIONS, **(options or {}), **(own or {}).get(rank, {})}
    dtype = given.pop("dtype", torch.float32)
    model = {name: given.pop(name) for name in ("dropout", "rate") if name in given}
    # Of another model: (its layers of a type, its batch of a step, a size and a type).
    made_by, batch = given.pop("makes", (None, batch_of))
    layers = made_by(dtype) if made_by else layers_of(given.pop("model_seed", 0), dtype=dtype, **model)
    place, left = (die or {}).get(rank, ("", 0))
    saves, unsaved = given.pop("saves", None), []
    damages_stream = given.pop("damage_stream", False)
    damaged, raising = given.pop("damage", None), given.pop("raises", None)
    raises_after, quits_after = given.pop("raises_after", None), given.pop("quits_after", None)
    raises_at_step, tells = given.pop("raises_at_step", None), given.pop("tells", False)
    pace_s, pace_step = given.pop("pace_s", pace_s), given.pop("pace_step", None)
    # By state, seconds for which this rank is there and does nothing; and likewise before a step, (step, seconds).
    naps, stuck = given.pop("naps", {}), given.pop("stuck", (None, 0))
    cuts = given.pop("cuts", None)
    full_from = given.pop("full_from", None)
    built, epochs = [], []

    def loss(output, target):
        if built and built[0].steps == raises_at_step:
            raise ZeroDivisionError("as every rank does")
        return nn.functional.cross_entropy(output, target)

    def probe(state):
        nonlocal left
        if state == "vote" and built and built[0]._member.stream is not None:
            state = "vote in stream"
        if state == "save" and full_from is not None and built[0].steps > full_from:
            trainer_module.write_slices = no_room
        if state == "moves" and damaged is not None and built:
            damage(built[0], damaged)
        if state == "epoch" and damages_stream and built and built[0]._member.stream is not None:
            for piece in built[0]._member.stream._shadows.values():
                piece.tensors["param"][0] += 1
        time.sleep(naps.get(state, 0))
        if state == place:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    made = ElasticTrainer(
        layers,
        optimizer_factory=adam,
        loss=loss,
        coordinator=address,
        secret=SECRET,
        wish=rank,
        probe=probe,
        on_epoch_change=epochs.append,
        **given,
    )
    told = Told(tells)
    with told, made as trainer:
        built.append(trainer)
        if raising is not None:
            # What comes later nobody compares.
            layers[raising].register_forward_hook(raise_at(3))
        losses = {}
        began = trainer.steps
        while trainer.steps < steps:
            step = trainer.steps
            if step == stuck[0]:
                time.sleep(stuck[1])
            losses[step] = trainer.step(batch(step, given["global_batch"], dtype))
            if trainer.steps == raises_after:
                raise OSError("no more data")
            if trainer.steps == quits_after:
                trainer.close(is_done=False)
                return {"rank": trainer.rank, "losses": losses}
            time.sleep(pace_s)
            if cuts is not None and trainer.steps == 4:
                trainer._links._channels[cuts].close("cut by a test")
            if saves is not None and trainer.steps in saves[1]:
                try:
                    trainer.save(saves[0])
                except CheckpointError as error:
                    unsaved.append(str(error))
            if pace_step is not None and step >= pace_step:
                # Until the one that comes is in; not for ever, so that a test that waits for it fails and does not hang.
                time.sleep(0.0 if 4 in trainer.status()["stages"][0] else 0.05)
        owned, digest, status = trainer.owned(), trainer.digest(), trainer.status()
        weights = {name: value.tolist() for name, value in trainer.state_dict().items()}
        return {
            "losses": losses,
            "began": began,
            "owned": owned,
            "digest": digest,
            "status": status,
            "weights": weights,
            "rank": trainer.rank,
            "unsaved": unsaved,
            "epochs": epochs,
            "sent": dict(trainer._links.sent_bytes),
        }
    return {"rank": made.rank, "losses": {}, "error": f"{type(told.error).__name__}: {told.error}"}


def alone(steps, options=None, *, by_block=True):
    """The same training in one process, as torch does it: losses and weights."""
    given = {**OPTIONS, **(options or {})}
    dtype = given.get("dtype", torch.float32)
    layers = layers_of(dtype=dtype)
    model = nn.Sequential(*layers)
    optimizer = adam(model.parameters())
    losses = []
    for step in range(steps):
        for module in model.modules():
            if isinstance(module, KeyedDropout):
                module.step, module.first_row, module.run_seed = step, 0, given["seed"]
        x, target = batch_of(step, given["global_batch"], dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * halved(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in model.state_dict().items()}
