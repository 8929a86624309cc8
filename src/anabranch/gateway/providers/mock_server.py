"""The scripted upstream as a real server: ``python -m anabranch.gateway.providers.mock_server --port 9000 --set tokens=20``."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from anabranch.config import override, parse_assignment
from anabranch.errors import AnabranchError
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.scenes import Behaviour

BODY_BYTES = 64 << 20


def application(config: Any) -> web.Application:
    """Every POST is a request of the script; ``GET /health`` says that it runs, ``GET /asked`` how many requests there were."""
    behaviour = Behaviour(config)
    app = web.Application(client_max_size=BODY_BYTES)

    async def answer(request: web.Request) -> web.StreamResponse:
        scene = behaviour.scene(request.path, await request.read())
        if scene.length is None and scene.ending == "end" and "event-stream" not in scene.headers["content-type"]:
            return await _whole(scene)
        response = web.StreamResponse(status=scene.status, headers=scene.headers)
        if scene.length is not None:
            response.content_length = scene.length
        await response.prepare(request)
        for seconds, data in scene.parts:
            if seconds:
                await asyncio.sleep(seconds)
            if data:
                await response.write(data)
        if scene.ending == "hang":
            await asyncio.sleep(3600)
        if scene.ending == "reset" and request.transport is not None:
            request.transport.abort()
        return response

    async def _whole(scene: Any) -> web.Response:
        seconds = sum(part[0] for part in scene.parts)
        if seconds:
            await asyncio.sleep(seconds)
        return web.Response(status=scene.status, headers=scene.headers, body=b"".join(data for _, data in scene.parts))

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def asked(_: web.Request) -> web.Response:
        return web.json_response({"asked": behaviour.asked})

    app.router.add_get("/health", health)
    app.router.add_get("/asked", asked)
    app.router.add_post("/{path:.*}", answer)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped; returns the exit code."""
    parser = argparse.ArgumentParser(description="A scripted upstream with OpenAI's API.")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of Mock.Config, as TOML")
    options = parser.parse_args(arguments)
    try:
        config = override(Mock.Config(model="mock"), dict(map(parse_assignment, options.set)))
    except AnabranchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"scripted upstream on http://{options.host}:{options.port}", file=sys.stderr)
    web.run_app(application(config), host=options.host, port=options.port, print=None, access_log=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
