"""Running a schedule: the same work one after the other, on threads that share the cores, or on CUDA streams.

Work is a function (layer, nano-operation) that writes into buffers of its own range; what it waits for is in the graph. All executors
give the same result, since they only choose when things run.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from anabranch.errors import BackendError, InputError
from anabranch.serving.planning.cost import RESOURCES, Resource
from anabranch.serving.planning.graph import NanoOp
from anabranch.serving.planning.simulate import Schedule, dependences

Work = Callable[[int, NanoOp], None]


class Executor(Protocol):
    """Runs ``num_layers`` layers of a schedule."""

    def run(self, schedule: Schedule, work: Work, num_layers: int) -> None:
        """Returns when all is done (on a GPU: queued). Raises what ``work`` raises."""


class Sequential:
    """One after the other, in this thread."""

    def run(self, schedule: Schedule, work: Work, num_layers: int) -> None:
        """See `Executor`."""
        for layer in range(num_layers):
            for number in schedule.order:
                work(layer, schedule.graph.ops[number])


class Threads:
    """A thread per resource, each with its own number of cores for one operation.

    Where the schedule has shares, an operation gets its share of all cores, at least one; a product the cores that what runs beside
    it, or could begin beside it, leaves. That is what the shares of `simulate` say, in whole cores and until the operation ends.

    Args:
        cores: {resource: threads inside an operation}; a resource that is not named runs in the calling thread, with products. Their
            sum is what shares are of.
    """

    def __init__(self, cores: Mapping[Resource, int] | None = None) -> None:
        self.cores: dict[str, int] = {"compute": 1, "memory": 1} if cores is None else dict(cores)  # type: ignore[arg-type]
        wrong = [f"{name}={count}" for name, count in self.cores.items() if name not in RESOURCES or count < 1]
        if wrong:
            raise InputError(f"cores has {wrong[0]}; it takes {', '.join(RESOURCES)} with at least 1")

    def run(self, schedule: Schedule, work: Work, num_layers: int) -> None:
        """See `Executor`. The thread settings of the calling thread are put back."""
        run = _ThreadedRun(schedule, work, num_layers, self.cores)
        others = [
            threading.Thread(target=run.stream, args=(name,), daemon=True) for name in run.streams if name != "compute"
        ]
        before = torch.get_num_threads()
        for thread in others:
            thread.start()
        try:
            run.stream("compute")
        finally:
            for thread in others:
                thread.join()
            torch.set_num_threads(before)
        if run.error is not None:
            raise run.error


class _ThreadedRun:
    """One run: what is done, and the first error."""

    def __init__(self, schedule: Schedule, work: Work, num_layers: int, cores: Mapping[str, int]) -> None:
        self.ops, self.work, self.cores = schedule.graph.ops, work, cores
        self.shares, self.total = schedule.shares, sum(cores.values())
        self.count = len(self.ops)
        waiting, self.followers = dependences(schedule.graph, num_layers)
        self.waiting = list(waiting)
        self.condition = threading.Condition()
        self.error: BaseException | None = None
        self.streams: dict[str, list[int]] = {"compute": []}
        for layer in range(num_layers):
            for number in schedule.order:
                name = self.ops[number].resource
                name = name if name in cores else "compute"
                self.streams.setdefault(name, []).append(layer * self.count + number)
        # Of each stream the job that runs or is next.
        self.heads = {name: jobs[0] for name, jobs in self.streams.items() if jobs}
        self.is_inference = torch.is_inference_mode_enabled()
        self.has_grad = torch.is_grad_enabled()

    def stream(self, name: str) -> None:
        """Run one stream to its end, or until another fails."""
        torch.set_num_threads(self.cores.get(name, 1))
        jobs = self.streams[name]
        try:
            with (
                torch.inference_mode(self.is_inference),
                torch.set_grad_enabled(self.has_grad and not self.is_inference),
            ):
                for place, job in enumerate(jobs):
                    with self.condition:
                        self.condition.wait_for(lambda job=job: not self.waiting[job] or self.error is not None)  # type: ignore[misc]
                        if self.error is not None:
                            return
                        cores = None if self.shares is None else self._cores(name, job)
                    if cores is not None and cores != torch.get_num_threads():
                        torch.set_num_threads(cores)
                    self.work(job // self.count, self.ops[job % self.count])
                    with self.condition:
                        if place + 1 < len(jobs):
                            self.heads[name] = jobs[place + 1]
                        else:
                            del self.heads[name]
                        for follower in self.followers[job]:
                            self.waiting[follower] -= 1
                        self.condition.notify_all()
        except BaseException as error:
            with self.condition:
                self.error = self.error or error
                self.condition.notify_all()

    def _cores(self, name: str, job: int) -> int:
        """Cores for ``job`` of stream ``name``, which begins now."""
        if name != "compute":
            return self._share(job)
        beside = [other for stream, other in self.heads.items() if stream != name and not self.waiting[other]]
        return max(self.total - sum(self._share(other) for other in beside), 1)

    def _share(self, job: int) -> int:
        assert self.shares is not None
        return min(max(round(self.shares[job % self.count] * self.total), 1), self.total)


class Streams:
    """A CUDA stream per resource, with events where one waits for another. What is short and wanted soon goes first.

    Raises BackendError without a CUDA device.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        if not torch.cuda.is_available():
            raise BackendError("streams need a CUDA device; use Threads or Sequential")
        self.device = torch.device(device)
        priority = {"compute": 0, "memory": -1, "network": -1}
        self.streams = {name: torch.cuda.Stream(self.device, priority=priority[name]) for name in RESOURCES}

    def run(self, schedule: Schedule, work: Work, num_layers: int) -> None:
        """See `Executor`; returns when all is queued, behind which the current stream waits."""
        graph, count = schedule.graph, len(schedule.order)
        current = torch.cuda.current_stream(self.device)
        for stream in self.streams.values():
            stream.wait_stream(current)
        done: dict[int, torch.cuda.Event] = {}
        for layer in range(num_layers):
            for number in schedule.order:
                op = graph.ops[number]
                stream = self.streams[op.resource]
                earlier = [(layer, other) for other in graph.before[number]]
                earlier += [(layer - 1, other) for other in graph.before_next[number] if layer]
                for at, other in earlier:
                    # In one stream the order is enough.
                    if graph.ops[other].resource != op.resource:
                        stream.wait_event(done[at * count + other])
                with torch.cuda.stream(stream):
                    work(layer, op)
                done[layer * count + number] = stream.record_event()
        for stream in self.streams.values():
            current.wait_stream(stream)
