"""The OpenAPI document held against what is answered: schemathesis draws requests from it."""

import collections
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks

from serve import keys
from serve.access import Access
from serve.api import create_api
from serve.replying import Service
from serve.schema import MAX_MESSAGES

pytestmark = pytest.mark.slow

ROUTES = ["POST /v1/recommend", "GET /v1/codes", "GET /v1/model", "GET /healthz", "GET /readyz"]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, keys.create(path, "fuzz", 1_000_000)


@pytest.fixture(scope="module")
def schema(service: Service, secret: tuple[Path, str]) -> Any:
    api = create_api(service, access=Access(keys.Keys(secret[0])))
    return schemathesis.openapi.from_asgi("/openapi.json", api, headers={"X-API-Key": secret[1]})


def test_every_route_is_documented(schema: Any) -> None:
    assert sorted(one.ok().label for one in schema.get_all_operations()) == sorted(ROUTES)
    security = schema.raw_schema["paths"]["/v1/recommend"]["post"]["security"]
    assert security == [{"bearer": []}, {"header": []}, {}]
    assert "security" not in schema.raw_schema["paths"]["/healthz"]["get"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.name)
def test_answers_are_as_documented(
    schema: Any, secret: tuple[Path, str], route: str, mode: Any
) -> None:
    """Statuses, types, headers and bodies; a refusal names the field; nothing ends in a 5xx."""
    operation = next(one.ok() for one in schema.get_all_operations() if one.ok().label == route)
    seen: collections.Counter[int] = collections.Counter()

    @hypothesis.settings(
        max_examples=80 if "recommend" in route else 25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        response = case.call(headers={"X-API-Key": secret[1]})
        seen[response.status_code] += 1
        # A code system that the model does not know is refused, which no schema can tell.
        case.validate_response(response, excluded_checks=[checks.positive_data_acceptance])
        assert response.status_code < 500
        if response.status_code == 422:
            problems = response.json()["problems"]
            assert 1 <= len(problems) <= MAX_MESSAGES
            assert all(one["field"] and one["message"] for one in problems)

    try:
        answers()
    except hypothesis.errors.Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # nothing to send wrongly
        return
    if mode is schemathesis.GenerationMode.POSITIVE:
        assert seen[200] > 0
    elif "recommend" in route:
        assert seen[422] > 0
