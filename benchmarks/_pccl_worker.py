"""One rank of one contestant of `pccl.py`, which may be of another environment: it needs numpy, and what its kind imports.

    python benchmarks/_pccl_worker.py KIND RANK WORLD ADDRESS

Lines on standard input: ``reduce COUNT`` sums COUNT float32 numbers over all and answers with the seconds that took; ``loop`` sums 4096
numbers again and again, trying again whatever fails, and answers with a line of the time and the world after each; ``end``.
"""

import socket
import sys
import threading
import time

import numpy as np


class Ours:
    def __init__(self, rank, world, address):
        from anabranch.cluster.pccl import Communicator

        self.peers = Communicator(address, secret="").connect()
        self.peers.wait_for(world)

    def array(self, count):
        import torch

        return torch.ones(count)

    def reduce(self, value):
        return self.peers.all_reduce(value, tag=0).world


class Gloo:
    def __init__(self, rank, world, address):
        import torch.distributed as dist

        self.dist = dist
        dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=world)

    def array(self, count):
        import torch

        return torch.ones(count)

    def reduce(self, value):
        self.dist.all_reduce(value)
        return self.dist.get_world_size()


class Pypccl:
    """Runs the master too, in rank 0. It reduces from one buffer into another."""

    def __init__(self, rank, world, address):
        import pccl

        self.pccl = pccl
        if rank == 0:
            self.master = pccl.MasterNode(listen_address=address)
            self.master.run()
            time.sleep(1)
        self.peers = pccl.Communicator(address, 0)
        self.peers.connect(n_attempts=30)
        while self.peers.get_attribute(pccl.Attribute.GLOBAL_WORLD_SIZE) < world:
            if self.peers.are_peers_pending():
                self.peers.update_topology()
            time.sleep(0.01)

    def array(self, count):
        return np.ones(count, np.float32)

    def reduce(self, value):
        pccl = self.pccl
        operand = pccl.ReduceOperandDescriptor(
            datatype=pccl.DataType.FLOAT, distribution_hint=pccl.DistributionHint.NORMAL
        )
        plain = pccl.QuantizationOptions(
            quantized_datatype=pccl.DataType.FLOAT, algorithm=pccl.QuantizationAlgorithm.NONE
        )
        handle = self.peers.all_reduce_async(
            value, value, operand_descriptor=operand, quantization_options=plain, op=pccl.ReduceOp.SUM
        )
        done, status, info = handle.wait()
        if not done:
            raise RuntimeError(f"{status}")
        return info.local_world_size


class Raw:
    """What two processes can send each other at once, in both directions, and do nothing with: of two ranks."""

    def __init__(self, rank, world, address):
        host, port = address.split(":")
        if rank == 0:
            with socket.create_server((host, int(port))) as server:
                self.sock, _ = server.accept()
        else:
            self.sock = _called(host, int(port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def array(self, count):
        return np.ones(count, np.float32)

    def reduce(self, value):
        # Each rank of two sends its buffer once in all: half to be reduced, half that is.
        data = memoryview(value).cast("B")
        sender = threading.Thread(target=self.sock.sendall, args=(data,))
        sender.start()
        into = bytearray(1 << 20)
        left = len(data)
        while left:
            left -= self.sock.recv_into(into, min(left, len(into)))
        sender.join()
        return 2


def _called(host, port):
    for _ in range(200):
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise SystemExit("nobody listens")


KINDS = {"ours": Ours, "gloo": Gloo, "pypccl": Pypccl, "raw": Raw}


def main():
    kind, rank, world, address = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    made = KINDS[kind](rank, world, address)
    print("ready", flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "reduce":
            value = made.array(int(words[1]))
            made.reduce(made.array(1))  # all are here
            begin = time.perf_counter()
            made.reduce(value)
            taken = time.perf_counter() - begin
            assert kind == "raw" or float(value[-1]) == world, f"{kind} gave {float(value[-1])}"
            print(taken, flush=True)
        elif words[0] == "loop":
            value = made.array(4096)
            while True:
                try:
                    there = made.reduce(value)
                except Exception as error:
                    print(f"again {type(error).__name__}", flush=True)
                    if kind == "pypccl":
                        made.peers.update_topology()
                    continue
                print(f"done {time.time():.6f} {there}", flush=True)
        else:
            return


if __name__ == "__main__":
    main()
