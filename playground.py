"""Serves a page on which your model writes, and which shows how it chooses each token.

    python playground.py                          # the run in out/
    python playground.py --init_from=gpt2         # GPT-2's weights: by name, or a Hugging Face folder

Open the address that it prints. Only this computer can reach it. The page is playground.html. It gets its
figures from this program, as JSON. Requests from other pages are refused. Ctrl-C ends the program.
"""
import os

init_from = "resume"        # resume: the run in out_dir; else gpt2, ..., gpt2-xl, a Hugging Face name, a folder
out_dir = "out"             # the run to take the model from
port = 8000                 # the port in the page's address; 0: any that is free
device: str | None = None   # cpu, cuda, cuda:1, mps, xpu; None: the best there is
# Settings are read before the heavy imports, so that --help and a typo answer at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import contextlib
import inspect
import json
import queue
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from files import UserError, check

check(config, "from 0 to 65535", lambda x: 0 <= x < 2 ** 16, "port")

import model as model_py
from checkpoint import load_to_sample
from device import choose_device
from explain import explain, read, square, tokens, write
from fast import for_inference

PAGE = Path(__file__).resolve().with_name("playground.html").read_bytes()
LARGEST, LONGEST = 1 << 17, 20_000  # bytes of a request, tokens of a text
SAFE = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", (
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'"))]  # the page loads nothing from elsewhere, and no other page may show it in a frame

device = choose_device(device)
model, tok = load_to_sample(init_from, out_dir)
for_inference(model.to(device), "float32")
vocab_size, block_size = model.config.vocab_size, model.config.block_size
tasks, writing = queue.SimpleQueue(), threading.Lock()  # what there is to compute; one text is written at a time


# --- what the page shows ---

def describe():
    """The model, a prompt to begin with, and the lines of model.py that the page speaks of."""
    parts = {"attention": model_py.attention, "sample": model_py.sample, "stream": model_py.GPT.stream,
             "KVCache": model_py.KVCache, "Block": model_py.Block}
    lines = {name: inspect.getsourcelines(part) for name, part in parts.items()}
    start = [tok.eot] if tok.eot is not None else tok.encode("\n" if "\n" in tok.chars else tok.chars[0])
    return vars(model.config) | {
        "name": out_dir if init_from == "resume" else init_from, "parameters": model.num_parameters(),
        "weight_bytes": sum(m.weight.nbytes for m in model.modules() if isinstance(m, model_py.nn.Linear)),
        "start": tokens(tok, start), "lines": {k: [first, first + len(text) - 1] for k, (text, first) in lines.items()}}


# --- requests ---

NUMBERS = {"temperature": (0, 100), "top_p": (1e-9, 1), "repetition_penalty": (0.1, 10), "top_k": (1, 10 ** 9),
           "seed": (0, 2 ** 53), "token": (0, vocab_size - 1), "context": (1, block_size), "max_new_tokens": (1, 2000),
           "layer": (0, model.config.n_layer - 1), "head": (0, model.config.n_head - 1)}  # the smallest and the largest
DEFAULTS = dict.fromkeys(NUMBERS) | {"temperature": 1.0, "repetition_penalty": 1.0, "seed": 0, "layer": 0, "head": 0,
                                     "context": block_size, "max_new_tokens": 200, "ids": [], "text": ""}


def answer(path, request):
    """A path and the fields of a request -> what to send, or an iterator over what to send bit by bit. UserError for a
    field that is not as it should be."""
    request = DEFAULTS | {k: v for k, v in request.items() if v is not None}
    for name, (least, largest) in NUMBERS.items():
        kinds = (int, float) if name in ("temperature", "top_p", "repetition_penalty") else (int,)
        check(request, f"a number from {least} to {largest}", lambda x, kinds=kinds, least=least, largest=largest: (
            type(x) in kinds and least <= x <= largest), name)
    check(request, "a text", lambda x: type(x) is str, "text")
    check(request, f"a list of 1 to {LONGEST} ids from 0 to {vocab_size - 1}", lambda x: path == "/tokens" or (
        type(x) is list and 0 < len(x) <= LONGEST and all(type(i) is int and 0 <= i < vocab_size for i in x)), "ids")
    sampling = {k: request[k] for k in ("temperature", "top_k", "top_p", "repetition_penalty")}
    ids, layer, head = request["ids"], request["layer"], request["head"]
    if path == "/write":
        return write(model, tok, ids, request["max_new_tokens"], request["seed"], sampling)
    if path == "/tokens":
        try:
            ids = tok.encode_prompt(request["text"])
        except UserError as e:  # a character that the model does not know is no bad request
            return {"error": str(e)}
        if len(ids) > LONGEST:
            return {"error": f"the text has {len(ids):,} tokens; the page takes at most {LONGEST:,}"}
        return {"tokens": read(model, tok, ids)}
    if path == "/square":
        return square(model, ids[-request["context"]:], layer, head)
    return explain(model, tok, ids, request["context"], request["token"], layer, head, sampling)


def compute(function, *args):
    """Calls the function in the main thread, the only one that uses the model, and returns its result."""
    future = Future()
    tasks.put((future, function, args))
    return future.result()


class Handler(BaseHTTPRequestHandler):
    """Answers the page, and refuses everybody else: a page of another site may not send requests here (Origin), nor
    under a name of its own that leads to this computer (Host)."""

    timeout = 10  # seconds without a byte

    def handle(self):
        """Answers one request. A connection that the other side gives up ends in silence."""
        with contextlib.suppress(OSError):
            super().handle()

    def do_GET(self):
        """The page, and what it needs to know about the model."""
        if self.is_welcome("/", "/model"):
            self.send(200, *(PAGE, "text/html; charset=utf-8") if self.path == "/" else (describe(),))

    def do_POST(self):
        """A request of the page."""
        if not self.is_welcome("/tokens", "/explain", "/square", "/write"):
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if self.headers.get_content_type() != "application/json" or not 0 <= length <= LARGEST:
                raise ValueError
            request = json.loads(self.rfile.read(length))
            if type(request) is not dict:
                raise ValueError
            found = compute(answer, self.path, request)
            self.send(200, found) if isinstance(found, dict) else self.send_lines(found)
        except UserError as e:
            self.send(400, {"error": str(e)})
        except (ValueError, RecursionError):
            self.send(400, {"error": f"expected a JSON object of at most {LARGEST:,} bytes; is the text too long?"})

    def is_welcome(self, *paths):
        """Whether the request comes from the page on this server and has one of these paths. If not, it is refused."""
        host = ", ".join(self.headers.get_all("Host", []))
        from_here = host in HOSTS and self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        if not from_here:
            self.send(403, {"error": f"only the page at http://{HOSTS[0]} may ask"})
        elif self.path not in paths:
            self.send(404, {"error": f"there is nothing at {self.path[:80]}"})
        return from_here and self.path in paths

    def send(self, code, found, kind="application/json"):
        """Sends an answer and ends the connection."""
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.begin(code, ("Content-Type", kind), ("Content-Length", len(data)))
        self.wfile.write(data)

    def begin(self, code, *headers):
        """Sends the head of an answer."""
        self.send_response(code)
        for name, value in (*headers, *SAFE):
            self.send_header(name, value)
        self.end_headers()

    def send_lines(self, found):
        """Sends each item as a line of JSON when it is there, until all are sent or the page goes away."""
        if not writing.acquire(timeout=5):
            self.send(503, {"error": "another text is being written"})
            return
        try:
            self.begin(200, ("Content-Type", "application/x-ndjson"))
            while item := compute(next, found, None):
                self.wfile.write(json.dumps(item).encode() + b"\n")
        finally:
            compute(found.close)
            writing.release()

    def send_error(self, code, message=None, explain=None):
        """What the base class refuses, such as other methods, in JSON, too."""
        self.send(code, {"error": message or "this request makes no sense"})

    def log_message(self, *args):
        """Requests are not shown."""


ThreadingHTTPServer.request_queue_size = 64  # connections that may wait
try:
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
except OSError as e:
    raise UserError(f"port {port} cannot be used ({e.strerror}); choose another --port") from None
HOSTS = [f"{name}:{server.server_port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]  # as browsers write
print(f"{describe()['name']}: open http://{HOSTS[0]} (Ctrl-C ends)", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    future, function, args = tasks.get()
    try:
        future.set_result(function(*args))
    except Exception as e:
        future.set_exception(e)
