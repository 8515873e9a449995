"""The Hugging Face hub, played by a server on this machine: what it has is downloaded once and opened, what it does not give is named in one line, before anything large is fetched."""
import http.server, json, os, subprocess, sys, threading

import pytest
from test_families import write

COMMIT = "1" * 40
MODELS = {                                                                                           # what the hub says of each: files that are no more than a name and a size, weights, licence
    "someone/tiny": {},
    "someone/cut": {},
    "someone/gated": {"files": {"config.json": 700, "model.safetensors": 5_000_000}, "gated": "manual"},
    "someone/huge": {"files": {"config.json": 700, "model-00001-of-00163.safetensors": 4_300_000_000}, "total": 671_000_000_000},
    "someone/half": {"files": {"config.json": 700, "model.safetensors": 600_000_000_000}},
    "someone/tiny-GGUF": {"files": {"tiny.Q4_K_M.gguf": 5_000_000}},
    "someone/pickled": {"files": {"config.json": 700, "pytorch_model.bin": 5_000_000}},
    "someone/new-kind": {"class": "NoSuchForCausalLM"},
}


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the hub's interface as its client asks for."
    def log_message(self, *arguments): pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        self.server.asked.append(path)
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if name not in MODELS: return self.answer(404, X_Error_Code="RepoNotFound")
        about = MODELS[name]
        files = about.get("files") or {file.name: file.stat().st_size for file in (self.server.files / name).iterdir()}
        if path.endswith("auth-check"): return self.answer(403 if "gated" in about else 200, X_Error_Code="GatedRepo")
        if "/tree/" in path: return self.answer(200, json.dumps([{"type": "file", "path": file, "size": size, "oid": COMMIT} for file, size in files.items()]).encode(), Content_Type="application/json")
        if path.startswith("api/"):
            told = {"id": name, "sha": COMMIT, "private": False, "gated": about.get("gated", False), "siblings": [{"rfilename": file, "size": size} for file, size in files.items()]}
            if "total" in about: told["safetensors"] = {"parameters": {"BF16": about["total"]}, "total": about["total"]}
            return self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        if name == "someone/cut" and self.server.broken and path.endswith("safetensors"): return self.answer(503)
        content = (self.server.files / name / path.split("/")[-1]).read_bytes()
        self.answer(200, content, ETag=f'"{abs(hash(content)):040x}"')


@pytest.fixture
def hub(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.broken = tmp_path / "there", [], True
    write("qwen2.5", server.files / "someone" / "tiny")
    write("llama3", server.files / "someone" / "new-kind")
    write("llama3", server.files / "someone" / "cut")
    (server.files / "someone" / "half").mkdir()
    (server.files / "someone" / "half" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}')     # the hub does not count its weights
    config = server.files / "someone" / "new-kind" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM"))
    (server.files / "someone" / "tiny" / "pytorch_model.bin").write_bytes(b"never fetched")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


ASK = """
import sys
from mechinterp_lib.core import InputError
from mechinterp_lib.models import load_model
for name in sys.argv[1:]:
    try: print(name, tuple(load_model(name, device="cpu")("AB").shape))
    except InputError as error: print(name, "|", error)
"""


def ask(hub, tmp_path, *names, **environment):
    settings = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run([sys.executable, "-c", ASK, *names], capture_output=True, text=True, timeout=300, env=settings)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.strip().splitlines())


def test_the_hub(hub, tmp_path):
    said = ask(hub, tmp_path, *MODELS, "someone/missing")
    assert said["someone/tiny"] == "(1, 3, 50)"                                                      # the begin token that its tokenizer_config.json asks for, and two letters
    for name, words in {"gated": "accept its licence", "huge": "671,000,000,000 weights need 2684.0 GB as float32", "half": "300,000,000,000 weights need 1200.0 GB as float32", "tiny-GGUF": "GGUF", "pickled": "pickled weights can run code", "new-kind": "NoSuchForCausalLM", "missing": "has no such model"}.items():
        assert words in said[f"someone/{name}"], said
    assert "the download failed" in said["someone/cut"]
    hub.broken = False
    assert ask(hub, tmp_path, "someone/cut")["someone/cut"] == "(1, 3, 50)"
    for file in (tmp_path / "home" / "hub").glob("models--someone--cut/snapshots/*/tokenizer*"): file.unlink()                  # as another program leaves it
    assert ask(hub, tmp_path, "someone/cut")["someone/cut"] == "(1, 3, 50)"
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert not [path for path in fetched if path.startswith(("someone/huge", "someone/gated", "someone/pickled")) or path.endswith("pytorch_model.bin")]
    hub.asked.clear()
    assert ask(hub, tmp_path, "someone/tiny")["someone/tiny"] == "(1, 3, 50)" and not hub.asked      # the second time from the cache
    assert ask(hub, tmp_path, "someone/tiny", HF_HUB_OFFLINE="1")["someone/tiny"] == "(1, 3, 50)"
    assert "check the spelling and the network" in ask(hub, tmp_path, "someone/other", HF_ENDPOINT="http://127.0.0.1:9")["someone/other"]
