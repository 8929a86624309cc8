"""What ranks give each other in a step, beside what goes from layer to layer: parts of gradients, new weights, norms, whole models."""
# Shapes: N numbers of a layer

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anabranch.cluster.elastic.execution import StageStep, StepSettings, Work
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.norms import Squares
from anabranch.cluster.elastic.state import PARAM, Slice
from anabranch.cluster.elastic.tree import TreeSum

__all__ = ["clipped", "gathered", "reduced", "whole_slices", "whole_weights"]


def reduced(
    links: LinkPool, work: Work, settings: StepSettings, sizes: Sequence[int], run: StageStep
) -> tuple[dict[int, Tensor], dict[int, frozenset[int]]]:
    """(the gradient of this rank's slices, of all samples; by layer, the parameters that have no part in the step, for nobody).

    Nodes of sums go to the owners, who add them up in the tree's order.
    """
    rank, stage = work.rank, work.layout.grid.stages[work.stage]
    owners = {layer: work.layout.slices(layer, sizes[layer]) for layer in work.layers}
    tag = f"r{run.step}"
    nodes = {layer: list(run.sums[layer].nodes()) for layer in work.layers}
    for other in stage:
        if other == rank:
            continue
        told, parts = [], []
        for layer in work.layers:
            for owner, first, end in owners[layer]:
                if owner == other:
                    told += [[layer, *node] for node, _ in nodes[layer]]
                    parts += [value[first:end] for _, value in nodes[layer]]
        gone = [[layer, sorted(run.without[layer])] for layer in work.layers if run.without[layer]]
        links.send(other, tag, parts, nodes=told, without=gone)
    mine = {layer: (first, end) for layer in work.layers for owner, first, end in owners[layer] if owner == rank}
    sums: dict[int, TreeSum[Tensor]] = {layer: TreeSum(settings.leaves(len(stage))) for layer in mine}
    for layer, (first, end) in mine.items():
        for node, value in nodes[layer]:
            sums[layer].add_node(node, value[first:end])
    without = {layer: run.without[layer] for layer in mine}
    for other in stage:
        if other != rank:
            parts, header = links.receive(other, tag)
            for (layer, level, place), value in zip(header["nodes"], parts, strict=True):
                sums[layer].add_node((level, place), value)
            theirs = dict(header["without"])
            without = {layer: missing.intersection(theirs.get(layer, ())) for layer, missing in without.items()}
    return {layer: tree.root() for layer, tree in sums.items()}, without


def clipped(
    links: LinkPool, work: Work, gradients: Mapping[int, Tensor], step: int, most: float | None
) -> tuple[dict[int, Tensor], float]:
    """(gradients whose norm over all ranks is at most ``most``, that norm before), the same bits however slices are cut.

    As `torch.nn.utils.clip_grad_norm_` does it. The norm is infinite where a number is not finite; then nothing is clipped.
    """
    mine = Squares.sum(Squares.of(value) for value in gradients.values())
    first, *others = work.layout.grid.ranks
    if work.rank == first:
        told = [links.receive(rank, f"n{step}")[1]["squares"] for rank in others]
        norm = Squares.sum([mine, *(Squares(*one) for one in told)]).root()
        for rank in others:
            links.send(rank, f"N{step}", [], norm=norm.hex())
    else:
        links.send(first, f"n{step}", [], squares=mine.told())
        norm = float.fromhex(links.receive(first, f"N{step}")[1]["norm"])
    if most is None or not most < norm < float("inf"):
        return dict(gradients), norm
    factor = most / (norm + 1e-6)
    return {layer: value * factor for layer, value in gradients.items()}, norm


def gathered(
    links: LinkPool, work: Work, sizes: Sequence[int], slices: Mapping[int, Slice], step: int
) -> dict[int, Tensor]:
    """Whole weights ``[N]`` of the stage's layers, of the new slices of all its ranks."""
    rank, stage = work.rank, work.layout.grid.stages[work.stage]
    tag, order = f"w{step}", sorted(slices)
    for other in stage:
        if other != rank:
            links.send(other, tag, [slices[layer].tensors[PARAM] for layer in order], layers=order)
    parts = {(layer, rank): slices[layer].tensors[PARAM] for layer in order}
    for other in stage:
        if other != rank:
            received, header = links.receive(other, tag)
            parts |= {(layer, other): value for layer, value in zip(header["layers"], received, strict=True)}
    flat = {}
    for layer in work.layers:
        owners = work.layout.slices(layer, sizes[layer])
        flat[layer] = torch.cat([parts[layer, owner] for owner, _, _ in owners]) if owners else torch.empty(0)
    return flat


def whole_weights(links: LinkPool, work: Work, flat: Mapping[int, Tensor], tag: str) -> dict[int, Tensor]:
    """Weights of the layers that this rank's stage does not have, from the first rank of each stage. All ranks take part."""
    rank, grid = work.rank, work.layout.grid
    found: dict[int, Tensor] = {}
    for stage in grid.stages:
        if stage[0] == rank:
            for other in grid.ranks:
                if other not in stage:
                    links.send(other, tag, [flat[layer] for layer in work.layers])
    for number, stage in enumerate(grid.stages):
        if rank not in stage:
            received, _ = links.receive(stage[0], tag)
            found |= dict(zip(work.layout.parts[number], received, strict=True))
    return found


def whole_slices(
    links: LinkPool, work: Work, sizes: Sequence[int], slices: Mapping[int, Slice], tag: str
) -> dict[int, Slice] | None:
    """Each layer with its optimizer state, whole, at the first rank of all; None elsewhere. All ranks take part."""
    rank, (first, *others) = work.rank, work.layout.grid.ranks
    order = sorted(slices)
    if rank != first:
        told = [slices[layer].told() for layer in order]
        links.send(
            first,
            tag,
            [tensor for _, tensors in told for tensor in tensors],
            layers=order,
            told=[head for head, _ in told],
        )
        return None
    pieces: dict[int, list[Slice]] = {layer: [own] for layer, own in slices.items()}
    for other in others:
        tensors, header = links.receive(other, tag)
        place = 0
        for layer, head in zip(header["layers"], header["told"], strict=True):
            count = len(head[2]) + len(head[3])
            pieces.setdefault(layer, []).append(Slice.heard(head, tensors[place : place + count]))
            place += count
    return {layer: Slice.joined(0, size, pieces[layer]) for layer, size in enumerate(sizes) if size}
