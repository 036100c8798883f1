"""Asking an OpenAI-compatible endpoint, by the standard library alone: retries with back-off, no redirects, no endless
answers."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from polyalign.core.errors import UserError
from polyalign.evaluation.kept_answers import KeptAnswers

Answer = TypeVar("Answer")
Content = str | Sequence[Mapping[str, Any]]
"""Of a message: text, or parts such as text and pictures."""
LONGEST_ANSWER = 1 << 20
LONGEST_WAIT = 60.0
"""Bytes read of an answer; seconds between two attempts."""
LONGEST_OPTION = 1e6
"""No option of time or number reaches this; the clocks of the system would not take an infinity."""
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that may be gone at the next attempt."""


class Unusable(Exception):
    """What an endpoint answered is no answer to the question; the text says what was asked for."""


class _Refused(Exception):
    """A failure that asking again would not mend."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        raise _Refused(f"it redirects to {newurl}; redirects are not followed, give the final address as url")


class ChatEndpoint:
    """``POST url/chat/completions``.

    Args:
        judge: whose questions these are, for messages.
        url: of the API, ``http`` or ``https``, without user, query or fragment.
        model: the endpoint's name of the model.
        key_variable: the environment variable with the API key, or None.
        request: fields of the request over the defaults; a null takes a field away.
        retries: further attempts after a failed one.
        backoff: seconds before the second attempt; doubled before each further one, up to a minute. A Retry-After of the
            endpoint counts where it is longer.
        timeout: seconds to wait for the connection and for each piece of an answer.
        answers: a ``.jsonl`` file that keeps every usable answer, so that no question is paid for twice; null keeps none.

    Raises:
        UserError: an option is none of the allowed, or the environment variable is not set.
    """

    def __init__(
        self,
        judge: str,
        url: str,
        model: str,
        key_variable: str | None,
        request: Mapping[str, Any],
        *,
        retries: int = 4,
        backoff: float = 1.0,
        timeout: float = 120.0,
        answers: str | None = None,
    ):
        parts = _parts_of(str(url))
        if (
            parts is None
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or "@" in parts.netloc
        ):
            raise UserError(
                f"the judge '{judge}': url is {url!r}; give http(s)://HOST[:PORT]/PATH, such as http://127.0.0.1:8000/v1, and "
                "a key by key_variable"
            )
        for option, value, least in (("retries", retries, 0), ("backoff", backoff, 0), ("timeout", timeout, 0.001)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < LONGEST_OPTION:
                raise UserError(
                    f"the judge '{judge}': {option} is {value!r}; a number from {least:g}, below {LONGEST_OPTION:g}, is needed"
                )
        if key_variable is not None and not os.environ.get(key_variable):
            raise UserError(
                f"the judge '{judge}': key_variable is {key_variable!r}, and there is no such environment variable. Set it to "
                "the API key"
            )
        if key_variable is not None and not re.fullmatch(r"[!-~]+", os.environ[key_variable]):
            raise UserError(
                f"the judge '{judge}': the environment variable {key_variable!r} holds a space, a line break or another sign "
                "that no key has (it is not shown here). Set it to the API key alone"
            )
        self.judge, self.model, self.host = judge, model, parts.netloc
        self.address = f"{str(url).rstrip('/')}/chat/completions"
        self.retries, self.backoff, self.timeout = int(retries), float(backoff), float(timeout)
        self.key_variable, self.request = key_variable, dict(request)
        self.kept = None if answers is None else KeptAnswers(answers)
        self.failures: Counter[str] = Counter()
        """Attempts that failed, by kind, whether or not a later one succeeded."""
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lock = threading.Lock()

    def ask(self, content: Content, read: Callable[[str], Answer]) -> Answer:
        """One question, as the content of a user's message, and what ``read`` makes of the answer.

        Raises:
            UserError: no attempt gave an answer that ``read`` takes; the last failure is quoted.
        """
        fields = {"temperature": 0, **self.request, "model": self.model, "messages": [{"role": "user", "content": content}]}
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        if self.kept is None:
            return self._asked(body, read)[0]
        key = self.kept.key(self.address, body)
        known = self.kept.get(key)
        if known is not None:
            with suppress(Unusable):  # a file that somebody edited: the question is asked again
                return read(known)
        value, answer = self._asked(body, read)
        self.kept.put(key, answer)
        return value

    def _asked(self, body: bytes, read: Callable[[str], Answer]) -> tuple[Answer, str]:
        """What ``read`` makes of the first usable answer, and the answer."""
        said, pause = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait(attempt, pause))
            kind, pause, answer = "unreachable", 0.0, ""
            try:
                answer = self._post(body)
                kind = "unusable answer"
                answer = _message(answer)
                return read(answer), answer
            except _Refused as error:
                self._count("refused")
                raise self._failed(str(error)) from error
            except Unusable as error:
                said = f"{error}, and it answered {_cut(answer)}"
            except urllib.error.HTTPError as error:
                kind, pause = f"status {error.code}", _retry_after(error)
                said = f"status {error.code}: {_cut(_body_of(error))}"
                if error.code not in AGAIN:
                    self._count(kind)
                    raise self._failed(said) from error
            except (OSError, http.client.HTTPException) as error:
                said = f"it could not be reached ({getattr(error, 'reason', None) or error})"
            self._count(kind)
        raise self._failed(f"{said} (after {self.retries + 1} attempts)")

    def wait(self, attempt: int, asked_for: float) -> float:
        """Seconds before attempt 1, 2, ... after the first; ``asked_for`` is the endpoint's own wish."""
        return min(max(self.backoff * 2 ** (attempt - 1), asked_for), LONGEST_WAIT)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        request = urllib.request.Request(self.address, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            return response.read(LONGEST_ANSWER).decode("utf-8", errors="replace")

    def _count(self, kind: str) -> None:
        with self._lock:
            self.failures[kind] += 1

    def _failed(self, why: str) -> UserError:
        return UserError(f"the judge '{self.judge}' ({self.model} at {self.host}): {why}")


def _parts_of(url: str) -> SplitResult | None:
    """The parts of an address; None for one with a broken host or port."""
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


def _message(answer: str) -> str:
    """The text of the first choice of a completion."""
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Unusable("a chat completion was asked for") from error
    if not isinstance(text, str):
        raise Unusable("a chat completion with text was asked for")
    return text


def _body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(LONGEST_ANSWER).decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _retry_after(error: urllib.error.HTTPError) -> float:
    said = error.headers.get("Retry-After", "") if error.headers else ""
    return float(said) if said.strip().isdecimal() else 0.0


def _cut(text: str) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= 300 else f"{shown[:300]}...")
