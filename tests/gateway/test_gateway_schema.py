"""Schemathesis over ``/openapi.json``: no made-up request gets a 500, and every answer is what the document says."""

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gateway_process import served

PROGRAM = Path(sys.executable).parent / "schemathesis"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_the_document_describes_the_routes_there_are():
    with served() as running, urllib.request.urlopen(f"{running.url}/openapi.json") as answer:
        document = json.load(answer)
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/models",
        "/v1/feedback",
    } < set(document["paths"])
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
