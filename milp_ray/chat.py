"""Chat completions of any OpenAI-compatible endpoint (vLLM, Ollama, llama.cpp's server, a provider's).

Texts go to the endpoint and nowhere else: no log line and no exception holds any, nor the key.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from milp_ray.errors import MilpError

Message = dict[str, str]
_LONGEST_REPLY = 1 << 20  # bytes
_MOST_WAIT = 60.0  # seconds between two attempts
_TRY_AGAIN = frozenset({408, 409, 429})  # and every status from 500 up
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, and how long it may take."""

    base_url: str  # such as http://localhost:8000/v1
    model: str
    key_env: str = ""  # environment variable with the key; empty: no key is sent
    timeout: float = 60.0  # seconds an attempt
    attempts: int = 5
    at_once: int = 4  # requests on the way
    max_tokens: int | None = None  # of a reply; None: as the endpoint has it


class Chat:
    """Asks an endpoint.

    Args:
        endpoint: where and how.
        sleep: waits a number of seconds.

    Raises:
        MilpError: the address or the key's variable is no good.
    """

    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._endpoint = endpoint
        self._host = _checked_host(endpoint)
        self._key = _key(endpoint)
        self._sleep = sleep
        self._opener = build_opener(_NoRedirect)

    def replies(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """The reply to each chat, in their order, some at once; greedy, where the endpoint can be.

        Raises:
            MilpError: the endpoint refuses, or does not answer after all attempts.
        """
        threads = ThreadPoolExecutor(self._endpoint.at_once)
        try:
            return list(threads.map(self._reply, chats))
        finally:
            threads.shutdown(cancel_futures=True)  # an endpoint that has failed is not asked everything else

    def _reply(self, messages: Sequence[Message]) -> str:
        endpoint = self._endpoint
        body = {"model": endpoint.model, "messages": list(messages), "temperature": 0}
        if endpoint.max_tokens is not None:
            body["max_tokens"] = endpoint.max_tokens
        reason = ""
        for attempt in range(endpoint.attempts):
            try:
                return self._post(body)
            except HTTPError as error:
                error.close()
                reason, wait = f"HTTP status {error.code}", _retry_after(error)
                if error.code not in _TRY_AGAIN and error.code < 500:
                    raise MilpError(
                        f"the endpoint at {self._host} refused with {reason}; look at its address, the "
                        "model's name and the key"
                    ) from None
            except (URLError, OSError, HTTPException) as error:
                reason, wait = type(getattr(error, "reason", error)).__name__, 0.0
            except (ValueError, KeyError, IndexError, TypeError):
                reason, wait = "a reply that is no chat completion", 0.0
            if attempt + 1 < endpoint.attempts:
                self._sleep(min(_MOST_WAIT, max(wait, 2.0**attempt)))
        # Without the chain, whose messages could quote what was sent or received.
        raise MilpError(
            f"the endpoint at {self._host} gave no reply in {endpoint.attempts} attempts ({reason})"
        ) from None

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self._endpoint.base_url.rstrip('/')}/chat/completions"
        request = Request(url, json.dumps(body).encode("utf-8"), headers, method="POST")
        with self._opener.open(request, timeout=self._endpoint.timeout) as response:
            reply = json.loads(response.read(_LONGEST_REPLY))
        content = reply["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else ""


class _NoRedirect(HTTPRedirectHandler):
    """Neither the texts nor the key follow an address that was not given."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _checked_host(endpoint: Endpoint) -> str:
    address = urlsplit(endpoint.base_url)
    host = address.hostname or ""
    if address.scheme not in {"http", "https"} or not host:
        raise MilpError(
            f"the endpoint {_without_user(endpoint.base_url)!r} is no http or https address; give one such "
            "as http://localhost:8000/v1"
        )
    if address.username or address.password:
        raise MilpError(
            "the endpoint's address holds a user name or password; give it without, and the key in an "
            "environment variable"
        )
    if endpoint.key_env and address.scheme == "http" and host not in _THIS_MACHINE:
        raise MilpError(f"a key is sent to {host} over https only; give an https address, or no key")
    return host


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]


def _key(endpoint: Endpoint) -> str:
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "")
    if not key:
        raise MilpError(
            f"the endpoint's key is to be in {endpoint.key_env}: the environment has no such variable, or it "
            "is empty; set it"
        )
    return key


def _retry_after(error: HTTPError) -> float:
    """Seconds that the endpoint asks to wait; 0 where it says none or a date."""
    said = error.headers.get("Retry-After", "") if error.headers else ""
    return float(said) if said.isdigit() else 0.0
