"""An HTTP server that answers nearest-neighbour and PageRank requests from files, and takes new files without a failed request.

    run(Sources(["index.anb", "graph.anb"]), port=8080)        # blocks until SIGTERM or SIGINT
    app = create_app(Sources(["index.anb"]), Limits(k=50))     # for another ASGI server

    sources   which files are served, and what is made of them
    swap      the files in use, and how new ones take their place
    requests  JSON in: what a request may be
    answers   what is computed for it
    text      JSON out, in steps, and sent as it is read; `answer_room` counts it
    writes    the same for changes of an index of vectors (`anabranch.graph.live`)
    senders   who may change something
    gate      how many at once, and for how long
    app       routes; `metrics` and `openapi` are what the names say
    connections   how many, and how slow they may be
    server    the process: socket, signals, graceful stop

Needs the extra ``graph``.
"""

from anabranch.extras import require

require("graph", by=__name__)

from anabranch.graph.serve.app import create_app
from anabranch.graph.serve.limits import Limits, Writes
from anabranch.graph.serve.server import run
from anabranch.graph.serve.sources import Sources

__all__ = ["Limits", "Sources", "Writes", "create_app", "run"]
