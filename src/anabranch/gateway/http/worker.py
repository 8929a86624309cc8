"""One worker of ``anabranch gateway serve --workers N``: a process that `workers.Supervisor` starts.

What to serve comes as one line of JSON on stdin, which stays open: its end is that of the supervisor. What became of it goes to the file
descriptor of the first argument: ``{"url", "admin_url"}`` once it answers, or ``{"error"}``.
"""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.http.peers import Seat
from anabranch.gateway.http.run import run
from anabranch.gateway.logged_error import words

MISTAKE = 2


def main(report: int) -> int:
    """Serve until told to stop; the exit code."""
    # Ctrl-C is the supervisor's, which tells all workers.
    os.setpgrp()
    task = json.loads(sys.stdin.buffer.readline())
    seat = Seat(task["index"], task["num"], Path(task["folder"]))
    logging.basicConfig(stream=sys.stderr, format=f"worker {seat.index}: %(levelname)s: %(message)s")

    def tell(**said: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(report, json.dumps(said).encode() + b"\n")
        os.close(report)

    def ready(url: str, admin_url: str, config: GatewayConfig) -> None:
        tell(url=url, admin_url=admin_url)

    try:
        run(
            _path(task["config"]),
            host=task["host"],
            port=task["port"],
            store=task["store"],
            router=_path(task["router"]),
            drain_s=task["drain_s"],
            on_ready=ready,
            seat=seat,
            admin_port=task["admin_port"],
        )
    except AnabranchError as error:
        tell(error=words(error))
        return MISTAKE
    return 0


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
