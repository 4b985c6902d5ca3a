"""A client of the OpenAI-compatible completions protocol, as vLLM, llama.cpp and others serve it.

Streams one answer and notes when its pieces come. Whatever a server does wrong becomes a Reply
with an error: down, slow, an HTTP error, nonsense.
"""

import contextlib
import dataclasses
import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Iterator

from ternax.errors import PeerFailed, UsageError
from ternax.reply import Reply

# A line of a stream, or what is read of an error's body, is never longer.
_MOST_BYTES = 1 << 20


class _Nonsense(Exception):
    """An answer that the protocol does not have."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One server.

    Attributes:
      url: as in http://127.0.0.1:8000, with a path in front of /v1 where there is one.
      model: the name it is asked for; "" asks the server which it has.
      chat: talks over /v1/chat/completions instead of /v1/completions.
      ignore_eos: asks for whole answers (vLLM and llama.cpp know the field).
      timeout_s: for a whole answer.
      api_key: sent as a bearer token where given.
      clock: seconds; of all requests alike.
    """

    url: str
    model: str = ""
    chat: bool = False
    ignore_eos: bool = False
    timeout_s: float = 600.0
    api_key: str = dataclasses.field(default="", repr=False)
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url)
        try:
            legal = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number
            legal = False
        if not legal or parts.query or parts.fragment:
            raise UsageError(f"--endpoint must be as http://127.0.0.1:8000, found {self.url!r}")
        if not self.timeout_s > 0:
            raise UsageError(f"--timeout_s must be above 0, found {self.timeout_s:g}")

    def models(self) -> list[str]:
        """The names of what it serves. PeerFailed when it does not say."""
        connection, deadline = self._connect(min(self.timeout_s, 10.0))
        try:
            response, _ = self._ask(connection, deadline, "GET", "/v1/models")
            listed = json.loads(response.read(_MOST_BYTES))
            return [str(entry["id"]) for entry in listed["data"]]
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            KeyError,
            TypeError,
            _Nonsense,
        ) as e:
            raise PeerFailed(
                f"--endpoint={self.url} does not say which models it has ({_why(e)}); is it "
                "running? --model names one without asking"
            ) from e
        finally:
            connection.close()

    def complete(self, prompt: str, max_tokens: int) -> Reply:
        """One streamed answer. Never raises for what the server does: see `Reply.error`."""
        connection, deadline = self._connect(self.timeout_s)
        start = self.clock()
        arrivals: list[float] = []
        counts: dict[str, int] = {}
        error = ""
        try:
            body = self._body(prompt, max_tokens)
            response, sock = self._ask(connection, deadline, "POST", self._path, body)
            for event in _events(response, sock, deadline):
                if _text(event):
                    arrivals.append(self.clock())
                counts |= {k: v for k, v in _dict(event, "usage").items() if isinstance(v, int)}
            if not arrivals:
                error = "the answer held no text"
        except (OSError, http.client.HTTPException, ValueError, _Nonsense) as failure:
            error = _why(failure)
        finally:
            connection.close()
        return Reply(
            start,
            self.clock(),
            tuple(arrivals),
            counts.get("prompt_tokens", 0),
            counts.get("completion_tokens", len(arrivals)),
            error,
        )

    @property
    def _path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def _body(self, prompt: str, max_tokens: int) -> bytes:
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()

    def _connect(self, timeout_s: float) -> tuple[http.client.HTTPConnection, float]:
        parts = urllib.parse.urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert parts.hostname
        connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        return connection, time.monotonic() + timeout_s

    def _ask(self, connection, deadline, method, path, body=None):
        """(the response, of status 200; its socket). _Nonsense for any other status."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        base = urllib.parse.urlsplit(self.url).path.rstrip("/")
        connection.request(method, base + path, body, headers)
        sock = connection.sock  # the connection forgets it once a body without length follows
        _allow_until(sock, deadline)
        response = connection.getresponse()
        if response.status != 200:
            said = " ".join(response.read(2000).decode(errors="replace").split())
            raise _Nonsense(f"HTTP {response.status}: {said[:200]}")
        return response, sock


def _allow_until(sock, deadline: float) -> None:
    """The next read may take until then; TimeoutError where that has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    with contextlib.suppress(OSError):  # closed already: what is left lies in a buffer
        sock.settimeout(left)


def _events(response, sock, deadline: float) -> Iterator[dict]:
    """The data of a stream of server-sent events, up to its [DONE]."""
    seen = False
    while True:
        _allow_until(sock, deadline)
        line = response.readline(_MOST_BYTES)
        if not line:
            if not seen:
                raise _Nonsense("no server-sent events in the answer")
            return  # some servers close without a [DONE]
        if not line.startswith(b"data:"):
            continue  # blank lines, comments, names of events
        seen = True
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise _Nonsense(f"an event that is no object: {data[:60]!r}")
        if event.get("error"):
            raise _Nonsense(f"the server said {json.dumps(event['error'])[:200]}")
        yield event


def _text(event: dict) -> bool:
    """Whether an event brings some of the answer, reasoning included."""
    choices = event.get("choices")
    if not isinstance(choices, list):
        raise _Nonsense(f"an event without choices: {json.dumps(event)[:100]}")
    for choice in choices:
        if not isinstance(choice, dict):
            raise _Nonsense(f"a choice that is no object: {json.dumps(choice)[:100]}")
        delta = _dict(choice, "delta")
        if choice.get("text") or any(delta.get(k) for k in ("content", "reasoning_content")):
            return True
    return False


def _dict(values: dict, name: str) -> dict:
    """An object within another; an empty one where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _why(error: Exception) -> str:
    """A failure in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {' '.join(error.doc.split())[:60]!r}"
    return f"{type(error).__name__}: {error}" if not isinstance(error, _Nonsense) else str(error)
