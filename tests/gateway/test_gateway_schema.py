"""Schemathesis over ``/openapi.json``: no made-up request gets a 500, and every answer is what the document says."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from gateway_process import served

PROGRAM = Path(sys.executable).parent / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def client_routes(folder):
    """Path -> methods, of an app that serves clients alone."""

    async def main():
        model = ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),))
        async with Gateway(GatewayConfig(models=(model,), store=str(folder / "g.db"), require_key=False)) as gateway:
            return {path: set(methods) for path, methods in App(gateway, admin=False)._table.items()}

    found = asyncio.run(main())
    del found["/openapi.json"]
    return found


def test_the_document_describes_the_routes_there_are(tmp_path):
    with served() as running, urllib.request.urlopen(f"{running.url}/openapi.json") as answer:
        document = json.load(answer)
    # All that clients call, and the document itself; /v1/models/NAME is known by its beginning, and /metrics is for operators.
    described = {path: {method.upper() for method in methods} for path, methods in document["paths"].items()}
    of_operators = {"/metrics": {"GET"}, "/v1/models/{name}": {"GET"}}
    assert described == client_routes(tmp_path) | of_operators
    text = json.dumps(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]


def test_a_body_that_is_not_json_is_answered_in_the_form_that_the_document_says():
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    with served() as running:
        with urllib.request.urlopen(f"{running.url}/openapi.json") as answer:
            document = json.load(answer)
        posts = [path for path, routes in document["paths"].items() if "post" in routes]
        assert "/v1/messages/count_tokens" in posts
        for path in posts:
            request = urllib.request.Request(f"{running.url}{path}", b"{", {"content-type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            told = document["paths"][path]["post"]["responses"][str(refused.value.code)]
            schema = told["content"]["application/json"]["schema"] | {"components": document["components"]}
            said = json.load(refused.value)
            assert jsonschema_rs.is_valid(schema, said), (path, said)
            # One form is not the other: a schema that takes both says nothing.
            other = "Error" if schema["$ref"].endswith("MessagesError") else "MessagesError"
            assert not jsonschema_rs.is_valid({**schema, "$ref": f"#/components/schemas/{other}"}, said)


@pytest.mark.slow
@pytest.mark.skipif(not (PROGRAM.exists() or shutil.which("schemathesis")), reason="needs schemathesis (the dev extra)")
def test_no_made_up_request_breaks_it():
    with served() as running:
        program = str(PROGRAM) if PROGRAM.exists() else "schemathesis"
        command = [
            program,
            "run",
            f"{running.url}/openapi.json",
            "--checks",
            CHECKS,
            "--max-examples",
            "40",
            "--seed",
            "1",
            "--phases",
            "examples,coverage,fuzzing",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:]
        assert running.process.poll() is None
