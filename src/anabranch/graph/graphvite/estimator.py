"""`GraphVite`: the estimator, which puts the pieces together."""
# Shapes: N nodes, D dim, E edges asked for, S samples of a pool

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.arguments import params_of_file
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.graphvite import settings, storage
from anabranch.graph.graphvite.augmentation import Sampler
from anabranch.graph.graphvite.distributed import DistributedExecutor, ShareSampler
from anabranch.graph.graphvite.executor import BlockExecutor, Plan, ThreadExecutor
from anabranch.graph.graphvite.partition import Partition, negative_tables, zig_zag
from anabranch.graph.graphvite.parts import SIDES, MappedParts, Parts
from anabranch.graph.graphvite.schedule import blocks_in_order
from anabranch.graph.graphvite.solver import Callback, Counters, diverged, train
from anabranch.graph.graphvite.torch_executor import TorchExecutor, auto_micro_batch, devices_of
from anabranch.graph.graphvite.train import Rule
from anabranch.graph.header import described, whole
from anabranch.graph.masks import unmasked
from anabranch.graph.names import check_saved_names
from anabranch.graph.store import Graph
from anabranch.graph.workers import num_workers

_NOT_SAVED = ("callbacks",)


class GraphVite(Estimator):
    """Node embedding by skip-gram with negative sampling on walks made as they are needed, trained block by block without races.

    Args:
        dim: D.
        model: ``deepwalk``, ``line`` (the same with the pseudo shuffle), or ``node2vec`` (walks of second order).
        epochs: positive samples over edges (an undirected edge counted once), at most 1,000,000.
        augmentation: s, the distance up to which two nodes of a walk are a positive; ``auto``: floor(ln 1600 / ln(E / N)), 1 to 10.
        walk_length: L, edges of a walk, at most 65,536. A walk gives at most 16,777,216 samples.
        negatives: K, per positive.
        negative_weight: w, what one negative counts for.
        lr: the first rate; it falls linearly to 1e-4 of it.
        weight_decay: wd.
        optimizer: ``sgd``, ``momentum``, ``adagrad``, ``rmsprop`` or ``adam``.
        partitions: P; ``auto``: 4, or more where ``memory_limit`` needs it. The result depends on it.
        group: blocks of an orthogonal step, a divisor of P; ``auto``: P. The result depends on it. Out of memory, ``group=workers`` halves
            the reads.
        workers: threads or devices that train at once (at most P); None for the usable cores, or one device. The result does not depend on
            it.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``cuda:*`` for all of them.
        executor: ``threads`` (CPU kernels), ``torch`` (micro-batches on ``device``), ``distributed`` (a process per worker: every
            process of an initialised `torch.distributed` group calls `fit` with the same graph), or ``auto``: by the device.
        memory_limit: bytes of parameters (with moments) in memory, or with ``torch`` on each device; beyond it parts are moved as
            the schedule needs them. None: no limit.
        p, q: of node2vec: how little walks go back, and how little they go far.
        shuffle_base: b of the pseudo shuffle; ``auto``: s for ``line``, else 1 (none). A given ``pool_size`` must be a multiple.
        pool_size: positive samples of a pool; two are held, 8 bytes a sample.
        micro_batch: of the torch executor, positives whose gradients are added up before they are applied; ``auto``: as many as bring the
            busiest node at most 8 times, 1 to 8192.
        samplers: threads that make the next pool while one is trained; 0: in turn with training, by the threads of the workers.
        normalize: give rows of length 1 from `transform`.
        isolated: ``keep`` the first values of nodes without edges, or make them ``zero``. `is_trained_N` says which they are.
        scratch: folder of the files of parameters out of memory. Default: the system's for temporary files.
        callbacks: called with `Progress` after each pool; one that returns False ends training, and `resume` goes on.
        seed: of everything. One seed gives one result, to the bit with CPU threads.

    Raises:
        InputError: an argument has a value it may not have.
    """

    def __init__(
        self,
        dim: int = 128,
        *,
        model: str = "deepwalk",
        epochs: float = 2000,
        augmentation: int | str = "auto",
        walk_length: int = 40,
        negatives: int = 1,
        negative_weight: float = 5.0,
        lr: float = 0.025,
        weight_decay: float = 0.005,
        optimizer: str = "sgd",
        partitions: int | str = "auto",
        group: int | str = "auto",
        workers: int | None = None,
        device: str = "cpu",
        executor: str = "auto",
        memory_limit: int | None = None,
        p: float = 1.0,
        q: float = 1.0,
        shuffle_base: int | str = "auto",
        pool_size: int | str = "auto",
        micro_batch: int | str = "auto",
        samplers: int = 1,
        normalize: bool = False,
        isolated: str = "keep",
        scratch: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int = 0,
    ) -> None:
        self.dim = dim
        self.model = model
        self.epochs = epochs
        self.augmentation = augmentation
        self.walk_length = walk_length
        self.negatives = negatives
        self.negative_weight = negative_weight
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.partitions = partitions
        self.group = group
        self.workers = workers
        self.device = device
        self.executor = executor
        self.memory_limit = memory_limit
        self.p = p
        self.q = q
        self.shuffle_base = shuffle_base
        self.pool_size = pool_size
        self.micro_batch = micro_batch
        self.samplers = samplers
        self.normalize = normalize
        self.isolated = isolated
        self.scratch = scratch
        self.callbacks = callbacks
        self.seed = seed
        settings.check(self.get_params())
        self._make_plain()
        self._arrays: dict[str, np.ndarray] = {}
        self._peak_part_bytes = 0
        self._counters = Counters()
        self._nodes: Graph | None = None

    # Fitting

    def fit(self, graph: Any, y: Any = None) -> Self:
        """Train on a graph (whatever `as_graph` takes). ``y`` is there for scikit-learn.

        Raises:
            InputError: the graph has no edges, negative weights, or fewer nodes than ``partitions``; or training diverged, since ``lr``,
                ``negative_weight`` or ``weight_decay`` are too large. What was fitted before then stays.
            CapacityError: two parts do not fit into ``memory_limit``.
            BackendError: the device or its library is not there.
        """
        settings.check(self.get_params())
        graph = as_graph(graph, allow_negative=True)
        settings.check_graph(graph)
        return self._train(graph, Counters(total=settings.total_of(self.epochs, graph)), {})

    def resume(self, graph: Any, epochs: float | None = None) -> Self:
        """Go on: to the end of a run that a callback ended (the result is that of a run that was not ended), or for so many more epochs.

        More epochs are a run of their own, with the rate from its start and new walks.

        Raises InputError if nothing is fitted, the graph has another number of nodes, there is no run to end, or it has more samples than
        1,000,000 epochs of the graph; and as `fit`.
        """
        settings.check(self.get_params() if epochs is None else {**self.get_params(), "epochs": epochs})
        graph = as_graph(graph, allow_negative=True)
        settings.check_graph(graph)
        self._need("context")
        before = self._counters
        if graph.num_nodes != len(self._arrays["vertex"]):
            raise InputError(
                f"the embedding has {len(self._arrays['vertex']):,} nodes, the graph {graph.num_nodes:,}; fit anew"
            )
        if self._same_nodes(graph) is not None:
            raise InputError(
                "nodes of the graph stand in another order than when they were fitted; give the same graph"
            )
        if self._arrays["vertex"].shape[1] != self.dim:
            raise InputError(
                f"the embedding has dim {self._arrays['vertex'].shape[1]}, dim is now {self.dim}; fit anew"
            )
        if epochs is None and before.done >= before.total:
            raise InputError("the run was trained to its end; say for how many more `epochs`")
        if epochs is None and before.total > settings.total_of(settings.MOST_EPOCHS, graph):
            raise InputError(
                f"the run has {before.total:,} samples, more than the {settings.MOST_EPOCHS:,} epochs of this graph that there may be; "
                "say for how many more `epochs`"
            )
        counters = Counters(**asdict(before))
        if epochs is not None:
            counters.done, counters.total = 0, settings.total_of(epochs, graph)
        return self._train(graph, counters, dict(self._arrays))

    def fit_transform(self, graph: Any, y: Any = None) -> np.ndarray:
        """`fit`, then the vectors of all nodes, float32 [N, D]."""
        return self.fit(graph).transform()

    def _train(self, graph: Graph, counters: Counters, arrays: dict[str, np.ndarray]) -> Self:
        rule = Rule(self.optimizer, self.lr, self.weight_decay, self.negatives, self.negative_weight)
        row_bytes = 4 * self.dim * (1 + rule.moments)
        limit = self.memory_limit
        count = graph.num_nodes
        if limit is not None and 2 * count * row_bytes <= limit:
            limit = None  # all of it fits
        num_parts = settings.parts_of(self.partitions, count, row_bytes, limit)
        degree_N = graph.strength_N + (graph.reversed.strength_N if graph.is_directed else 0)
        partition = zig_zag(degree_N, num_parts)
        group = num_parts if self.group == "auto" else int(self.group)
        steps = settings.steps_of(self.augmentation, self.walk_length, graph)
        base = self.shuffle_base if self.shuffle_base != "auto" else steps if self.model == "line" else 1
        how = ShareSampler if self._how == "distributed" else Sampler
        sampler = how.of(
            graph,
            partition,
            self.seed,
            walk_length=self.walk_length,
            augmentation=steps,
            p=self.p,
            q=self.q,
            shuffle_base=1 if self._how == "distributed" else int(base),  # shuffled once all are together
        )
        plan = Plan(
            partition,
            blocks_in_order(num_parts, group),
            negative_tables(graph.reversed.strength_N, partition),
            rule,
            self.seed,
        )
        parts = self._parts(partition, rule, limit, row_bytes, arrays)
        executor = self._executor(plan, parts, limit, row_bytes, degree_N, int(base))
        size = settings.pool_of(self.pool_size, count, num_parts, counters.total, int(base), limit is not None)
        train(
            sampler,
            executor,
            counters,
            num_edges=graph.num_edges,
            pool_size=size,
            samplers=self.samplers,
            in_turn=executor.workers if isinstance(executor, ThreadExecutor) else 1,
            rule=rule,
            callbacks=self.callbacks,
        )
        executor.finish()
        self._collect(graph, parts, rule, counters)
        return self

    def _parts(
        self, partition: Partition, rule: Rule, limit: int | None, row_bytes: int, arrays: dict[str, np.ndarray]
    ) -> Parts:
        if limit is not None and self._how == "threads":
            parts: Parts = MappedParts(partition, self.dim, rule.moments, limit_bytes=limit, folder=self.scratch)
        else:
            parts = Parts(partition, self.dim, rule.moments)
        parts.initialize(self.seed)
        for side, name in zip(SIDES, ("vertex", "context"), strict=True):
            for number in range(1 + rule.moments):
                stored = arrays.get(name if number == 0 else f"{side}{number}")
                if stored is not None:
                    parts.set(side, number, stored)
        return parts

    @property
    def _how(self) -> str:
        if self.executor != "auto":
            return self.executor
        return "threads" if self.device == "cpu" else "torch"

    def _executor(
        self, plan: Plan, parts: Parts, limit: int | None, row_bytes: int, degree_N: np.ndarray, base: int
    ) -> BlockExecutor:
        if self._how == "distributed":
            return DistributedExecutor(plan, parts, base)
        num_parts, largest = plan.partition.num_parts, plan.partition.largest * row_bytes
        if self._how == "threads":
            return ThreadExecutor(
                plan, parts, settings.workers_of(num_workers(self.workers), num_parts, largest, limit)
            )
        devices = devices_of(self.device, self.workers or 1)[:num_parts]
        micro_batch = auto_micro_batch(degree_N, num_parts) if self.micro_batch == "auto" else int(self.micro_batch)
        return TorchExecutor(plan, parts, devices, micro_batch, limit, row_bytes)

    def _collect(self, graph: Graph, parts: Parts, rule: Rule, counters: Counters) -> None:
        count = graph.num_nodes
        arrays = {"vertex": parts.get("head"), "context": parts.get("tail")}
        for side in SIDES:
            arrays |= {f"{side}{number}": parts.get(side, number) for number in range(1, 1 + rule.moments)}
        for name, array in arrays.items():
            # In the last pool, too late for its loss to tell.
            if bad := sum(int((~np.isfinite(array[at : at + 65536]).all(1)).sum()) for at in range(0, count, 65536)):
                raise diverged(rule, f"{bad:,} of {count:,} rows of {name} are not finite")
        arrays["trained"] = (graph.strength_N > 0) | (graph.reversed.strength_N > 0)
        if self.isolated == "zero":
            arrays["vertex"][~arrays["trained"]] = 0
        if graph.names is not None:
            arrays["names"] = graph.names
        # Files of parts live as long as what is mapped from them.
        kept = parts if isinstance(parts, MappedParts) else None
        self._become(
            _arrays=arrays, _counters=counters, _nodes=graph.bare(), _peak_part_bytes=parts.peak_bytes, _keep=kept
        )

    def peak_bytes(self, graph: Any) -> int:
        """Bytes that `fit` on this graph holds at most in this process's memory beyond the graph: CPU threads, all parameters in memory.

        With A = 8 N D (1 + moments) for V, C and their moments, which at the end are there once more in the order of nodes,
        B = 16 S + (S / s)(L + 1) i / L for two pools of S samples and the walks of one (ids of i bytes), and 72 N for tables,
        partition and strengths: 2 A + B + 72 N.
        """
        graph = as_graph(graph, allow_negative=True)
        moments = Rule(self.optimizer).moments
        parameters = 8 * graph.num_nodes * self.dim * (1 + moments)
        num_parts = settings.parts_of(self.partitions, graph.num_nodes, 4 * self.dim * (1 + moments), None)
        steps = settings.steps_of(self.augmentation, self.walk_length, graph)
        total = settings.total_of(self.epochs, graph)
        size = min(total, settings.pool_of(self.pool_size, graph.num_nodes, num_parts, total, 1, False))
        walks = size / steps * (self.walk_length + 1) / self.walk_length * graph.indices.itemsize
        return int(2 * parameters + 16 * size + walks + 72 * graph.num_nodes)

    # Looking at it

    @property
    def vertex_ND(self) -> np.ndarray:
        """V, float32 [N, D]: the embedding. Raises InputError before `fit`, as all that follow."""
        return self._need("vertex")

    @property
    def context_ND(self) -> np.ndarray:
        """C, float32 [N, D]: what nodes are as contexts of others."""
        return self._need("context")

    @property
    def is_trained_N(self) -> np.ndarray:
        """bool [N]: False for isolated nodes."""
        return self._need("trained")

    @property
    def history(self) -> list[dict[str, float]]:
        """Per pool: ``epoch``, mean ``loss`` and the rate ``lr``."""
        self._need("vertex")
        return self._counters.history

    @property
    def peak_part_bytes(self) -> int:
        """Bytes of parameters and moments in memory at most while CPU threads trained; of all of them without parts on disk."""
        self._need("context")
        return self._peak_part_bytes

    def transform(self, nodes: Any = None) -> np.ndarray:
        """Vectors of nodes, float32 [len(nodes), D].

        Args:
            nodes: nodes by id or name (`Graph.resolve`); None for all; or the graph that was fitted, as `fit` takes it (a file as a
                `pathlib.Path`), for all in its order.

        Raises InputError for a node, or a graph, that was not fitted.
        """
        found = self._need("vertex")
        if nodes is None:
            chosen = None
        elif isinstance(nodes, str | list | tuple | range | np.ndarray | int | np.integer):
            chosen = self.nodes.resolve(nodes)
        else:
            chosen = self._same_nodes(as_graph(nodes, allow_negative=True))
        if chosen is not None:
            found = found[chosen]
        if self.normalize:
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.float32(1e-30))
        return found

    def predict(self, edges: Any) -> np.ndarray:
        """Scores V_u . C_v of edges (u, v), [E, 2] of nodes by id or name; float32 [E]. The larger, the likelier is the edge."""
        edges = unmasked(edges, "edges")
        try:
            ends = np.asarray(edges)
        except ValueError as error:
            raise InputError(
                f"edges have the shape [edges, 2], these are lists of different lengths: {error}"
            ) from None
        # Text beside integers would be made text.
        ends = np.asarray(edges, object) if ends.dtype.kind in "SU" else ends
        if ends.ndim != 2 or ends.shape[1] != 2:
            raise InputError(f"edges have the shape [edges, 2], these {ends.shape}")
        ends = self.nodes.resolve(ends.reshape(-1)).reshape(-1, 2)
        vertex_ND, context_ND = self.vertex_ND, self.context_ND
        found = np.empty(len(ends), np.float32)
        for at in range(0, len(ends), 65536):
            head, tail = ends[at : at + 65536].T
            found[at : at + 65536] = np.einsum("ed,ed->e", vertex_ND[head], context_ND[tail])
        return found

    @property
    def nodes(self) -> Graph:
        """The nodes that were fitted, a graph without edges that knows their names. Raises InputError before `fit`."""
        self._need("vertex")
        assert self._nodes is not None
        return self._nodes

    def _same_nodes(self, graph: Graph) -> np.ndarray | None:
        """Ids, as fitted, of the nodes of this graph in its order; None where the order is that. Raises InputError for others."""
        known = self.nodes
        if graph.num_nodes != known.num_nodes:
            raise InputError(f"{known.num_nodes:,} nodes were fitted; nodes of another graph need a fit of their own")
        if known.names is None or graph.names is None or np.array_equal(known.names, graph.names):
            return None
        return known.ids_of(graph.names.tolist())

    def _need(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            if self._arrays:
                raise InputError(f"there is no {name} here: word2vec text holds vectors only; save as .npz to keep all")
            raise InputError("this GraphVite is not fitted yet; call fit first")
        return self._arrays[name]

    # On disk

    @classmethod
    def _lawful(cls, params: dict[str, Any]) -> dict[str, Any]:
        return settings.lawful(params)

    def save(self, path: str | Path) -> None:
        """Write it: ``.npz`` or any other name (our checked array file) with all that `load`, `predict` and `resume` need; ``.txt``,
        ``.vec``, ``.emb`` or ``.w2v`` as word2vec text, vectors alone. All or nothing.

        Raises InputError for names that are neither integers nor all text, and as `atomic_file`.
        """
        self._need("vertex")
        arrays = dict(self._arrays)
        if "names" in arrays:
            check_saved_names(arrays["names"])
            if arrays["names"].dtype == object:
                arrays["names"] = np.array(arrays["names"].tolist(), str)
        params = {name: value for name, value in self.get_params().items() if name not in _NOT_SAVED}
        params["scratch"] = None if self.scratch is None else str(self.scratch)
        storage.write(path, storage.Saved(arrays, {"params": _plain(params), "counters": asdict(self._counters)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote (from text: vectors alone). Raises DataError for a file that is missing, foreign or damaged."""
        saved = storage.read(path)
        arrays, meta = saved.arrays, saved.meta
        with described(path, "a GraphVite of this release"):
            params = meta.get("params", {"dim": arrays["vertex"].shape[1]})
            params = params_of_file(params, settings.FLAGS)
            found = cls._of_file(params)
            found._counters = Counters(**meta.get("counters", {}))
            for name in ("walks", "episodes", "pairs", "done", "total"):
                whole(getattr(found._counters, name), name)
            if not all(isinstance(entry, dict) for entry in found._counters.history):
                raise ValueError("history is no list of objects")
        if "names" in arrays and arrays["names"].dtype.kind not in "iu":
            arrays["names"] = arrays["names"].astype(object)
        found._arrays, count = arrays, len(arrays["vertex"])
        found._nodes = Graph(np.zeros(count + 1, np.int64), np.empty(0, np.int32), None, False, arrays.get("names"))
        return found


def _plain(params: dict[str, Any]) -> dict[str, Any]:
    """Numbers of numpy as those of Python, which JSON can hold."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in params.items()}
