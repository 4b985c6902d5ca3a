"""hf: sources, through huggingface_hub itself, from a server on this machine that speaks the
hub's protocol: a repository's commit, its tree, and its files with ranges and hashes."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse

import pytest

import ternax
from ternax.interop import hub
from tests.checkpoint import stored
from tests.interop import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLES = dict(embed_dtype="f32", head_dtype="f32")
COMMIT = "5" * 40
REVISIONS = ("main", "v1", COMMIT)
FIND = """
import json, sys
from ternax.checkpoint import box
from ternax.errors import TernaxError
try:
    found = box.find(sys.argv[1])
    files = sorted(path.name for path in found.directory.iterdir())
    print(json.dumps([found.config.name, found.origin, files, str(found.directory)]))
except TernaxError as error:
    print(f"{type(error).__name__} {error}")
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """`server.repositories`: name -> directory. `server.asked`: names of files sent."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):  # noqa: N802, the base class' name
        self.do_GET()

    def do_GET(self):  # noqa: N802
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        rest = words[4:] if api else words[2:]
        files = self.server.repositories.get(name)
        if name == "org/closed":
            return self.refuse(403, "GatedRepo")
        if files is None:
            return self.refuse(404 if api else 401, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        if api and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": blob(p)}
                for p in files.iterdir()
            ]
            return self.answer(json.dumps(entries).encode())
        if api:
            siblings = [{"rfilename": p.name} for p in files.iterdir()]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.answer(json.dumps(info).encode())
        file = files / rest[2]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{blob(file)}"', "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.asked.append(rest[2])
        return self.answer(file.read_bytes(), headers)

    def answer(self, body: bytes, headers=None, status: int = 200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str):
        self.answer(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, *_):
        pass


def blob(path: pathlib.Path) -> str:
    """git's own name of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub with org/small-bitnet, and what else an upload has beside a model."""
    folder = tmp_path_factory.mktemp("hub")
    ternax.save(models.packed(models.BITNET, **TABLES), folder / "model", "hf")
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    for other in ("README.md", "pytorch_model.bin", "modeling_bitnet.py", "model.gguf"):
        (folder / "model" / other).write_text("not to be asked for")
    (folder / "texts").mkdir()
    (folder / "texts" / "README.md").write_text("no model")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = {"org/small-bitnet": folder / "model", "org/texts": folder / "texts"}
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def find(source: str, home, server=None, **environment: str) -> str:
    """What a process of its own says, since huggingface_hub reads its settings once."""
    port = server.server_address[1] if server else 9  # where nothing listens
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", FIND, source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=os.environ | where | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_snapshot_is_fetched_once_and_then_used_offline(served, tmp_path):
    served.asked.clear()
    name, origin, files, where = json.loads(find("hf:org/small-bitnet@v1", tmp_path, served))
    assert name == "small-bitnet" and origin == "weights from hf:org/small-bitnet@v1"
    assert files == ["config.json", "model.safetensors", "tokenizer_config.json"]
    assert sorted(served.asked) == files  # what is read here, once each
    assert json.loads(find("hf:org/small-bitnet@v1", tmp_path, served))[0] == "small-bitnet"
    assert len(served.asked) == len(files)
    again = find("hf:org/small-bitnet@v1", tmp_path, HF_HUB_OFFLINE="1")
    assert json.loads(again)[2:] == [files, where]
    loaded = ternax.load(where, **TABLES)
    assert stored.bits(loaded) == stored.bits(models.packed(models.BITNET, **TABLES))


@pytest.mark.parametrize(
    "source, why",
    [
        ("hf:org/none", "UsageError hf:org/none: the hub knows no org/none, or only for those"),
        ("hf:org/closed", "UsageError hf:org/closed: org/closed wants its terms accepted"),
        ("hf:org/small-bitnet@v9", "UsageError hf:org/small-bitnet@v9: .* has no revision v9"),
        ("hf:org/texts", "BadModelFile hf:org/texts: .*expected a model of safetensors"),
    ],
)
def test_what_the_hub_has_not(served, tmp_path, source, why):
    said = find(source, tmp_path, served)
    assert re.match(why, said) and "\n" not in said, said


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_no_hub_is_one_line(tmp_path, environment):
    said = find("hf:org/small-bitnet", tmp_path, **environment)
    assert said == (
        "BadModelFile hf:org/small-bitnet: hub: the hub cannot be reached, and the cache does not "
        "hold all of it"
    )


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:../..", "hf:a/b c"]
)
def test_misspelt_sources(source):
    with pytest.raises(ternax.errors.UsageError) as caught:
        hub.fetch(source)
    assert "\n" not in str(caught.value)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ternax.errors.UsageError, match=r"pip install 'ternax\[hub\]'"):
        hub.fetch("hf:org/name")
