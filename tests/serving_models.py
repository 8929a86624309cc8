"""A small mixture of experts with a byte tokenizer, saved once, and a server process in front of it."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anabranch
from anabranch.data import ByteTokenizer
from anabranch.lm import Decoder, save_model
from anabranch.nn import Attention, MoE
from anabranch.routing import Router, TopK

SOURCE = str(Path(anabranch.__file__).resolve().parent.parent)
LAYERS, EXPERTS = 2, 4


def small_moe() -> Decoder:
    """Random, and so large in its weights that greedy tokens vary."""
    config = Decoder.Config(
        vocab_size=257,
        dim=16,
        num_layers=LAYERS,
        attention=Attention.Config(num_heads=4, num_kv_heads=2),
        feed_forward=MoE.Config(num_experts=EXPERTS, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=2))),
        init_std=0.3,
        max_positions=2048,
    )
    return config.build(seed=0).eval()


@functools.cache
def saved_moe() -> str:
    """Folder of it; it lasts as long as this process."""
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    path = Path(folder.name) / "small-moe"
    save_model(path, small_moe(), ByteTokenizer())
    return str(path)


_KEPT: list[tempfile.TemporaryDirectory] = []


@dataclass
class Process:
    """A server as users start it.

    Attributes:
        url, port: where.
        process: its.
        log: file of its stderr.
    """

    url: str
    process: subprocess.Popen
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@contextlib.contextmanager
def serve_process(
    *arguments: str, model: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[Process]:
    """``anabranch serve`` with these arguments on a free port, when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        command = [
            sys.executable,
            "-m",
            "anabranch.cli.main",
            "serve",
            model or saved_moe(),
            "--port",
            "0",
            "--json",
            *arguments,
        ]
        given = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", **(environment or {})}
        with open(log, "wb") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=given, cwd=folder)
        try:
            assert process.stdout is not None
            said = b""
            while not said.endswith(b"}\n"):
                line = process.stdout.readline()
                if not line:
                    process.wait(10)
                    raise AssertionError(f"the server did not start: {log.read_text()}")
                said += line
            yield Process(json.loads(said)["url"], process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            process.stdout.close()
