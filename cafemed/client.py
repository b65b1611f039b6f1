"""A client of the endpoint.

    with Client("https://meds.example.org", key="cafemed_…") as client:
        visit = {"diagnoses": [{"system": "icd9", "code": "428.0"}]}
        answer = client.recommend([{"visits": [visit]}], max_ddi_rate=0.05)

A request that met a replica that just died, or one that has too much to do, is sent once more:
asking for a recommendation changes nothing, so that this is safe. A proxy that is being replaced
is waited for. No exception quotes a request, nor does a line of httpx's log, which would have what
is searched for. Proxies of the environment (HTTP_PROXY) are not used: patients are sent to the
endpoint alone.
"""

import contextlib
import contextvars
import json
import logging
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from cafemed.errors import UserError

#: Holds the key where none is given.
KEY_VARIABLE = "CAFEMED_API_KEY"

#: Answers after which the same request may well succeed. Ray's proxies say 500 for a replica that
#: died under the request.
_AGAIN = frozenset({429, 500, 502, 503, 504})
_FIRST_DELAY_S = 0.1
#: Between attempts to connect where nobody listens.
_RECONNECT_DELAY_S = 0.25
#: Of a request, as docs/serving.md has them; an endpoint that knows more has its new ones left out.
_FIELDS = frozenset(
    {"body", "query", "kind", "limit", "patients", "sex", "age", "allergies", "visits"}
    | {"diagnoses", "procedures", "medications", "system", "code", "laboratory", "item", "value"}
    | {"options", "max_ddi_rate", "top_k", "explain"}
)
_INDEX = re.compile(r"\[\d+\]")
#: Whether this thread is asking, so that what is logged is of a request of ours.
_asking = contextvars.ContextVar("asking", default=False)
_MAX_SHOWN = 5


class ClientError(UserError):
    """The endpoint could not be asked, or refused."""


class UnreachableError(ClientError):
    """No answer came."""


class RefusedError(ClientError):
    """The endpoint answered with an error.

    Attributes:
        status: of HTTP: 401 without a valid key, 422 for a request that is not valid, 429 for a key
            that asks too often, 503 for an endpoint that has too much to do, …
        problems: (field, message) of what is wrong with the request.
        request_id: to find the request in the endpoint's log; "" where it told none.
        retry_after_s: when to ask again, where it was told.
    """

    def __init__(
        self,
        message: str,
        status: int,
        problems: Sequence[tuple[str, str]] = (),
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problems = tuple(problems)
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class Client:
    """Asks one endpoint; may be used from several threads, and keeps connections open."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: int = 1,
        max_wait_s: float = 10.0,
        reconnect_s: float = 15.0,
        verify: ssl.SSLContext | bool = True,
        proxy: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepares to ask; nothing is sent yet.

        Args:
            url: where the endpoint listens, "http://127.0.0.1:8000".
            key: an API key; None: CAFEMED_API_KEY of the environment, where there is one.
            timeout_s: how long one attempt may take to connect, and then to answer.
            retries: attempts after the first.
            max_wait_s: the longest wait before another attempt; an endpoint that asks for a longer
                one is not asked again.
            reconnect_s: how long to go on trying to connect, besides `retries`, where nobody
                listens and somebody did before: a proxy is being replaced, and what is asked
                reached nobody.
            verify: how a server's certificate is checked.
            proxy: URL of an HTTP proxy to ask through; it sees what an endpoint without HTTPS is
                asked.
            sleep: waits, for tests.
        """
        self._url = url.rstrip("/")
        self._retries = retries
        self._max_wait_s = max_wait_s
        self._reconnect_s = reconnect_s
        self._was_answered = False
        self._sleep = sleep
        self._jitter = random.Random()  # clients that were refused together come back apart
        key = key or os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._http = httpx.Client(
                base_url=self._url,
                headers=headers,
                timeout=timeout_s,
                verify=verify,
                proxy=proxy,
                trust_env=False,
            )
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError):
            raise ClientError(
                "expected a URL like http://127.0.0.1:8000 and an ASCII key"
            ) from None

    def recommend(
        self,
        patients: Sequence[Mapping[str, Any]],
        *,
        max_ddi_rate: float | None = None,
        top_k: int | None = None,
        explain: bool = False,
    ) -> dict[str, Any]:
        """Asks for the medications of each patient's last visit.

        Args:
            patients: 1 to 256, each as the endpoint takes it (docs/serving.md).
            max_ddi_rate: largest share of interacting pairs among those recommended.
            top_k: largest number of medications.
            explain: whether to say what raised and lowered each.

        Returns:
            the answer; `recommendations` has one entry a patient, in their order.

        Raises:
            RefusedError: if the endpoint refuses.
            UnreachableError: if no answer comes.
            ClientError: if the patients are nothing that JSON can hold, or the answer is none of an
                endpoint.
        """
        options = {"max_ddi_rate": max_ddi_rate, "top_k": top_k, "explain": explain or None}
        given = {name: value for name, value in options.items() if value is not None}
        body = {"patients": list(patients)} | ({"options": given} if given else {})
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as err:
            raise ClientError(f"patients: not what JSON can hold ({type(err).__name__})") from None
        return self._ask("POST", "/v1/recommend", content=content)

    def model(self) -> dict[str, Any]:
        """The card of the model that answers.

        Raises:
            RefusedError, UnreachableError: as `recommend`.
        """
        return self._ask("GET", "/v1/model")

    def codes(
        self, query: str, kind: str | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Searches the codes that the model knows.

        Args:
            query: part of a code or of its name.
            kind: "diagnosis", "procedure", "medication" or "laboratory"; None: all of them.
            limit: largest number of codes.

        Raises:
            RefusedError, UnreachableError, ClientError: as `recommend`.
        """
        given = {"query": query, "kind": kind, "limit": limit}
        parameters = {name: value for name, value in given.items() if value is not None}
        found: list[dict[str, Any]] = self._ask("GET", "/v1/codes", params=parameters)["codes"]
        return found

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        attempt, refused_s = 0, 0.0
        while True:
            is_last = attempt == self._retries
            begun = time.monotonic()
            try:
                with _unlogged():
                    response = self._http.request(method, path, **content)
            except (UnicodeEncodeError, httpx.InvalidURL):
                raise ClientError("the request has text that cannot be sent") from None
            except httpx.DecodingError:
                raise self._strange() from None
            except httpx.TransportError as err:
                if self._was_answered and refused_s < self._reconnect_s and _nobody_listens(err):
                    refused_s += _RECONNECT_DELAY_S + time.monotonic() - begun
                    self._sleep(_RECONNECT_DELAY_S)
                    continue
                if is_last or isinstance(err, httpx.UnsupportedProtocol):
                    raise UnreachableError(
                        f"{self._url}: no answer ({type(err).__name__})"
                    ) from None
                wait_s = self._backoff_s(attempt)
            else:
                self._was_answered = True
                if response.status_code == httpx.codes.OK:
                    return self._content(response)
                refused = self._refused(response)
                told_s = refused.retry_after_s
                wait_s = self._backoff_s(attempt) if told_s is None else told_s
                if is_last or refused.status not in _AGAIN or wait_s > self._max_wait_s:
                    raise refused
                if told_s is not None:  # never before the time told
                    wait_s += self._backoff_s(0)
            self._sleep(wait_s)
            attempt += 1

    def _backoff_s(self, attempt: int) -> float:
        delay_s = _FIRST_DELAY_S * 2.0**attempt * self._jitter.uniform(0.5, 1.5)
        return min(delay_s, self._max_wait_s)

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise self._strange()
        return content

    def _strange(self) -> ClientError:
        return ClientError(f"{self._url}: the answer is not one of a CafeMed endpoint")

    def _refused(self, response: httpx.Response) -> RefusedError:
        """The error that an answer tells of; proxies' own answers are not JSON."""
        told: Any = None
        with contextlib.suppress(ValueError):
            told = response.json()
        told = told if isinstance(told, dict) else {}
        problems = [
            (_place(str(one.get("field", ""))), str(one.get("message", "")))
            for one in told.get("problems") or ()
            if isinstance(one, dict)
        ]
        status = response.status_code
        message = f"{self._url}: status {status}: {told.get('message') or response.reason_phrase}"
        if problems:
            shown = "; ".join(f"{field}: {text}" for field, text in problems[:_MAX_SHOWN])
            message += f": {shown}" + ("; …" if len(problems) > _MAX_SHOWN else "")
        retry_after = response.headers.get("retry-after", "")
        wait_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
        return RefusedError(message, status, problems, str(told.get("request_id") or ""), wait_s)


def _nobody_listens(err: BaseException | None) -> bool:
    """Whether a connection was refused; a wrong name or certificate is another thing."""
    while err is not None and not isinstance(err, ConnectionRefusedError):
        err = err.__cause__ or err.__context__
    return err is not None


def _place(field: str) -> str:
    """A place in a request with what is no field of it left out: that is the caller's own text."""
    parts = re.split(r"(\[\d+\]|\.)", field)
    return "".join(
        part if part in _FIELDS or part == "." or _INDEX.fullmatch(part) else "?" if part else ""
        for part in parts
    )


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps what httpx logs of a request out of the log: it has the query."""
    token = _asking.set(True)
    try:
        yield
    finally:
        _asking.reset(token)


logging.getLogger("httpx").addFilter(lambda _record: not _asking.get())
