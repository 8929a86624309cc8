"""A backward in two parts: gradients of what came in, which others wait for, at once; those of parameters later.

    found, later = backward_of_inputs([y], [dy], [x])      # found[0] is what x.grad would be
    later.finish()                                         # adds to the .grad of parameters

That is the split of zero-bubble schedules (Qi et al., arXiv 2401.10241) and of ReCycle's decoupled backward (SOSP 2024). Of an operator on
the way from inputs to outputs that a parameter enters (a matrix product), the first part computes the gradient of its input, and notes the
gradient of its output; the second computes from that the gradient of the parameter. Nothing is computed twice, and each number is made by
the same operator from the same numbers as in a backward at once, so gradients have the same bits.

A parameter that enters in several places, or that outputs depend on beside the inputs, is differentiated in the first part; so is one of an
operator written in Python, which computes all of its gradients at once, unless it says ``ctx.in_parts = True``. They are added to ``.grad``
in the second part with the others.

torch has such a split for its own pipelines (``torch.distributed.pipelining._backward``, private). In torch 2.13 it raises where two layers
share a bias, gives two parameters one tensor as gradient where both are added to an activation, so that the second micro-batch counts
twice in each, and leaves out what outputs depend on beside the inputs. It also keeps all that the graph keeps until the second part; here
what only the first part needed (weights of attention, what activations keep) is let go of in between, where the forward ran under
`SavedBytes.watch` with a list that is passed on as ``saved``.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from anabranch.cluster.saved_bytes import Held, SavedBytes, SavedTensor, touched

__all__ = ["Later", "backward_of_inputs"]

_LEAF = "torch::autograd::AccumulateGrad"
# Operators that do not tell what they keep; by the second name others have it.
_OPAQUE = ("CppFunction", "CopySlices")
_RAW = "_raw_saved_"


class Later:
    """Gradients of parameters that are put off. What they need is kept until `finish`, or until this is let go of.

    Args:
        parts: by an operator, the gradients of its outputs and the parameters that enter there alone.
        found: (parameter, its gradient) of those that are known already.
        whole: roots and their gradients, where all is put off.
        held: counts the gradients that are kept.
    """

    def __init__(
        self,
        parts: dict[Node, tuple[tuple[Tensor | None, ...], list[Tensor]]],
        found: Sequence[tuple[Tensor, Tensor]] = (),
        whole: tuple[list[Tensor], list[Tensor | None]] | None = None,
        held: Held | None = None,
    ) -> None:
        self._parts, self._found, self._whole, self._held = parts, list(found), whole, held

    def finish(self) -> None:
        """Add the gradients to the parameters' own. Once."""
        try:
            if self._whole is not None:
                torch.autograd.backward(*self._whole)
            for node, (gradients, leaves) in self._parts.items():
                self._backward_from(node, gradients, leaves)
            for leaf, gradient in self._found:
                leaf.grad = _own(leaf, gradient) if leaf.grad is None else _added(leaf.grad, gradient)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of all that is kept."""
        self._parts, self._found, self._whole = {}, [], None
        if self._held is not None:
            self._held.release()

    @staticmethod
    def _backward_from(node: Node, gradients: tuple[Tensor | None, ...], leaves: list[Tensor]) -> None:
        edges = [(GradientEdge(node, n), gradient) for n, gradient in enumerate(gradients) if gradient is not None]
        if not edges:
            return
        # What hooks of tensors did to the gradient the first time they would do again.
        with _before([(node, lambda _: gradients)]):
            torch.autograd.backward([edge for edge, _ in edges], [gradient for _, gradient in edges], inputs=leaves)


def backward_of_inputs(
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    *,
    meter: SavedBytes | None = None,
    saved: Iterable["weakref.ref[SavedTensor]"] = (),
) -> tuple[list[Tensor | None], Later]:
    """(gradients of ``inputs``, None where there is none; what is put off). The ``.grad`` of no tensor changes.

    Args:
        roots: what is differentiated.
        gradients: of each; None for 1, of a single number.
        inputs: leaves; of those that need no gradient there is none. Where none needs one, all of the backward is put off.
        meter: counts gradients that are noted for later, beside what autograd keeps.
        saved: what autograd keeps for this backward alone; what is not needed for what is put off is let go of.

    Hooks of a parameter that are called after its ``.grad`` has changed (``register_post_accumulate_grad_hook``) are not called for those
    that are differentiated in the first part.
    """
    learning = [tensor for tensor in inputs if tensor.requires_grad]
    if not roots or not learning:
        return [None] * len(inputs), Later({}, whole=(list(roots), list(gradients)) if roots else None)
    graph = _Graph(roots, learning)
    noted: dict[Node, tuple[Tensor | None, ...]] = {}
    wanted = [*learning, *graph.early]
    with _before([(node, lambda found, node=node: noted.update({node: found})) for node in graph.late]):
        found = torch.autograd.grad(roots, wanted, list(gradients), retain_graph=bool(graph.late), allow_unused=True)
    parts = {node: (noted[node], leaves) for node, leaves in graph.late.items() if node in noted}
    _let_go(saved, graph.waiting)
    known = [
        (leaf, gradient)
        for leaf, gradient in zip(graph.early, found[len(learning) :], strict=True)
        if gradient is not None
    ]
    held = None
    if meter is not None:
        kept = [gradient for found, _ in parts.values() for gradient in found if gradient is not None]
        held = meter.hold(*kept, *(gradient for _, gradient in known))
    of_inputs = iter(found)
    return [next(of_inputs) if tensor.requires_grad else None for tensor in inputs], Later(parts, known, held=held)


class _Graph:
    """Which parameters wait, and which do not.

    Attributes:
        late: by an operator on the way from inputs to roots, the parameters that enter there and nowhere else.
        early: all others that roots depend on.
        waiting: what runs for ``late``: these operators, and others from there to the parameters.
    """

    def __init__(self, roots: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        self._tops = {get_gradient_edge(root).node for root in roots}
        self._sources = {get_gradient_edge(tensor).node for tensor in inputs}
        # By a node, those that hand it a gradient.
        self._givers: dict[Node, list[Node]] = {node: [] for node in self._tops}
        waiting = [*self._givers]
        while waiting:
            node = waiting.pop()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                if following not in self._givers:
                    self._givers[following] = []
                    waiting.append(following)
                self._givers[following].append(node)
        self._way = set(self._above(self._sources & self._givers.keys(), ()))
        self.late: dict[Node, list[Tensor]] = {}
        self.early: list[Tensor] = []
        self.waiting: set[Node] = set()
        for node in self._givers:
            if node.name() == _LEAF and node not in self._sources:
                self._place(node)

    def _place(self, leaf: Node) -> None:
        variable: Any = leaf.variable  # type: ignore[attr-defined]  # of this kind of node
        reached = set(self._above([leaf], self._way))
        enters = reached & self._way
        at = next(iter(enters), None)
        # A parameter that reaches a root beside the way has gradients that no node of the way hands on.
        is_beside = bool((reached - self._way) & self._tops)
        if at is None or len(enters) > 1 or is_beside or not _works_in_parts(at):
            self.early.append(variable)
        else:
            self.late.setdefault(at, []).append(variable)
            self.waiting |= reached

    def _above(self, nodes: Iterable[Node], ends: Iterable[Node]) -> Iterator[Node]:
        """Nodes, those that hand them gradients, and so on; not beyond ``ends``."""
        waiting = list(nodes)
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            yield node
            if node in ends:
                continue
            for giver in self._givers[node]:
                if giver not in seen:
                    seen.add(giver)
                    waiting.append(giver)


def _own(leaf: Tensor, gradient: Tensor) -> Tensor:
    """A gradient as the leaf's own: it may be part of another tensor, or have other strides. One that is sparse stays so."""
    return torch.empty_like(leaf).copy_(gradient) if gradient.layout == leaf.layout else gradient.clone()


def _added(there: Tensor, gradient: Tensor) -> Tensor:
    """Their sum, where autograd would make it: in place, but for a dense one to what is sparse."""
    if there.layout != gradient.layout and gradient.layout == torch.strided:
        return gradient + there
    return there.add_(gradient)


def _works_in_parts(node: Node) -> bool:
    """Whether an operator computes the gradients that it is asked for alone."""
    return not isinstance(node, BackwardCFunction) or bool(getattr(node, "in_parts", False))


def _let_go(saved: Iterable["weakref.ref[SavedTensor]"], needed_by: Iterable[Node]) -> None:
    """Let go of all that is saved but what some operators will ask for."""
    with touched() as needed:
        for node in needed_by:
            if type(node).__name__ in _OPAQUE:
                return
            if isinstance(node, BackwardCFunction):
                _ = node.saved_tensors
                continue
            for name in dir(type(node)):
                if name.startswith(_RAW):
                    getattr(node, name.replace(_RAW, "_saved_"))
    for reference in saved:
        kept = reference()
        if kept is not None and kept not in needed:
            kept.let_go()


@contextmanager
def _before(hooks: Iterable[tuple[Node, Any]]) -> Iterator[None]:
    """Call hooks before nodes."""
    handles = [node.register_prehook(hook) for node, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
