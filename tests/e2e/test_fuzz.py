"""No value of the fields that we add makes the server fail, by its own OpenAPI description."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from mdkv_vllm.config import REQUEST_BUDGET, REQUEST_BUDGET_TOKENS

pytestmark = pytest.mark.server

TEXT = "Long enough to be compressed. " * 60
PROMPTS = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
}
IN_RANGE = st.one_of(
    st.fixed_dictionaries({REQUEST_BUDGET: st.floats(0, 1, exclude_min=True)}),
    st.fixed_dictionaries({REQUEST_BUDGET_TOKENS: st.integers(1, 5000)}),
)
"""Fields of requests that get past the checks: a third of the examples are sure to."""
BUDGET = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
BUDGET_TOKENS = {"type": "integer", "minimum": 1, "maximum": 5000}


def with_fields(case, fields):
    """A case whose fields of ours are replaced."""
    case.body = case.body | {"vllm_xargs": fields}
    return case


@pytest.fixture(scope="module")
def description(server):
    """The server's OpenAPI with constants for all fields that are not ours.

    Ours may be whatever the server declares for ``vllm_xargs``; so that some requests get past
    the checks, values in range are an alternative of their own.
    """
    whole = json.loads(server.get("/openapi.json"))
    paths = {"/mixeddim/status": whole["paths"]["/mixeddim/status"]}
    for path, prompt in PROMPTS.items():
        operation = whole["paths"][path]["post"]
        (media,) = operation["requestBody"]["content"]
        reference = operation["requestBody"]["content"][media]["schema"]["$ref"]
        body = whole["components"]["schemas"][reference.rsplit("/", 1)[1]]
        declared = body["properties"]["vllm_xargs"]["anyOf"][0]["additionalProperties"]
        constants = {"model": "model", "max_tokens": 3, **prompt}
        ours = {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        REQUEST_BUDGET: {"anyOf": [declared, BUDGET]},
                        REQUEST_BUDGET_TOKENS: {"anyOf": [declared, BUDGET_TOKENS]},
                    },
                    "additionalProperties": declared,
                    "minProperties": 1,
                },
                *(
                    {
                        "type": "object",
                        "properties": {name: schema},
                        "required": [name],
                        "additionalProperties": False,
                    }
                    for name, schema in (
                        (REQUEST_BUDGET, BUDGET),
                        (REQUEST_BUDGET_TOKENS, BUDGET_TOKENS),
                    )
                ),
            ]
        }
        schema = {
            "type": "object",
            "properties": {
                **{name: {"const": value} for name, value in constants.items()},
                "vllm_xargs": ours,
            },
            "required": [*constants, "vllm_xargs"],
            "additionalProperties": False,
        }
        content = {"required": True, "content": {media: {"schema": schema}}}
        paths[path] = {"post": operation | {"requestBody": content}}
    return whole | {"paths": paths}


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        ("/v1/completions", "post", {200, 400}),
        ("/v1/chat/completions", "post", {200, 400}),
        ("/mixeddim/status", "get", {200}),
    ],
)
def test_no_input_makes_a_server_error(server, description, path, method, expected):
    operation = schemathesis.openapi.from_dict(description)[path][method]
    cases = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if method == "post":
        cases |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        cases |= st.builds(
            with_fields, operation.as_strategy(generation_mode=GenerationMode.POSITIVE), IN_RANGE
        )
    seen = set()

    @settings(
        max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=cases)
    def call(case):
        response = case.call(base_url=server.url, timeout=60)
        seen.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    call()
    assert expected <= seen
    server.get("/health")
    assert server.text("The capital of France is", max_tokens=3)


@pytest.mark.parametrize(
    "fields",
    [
        '{"mixeddim_budget": 1e-320}',
        '{"mixeddim_budget": 1e999}',
        '{"mixeddim_budget": NaN}',
        '{"mixeddim_budget_tokens": 1%s}' % ("0" * 400),
        '{"mixeddim_budget_tokens": 18446744073709551616}',
        '{"mixeddim_budget_tokens": "1"}',
        '{"mixeddim_budget": [[]]}',
        '{"mixeddim_budget": true}',
        '{"mixeddim_\\u0000": 1}',
    ],
)
def test_values_that_no_generator_finds(server, fields):
    body = json.dumps({"model": "model", "max_tokens": 3, "prompt": TEXT})
    status, _ = server.post_text("/v1/completions", f'{body[:-1]}, "vllm_xargs": {fields}}}')
    assert status in (200, 400, 422)
    assert server.text("The capital of France is", max_tokens=3)
