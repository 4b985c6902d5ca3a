"""The client against a real HTTP server on this machine that answers well, badly or not at all."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from ternax.endpoint import Endpoint
from ternax.errors import PeerFailed, UsageError

WORDS = ("one ", "two ", "three ", "four ")


class Handler(http.server.BaseHTTPRequestHandler):
    """A completions server. The prompt says how it behaves: "7. slow" and so on."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = json.dumps({"data": [{"id": "served"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        prompt = body.get("prompt") or body["messages"][0]["content"]
        behaviour = prompt.partition(". ")[2] or prompt
        if behaviour == "broken":
            self.send_error(500, "out of paper")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            getattr(self, f"say_{behaviour}", self.say_well)(body)
            self.wfile.write(b"0\r\n\r\n")

    def send(self, text: str):
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def event(self, value):
        self.send(f"data: {json.dumps(value)}\n\n")

    def say_well(self, body):
        self.send(": a comment\n\n")
        for word in WORDS[: body["max_tokens"]]:
            time.sleep(0.02)
            choice = {"delta": {"content": word}} if "messages" in body else {"text": word}
            self.event({"choices": [choice]})
        if body["stream_options"]["include_usage"]:
            words = body.get("prompt", "").split()
            usage = {"prompt_tokens": 2 + 3 * len(words), "completion_tokens": 8}
            self.event({"choices": [], "usage": usage})
        self.send("data: [DONE]\n\n")

    def say_uncounted(self, body):
        for word in WORDS:
            self.event({"choices": [{"text": word}], "usage": None})

    def say_slow(self, body):
        self.event({"choices": [{"text": "one"}]})
        time.sleep(3)

    def say_drip(self, body):
        for _ in range(40):
            self.send(": still there\n\n")
            time.sleep(0.1)

    def say_nonsense(self, body):
        self.send("<html>hello</html>\n")

    def say_half(self, body):
        self.send("data: {'choices\n\n")

    def say_list(self, body):
        self.event([1, 2])

    def say_other(self, body):
        self.event({"result": "ok"})

    def say_odd(self, body):
        self.event({"choices": ["text"]})

    def say_silent(self, body):
        self.event({"choices": [{"text": "", "delta": 3}], "usage": [1]})
        self.send("data: [DONE]\n\n")

    def say_sorry(self, body):
        self.event({"error": {"message": "no room"}})


@contextlib.contextmanager
def serving():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.daemon_threads = [], True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def test_a_good_answer_is_timed_piece_by_piece(server):
    inner, url = server
    endpoint = Endpoint(url, "served", ignore_eos=True, api_key="secret")
    assert "secret" not in repr(endpoint)
    reply = endpoint.complete("hello", 4)
    assert reply.error == "" and len(reply.arrivals_s) == 4
    # The server's own count, though it sent two tokens a piece.
    assert (reply.prompt_tokens, reply.output_tokens) == (5, 8)
    assert 0.02 <= reply.ttft_s < reply.e2el_s <= reply.end_s - reply.start_s
    assert len(reply.itl_s) == 3 and min(reply.itl_s) > 0.01
    assert sum(reply.itl_s) == pytest.approx(reply.e2el_s - reply.ttft_s)
    assert reply.tpot_s == pytest.approx((reply.e2el_s - reply.ttft_s) / 7)
    path, body, key = inner.asked[-1]
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body["prompt"] == "hello" and body["ignore_eos"] and body["temperature"] == 0
    assert (body["model"], body["max_tokens"], body["stream"]) == ("served", 4, True)


def test_chat_and_a_server_that_does_not_count(server):
    inner, url = server
    reply = Endpoint(f"{url}/", "m", chat=True).complete("hello", 2)
    assert len(reply.arrivals_s) == 2 and inner.asked[-1][0] == "/v1/chat/completions"
    assert "ignore_eos" not in inner.asked[-1][1] and inner.asked[-1][2] is None
    uncounted = Endpoint(url, "m").complete("uncounted", 4)
    assert (uncounted.error, uncounted.output_tokens, uncounted.prompt_tokens) == ("", 4, 0)


def test_models(server):
    assert Endpoint(server[1]).models() == ["served"]
    with pytest.raises(PeerFailed, match="does not say which models .*HTTP 404"):
        Endpoint(f"{server[1]}/elsewhere").models()


@pytest.mark.parametrize(
    "prompt, why",
    [
        ("broken", "HTTP 500: "),
        ("nonsense", "no server-sent events"),
        ("half", 'not JSON: "{\'choices"'),
        ("list", "an event that is no object"),
        ("other", "an event without choices"),
        ("odd", "a choice that is no object"),
        ("silent", "the answer held no text"),
        ("sorry", 'the server said {"message": "no room"}'),
    ],
)
def test_an_answer_that_is_none_is_a_failed_reply(server, prompt, why):
    reply = Endpoint(server[1], "m", timeout_s=10).complete(prompt, 4)
    assert reply.error.startswith(why), reply.error


@pytest.mark.parametrize("prompt", ["slow", "drip"])
def test_a_slow_answer_ends_in_time(server, prompt):
    start = time.perf_counter()
    reply = Endpoint(server[1], "m", timeout_s=0.5).complete(prompt, 4)
    assert reply.error == "no answer in time" and time.perf_counter() - start < 2


def test_a_server_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert Endpoint(url, "m").complete("hello", 4).error == "connection refused"
    with pytest.raises(PeerFailed, match="connection refused.; is it running"):
        Endpoint(url).models()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://host:x", "http://host/?a=1"]
)
def test_what_is_no_address(url):
    with pytest.raises(UsageError, match="must be as http://127.0.0.1:8000"):
        Endpoint(url)
