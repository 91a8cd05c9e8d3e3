"""playground.py: its numbers are model.py's, strangers are refused, and the page works in a browser."""
import contextlib
import copy
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from checkpoint import load_model, load_pretrained, save_pretrained
from conftest import TEXT
from explain import explain, probabilities, tokens, write
from fast import for_inference
from model import GPT, GPTConfig, keep_top_k, keep_top_p, penalize_repetition
from tokenizer import BPETokenizer

PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0}


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b).double(), atol=1e-5, rtol=0)


# --- numbers ---

@pytest.fixture(scope="module", params=["characters", "byte pairs"])
def machine(request, trained, tmp_path_factory):
    """A model as model.py computes it, the same as the page has it, and its tokenizer."""
    if request.param == "characters":
        plain, tok, _ = load_model(trained.folder / "out")
    else:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("gpt2") / "random"
        save_pretrained(GPT(GPTConfig(block_size=32, vocab_size=50257, n_layer=3, n_head=2, n_embd=16)),
                        BPETokenizer(), folder)
        plain, tok = load_pretrained(folder)
    fast = for_inference(load_model(trained.folder / "out")[0] if request.param == "characters" else
                         load_pretrained(folder)[0], "float32")
    return plain, fast, tok


@torch.no_grad()
def test_the_numbers_are_those_of_the_model(machine):
    model, fast, tok = machine
    ids = tok.encode(TEXT)[:25]
    logits, _ = model(torch.tensor([ids]))
    p, maps = logits[0].softmax(-1), model.attention_maps(torch.tensor([ids]))
    close(probabilities(fast, ids)[1:], [p[n, i] for n, i in enumerate(ids[1:])])
    for n in (1, 2, 24):
        found = explain(fast, tok, ids[:n], 32, ids[n], 1, 1, PLAIN)
        for candidate in found["candidates"]:
            close(candidate["probabilities"]["model"], p[n - 1, candidate["id"]])
        assert ids[n] in [c["id"] for c in found["candidates"]]
        assert found["candidates"][0]["id"] == p[n - 1].argmax()
        close(found["attention"], maps[1, 0, 1, n - 1, :n])
        assert len(found["lens"]) == model.config.n_layer + 1
        close(found["lens"][-1]["chosen"], p[n - 1, ids[n]])  # after the last block, the lens is the model
        close([t["probability"] for t in found["lens"][-1]["likeliest"]], p[n - 1].topk(3).values)
        embedded = model.wte.weight[ids[n - 1]] + model.wpe.weight[n - 1]
        close(found["lens"][0]["chosen"], model.lm_head(model.ln_f(embedded)).softmax(-1)[ids[n]])


@torch.no_grad()
def test_after_an_error_the_numbers_are_right_again(machine):
    """It may leave a cache that is half filled with other tokens."""
    model, fast, tok = machine
    ids = tok.encode(TEXT)[5:17]
    p = model(torch.tensor([ids + ids[:1]]))[0][0, -1].softmax(-1)
    explain(fast, tok, ids, 32, 5, 1, 1, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("explain.CHUNK", 3)
        with pytest.raises(IndexError):
            explain(fast, tok, [*ids[3:9], 10 ** 6, *ids], 32, 5, 1, 1, PLAIN)
    found = explain(fast, tok, ids + ids[:1], 32, 5, 1, 1, PLAIN)["candidates"]
    close([c["probabilities"]["model"] for c in found], [p[c["id"]] for c in found])


@torch.no_grad()
def test_the_logits_are_those_of_a_changed_model(machine, monkeypatch):
    """Of one that does something after lm_head, and that runs its last block twice."""
    model, _, tok = machine
    ids, forward = tok.encode(TEXT)[:9], GPT.forward

    def capped(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        return torch.tanh(logits), loss

    monkeypatch.setattr(GPT, "forward", capped)
    changed = copy.deepcopy(model)
    changed.h[-1] = changed.h[-2]
    p = changed(torch.tensor([ids]))[0][0, -1].softmax(-1)
    found = explain(for_inference(changed), tok, ids, 32, 5, 0, 0, PLAIN)
    close([c["probabilities"]["model"] for c in found["candidates"]], [p[c["id"]] for c in found["candidates"]])
    close(found["lens"][-1]["chosen"], p[5])
    streams = changed.wte.weight[ids] + changed.wpe.weight[:len(ids)]
    for n in range(model.config.n_layer):
        close(found["lens"][n]["chosen"], changed.lm_head(changed.ln_f(streams[-1])).softmax(-1)[5])
        streams = changed.h[n](streams[None])[0]


@torch.no_grad()
def test_each_sampler_is_shown(machine):
    model, fast, tok = machine
    ids = tok.encode(TEXT)[:60]
    logits = model(torch.tensor([ids[-32:]]))[0][:, -1]  # the context is full; the penalty sees all
    found = explain(fast, tok, ids, 32, None, 0, 0, dict(temperature=0.7, top_k=9, top_p=0.6, repetition_penalty=1.5))
    steps = {"model": logits}
    steps["penalty"] = penalize_repetition(logits, torch.tensor([ids]), 1.5)
    steps["temperature"] = steps["penalty"] / 0.7
    steps["top-k"] = keep_top_k(steps["temperature"], 9)
    steps["top-p"] = keep_top_p(steps["top-k"], 0.6)
    for candidate in found["candidates"]:
        assert list(candidate["probabilities"]) == list(steps)
        for name, z in steps.items():
            close(candidate["probabilities"][name], z.softmax(-1)[0, candidate["id"]])
    greedy = explain(fast, tok, ids, 32, None, 0, 0, PLAIN | {"temperature": 0})["candidates"]
    assert [c["probabilities"]["top-p"] for c in greedy][:2] == [1.0, 0.0]


@torch.no_grad()
def test_what_is_written_is_what_the_model_streams(machine):
    model, fast, tok = machine
    ids, how = tok.encode(TEXT)[:10], dict(temperature=0.8, top_k=5)
    found = list(write(fast, tok, ids, 60, 3, PLAIN | how))
    streamed = fast.stream([ids], 60, **how, eos_id=tok.eot, generator=torch.Generator().manual_seed(3))
    assert [t["id"] for t in found] == [i.item() for i in streamed]
    decoder = tok.stream()
    assert "".join(t["text"] for t in found) == "".join(decoder.push(t["id"]) for t in found)
    for n, t in enumerate(found):  # past the 32 positions of the context, too
        window = [*ids, *(t["id"] for t in found)][10 + n - t["context"]:10 + n]
        close(t["probability"], model(torch.tensor([window]))[0][0, -1].softmax(-1)[t["id"]])


def test_a_text_goes_on_in_the_middle_of_a_character(monkeypatch):
    tok, model = BPETokenizer(), GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)).eval()
    ids = tok.encode("é 你")

    def stream(*args, **how):  # the rest of the last character
        model(torch.tensor([ids[:-1]]), cache=model.new_cache(1))
        yield torch.tensor(ids[-1:])

    monkeypatch.setattr(model, "stream", stream)
    assert tok.decode(ids[:-1]).endswith("\ufffd")
    assert [t["text"] for t in write(model, tok, ids[:-1], 1, 0, PLAIN)] == ["你"]


def test_half_a_character_has_its_bytes():
    found = tokens(BPETokenizer(), BPETokenizer().encode("é 你"))
    assert "".join(t["text"] for t in found) == "é 你"
    assert [t["bytes"] for t in found if t["bytes"]] and found[-1]["bytes"]


# --- the server ---

@pytest.fixture(scope="module")
def server(trained):
    """A running playground.py: its port and its process."""
    process = subprocess.Popen(trained.command("playground.py", "--port=0"), cwd=trained.folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stdout.readline()
    assert line.startswith("out: open http://127.0.0.1:"), process.stderr.read()
    yield int(line.split(":")[3].split()[0]), process
    process.terminate()
    assert "Traceback" not in process.communicate()[1]


def ask(server, method="GET", path="/", body=None, **headers):
    """-> status, body."""
    connection = http.client.HTTPConnection("127.0.0.1", server[0], timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def post(server, path, **fields):
    status, body = ask(server, "POST", path, json.dumps(fields))
    return status, json.loads(body) if path != "/write" or status != 200 else [*map(json.loads, body.splitlines())]


def test_the_page_and_its_requests(server):
    status, page = ask(server)
    assert status == 200 and page.startswith(b"<!DOCTYPE html>") and b"http" not in page.replace(b"http-equiv", b"")
    model = json.loads(ask(server, "GET", "/model")[1])
    assert model["n_layer"] == 2 and model["start"][0]["text"] == "\n"
    status, found = post(server, "/tokens", text="The old miller")
    assert status == 200 and "".join(t["text"] for t in found["tokens"]) == "The old miller"
    ids = [t["id"] for t in found["tokens"]]
    status, found = post(server, "/tokens", text="The <old> miller")
    assert status == 200 and "'<' (U+003C) is not among" in found["error"]
    status, written = post(server, "/write", ids=ids, max_new_tokens=40, temperature=0)
    assert status == 200 and len(written) == 40
    status, found = post(server, "/explain", ids=ids, token=written[0]["id"], layer=1, head=1)
    assert status == 200 and found["candidates"][0]["id"] == written[0]["id"]
    status, found = post(server, "/square", ids=ids, layer=1)
    assert status == 200 and found["side"] == len(ids)


def test_lines_of_the_model(server, trained):
    source = (trained.folder / "model.py").read_text().splitlines()
    for name, (first, _) in json.loads(ask(server, "GET", "/model")[1])["lines"].items():
        assert any(f" {name}{mark}" in line for mark in "(:" for line in source[first - 1:first + 1])  # or a decorator


def test_strangers_are_refused(server):
    for headers in (
            {"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Host": "127.0.0.1:1"}, {"Host": ""},
            {"Host": "localhost"}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1"}):
        for method, path in (("GET", "/"), ("GET", "/model"), ("POST", "/write")):
            status, body = ask(server, method, path, "{}" if method == "POST" else None, **headers)
            assert status == 403 and "may ask" in json.loads(body)["error"], headers
    for name in ("127.0.0.1", "localhost"):  # both names of this computer are welcome
        site = f"{name}:{server[0]}"
        assert ask(server, "GET", "/model", Host=site, Origin=f"http://{site}")[0] == 200


BAD = [None, 0, -1, 1.5, "x", [], {}, True, 10 ** 30, [-1], [10 ** 9], [True], ["a"], [[]], [None], "\ud800",
       [0] * 30_000]


def test_any_field_is_an_answer_or_a_line(server):
    for path in ("/tokens", "/explain", "/square", "/write"):
        for field in ("ids", "text", "token", "layer", "head", "context", "temperature", "top_k", "top_p", "seed",
                      "repetition_penalty", "max_new_tokens"):
            for value in BAD:
                status, body = post(server, path, **{"ids": [0, 1], "max_new_tokens": 2} | {field: value})
                assert status == 200 or (status == 400 and set(body) == {"error"} and "\n" not in body["error"]), body


def test_hostile_requests(server):
    for method, path, body, headers, status in (
            ("POST", "/tokens", "[" * 100_000, {}, 400), ("POST", "/tokens", "nonsense", {}, 400),
            ("POST", "/tokens", "3", {}, 400), ("POST", "/tokens", "{}", {"Content-Type": "text/plain"}, 400),
            ("POST", "/tokens", " " * 200_000, {}, 400), ("POST", "/tokens", "9" * 10_000, {}, 400),
            ("POST", "/tokens", "{}", {"Content-Length": "-1"}, 400), ("POST", "/nothing", "{}", {}, 404),
            ("POST", "/tokens", "{}", {"Content-Length": "x"}, 400), ("POST", "/tokens", b"\xff\xfe", {}, 400),
            ("POST", "/tokens", "{}", {"Content-Length": "9" * 30}, 400), ("GET", "/../model.py", None, {}, 404),
            ("GET", "/write", None, {}, 404), ("PUT", "/", "{}", {}, 501), ("DELETE", "/", None, {}, 501),
            ("OPTIONS", "/write", None, {}, 501), ("GET", "/" + "a" * 70_000, None, {}, 414)):
        found, answer = ask(server, method, path, body, **headers)
        assert found == status and set(json.loads(answer)) == {"error"}, (method, path, headers)


def memory_of(process):
    with open(f"/proc/{process.pid}/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_many_at_once_and_half_sent(server):
    port, process = server
    before, half = memory_of(process), []
    for start in (b"", b"GET", b"POST /write HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % port,
                  b"POST /tokens HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                  b"Content-Length: 100000\r\n\r\n{" % port) * 12:
        half.append(socket.create_connection(("127.0.0.1", port)))
        half[-1].sendall(start)
    found = []
    threads = [threading.Thread(target=lambda: found.append(post(server, "/tokens", text=TEXT[:5000])[0]))
               for _ in range(30)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [200] * 30 and memory_of(process) - before < 200
    for connection in half:
        connection.close()
    assert ask(server)[0] == 200


def test_a_text_ends_when_the_page_goes_away(server):
    request = json.dumps({"ids": [0], "max_new_tokens": 2000}).encode()
    connection = socket.create_connection(("127.0.0.1", server[0]))
    connection.sendall(b"POST /write HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%b" % (server[0], len(request), request))
    assert b"200" in connection.recv(1000)
    connection.close()
    start = time.time()
    assert len(post(server, "/write", ids=[0], max_new_tokens=3)[1]) == 3  # it does not wait for 2,000 tokens
    assert time.time() - start < 2


def test_errors(trained, server):
    assert "port 99999 " not in trained.fails("playground.py", "--port=99999")
    assert "no checkpoint in none" in trained.fails("playground.py", "--out_dir=none")
    assert "cannot be used" in trained.fails("playground.py", f"--port={server[0]}")


# --- the page, in Chromium ---

@pytest.fixture(scope="module")
def browser():
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    selenium = pytest.importorskip("selenium.webdriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = selenium.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


OVERLAPS = """
const boxes = [...document.querySelectorAll("h1, h2, p, button, label, table, #text, #looked, #square, .meter")]
  .filter(e => e.offsetParent && !e.closest(".scroll")).map(e => [e, e.getBoundingClientRect()]);
const shared = (r, s, start, end) => Math.min(r[end], s[end]) - Math.max(r[start], s[start]);
return boxes.flatMap(([a, r], i) => boxes.slice(i + 1).filter(([b, s]) => !a.contains(b) && !b.contains(a)
  && shared(r, s, "left", "right") > 1 && shared(r, s, "top", "bottom") > 1)
  .map(([b]) => a.outerHTML.slice(0, 60) + " overlaps " + b.outerHTML.slice(0, 60)));"""


def test_in_a_browser(server, browser, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException

    def find(selector):
        return browser.find_elements("css selector", selector)

    def until(condition):
        deadline, found = time.time() + 20, False
        while not found:
            assert time.time() < deadline
            time.sleep(0.02)
            with contextlib.suppress(StaleElementReferenceException):  # the page has just drawn it anew
                found = condition()

    browser.get(f"http://127.0.0.1:{server[0]}/")
    until(lambda: find("#candidates tr"))
    find("#change")[0].click()
    find("#edit")[0].clear()
    find("#edit")[0].send_keys("The old <b>")
    find("#change")[0].click()
    until(lambda: find("#status.bad"))
    assert "'<' (U+003C) is not among" in find("#status")[0].text
    find("#edit")[0].clear()
    find("#edit")[0].send_keys("The old")
    find("#write")[0].click()
    until(lambda: len(find("#text .token")) > 100 and find("#write")[0].text == "Go on")
    find("#t30")[0].click()
    until(lambda: find("#t30[aria-selected=true]") and find("#candidates .chosen"))
    until(lambda: len(find("#heads button")) == 4 and len(find("#lens tr")) == 1 + 3)
    browser.execute_script("document.querySelectorAll('#heads button')[3].click()")
    until(lambda: "Layer 1, head 1" in find("#head-name")[0].text)
    before = find("#candidates")[0].text
    browser.execute_script("top_k.value = 2; top_k.dispatchEvent(new Event('input'))")
    until(lambda: "cut by top-k" in find("#candidates")[0].text)
    assert find("#candidates")[0].text != before
    find("#text")[0].send_keys("\ue012")  # the left arrow
    until(lambda: find("#t29[aria-selected=true]"))
    for width in (1280, 400):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 1800, "deviceScaleFactor": 1, "mobile": False})
        time.sleep(0.3)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OVERLAPS) == []
        browser.save_screenshot(str(tmp_path / f"{width}.png"))
    # An edit that changes nothing keeps the figures. A new text is explained from its first token on.
    titles = "return [...document.querySelectorAll('#text .token')].map(e => e.title)"
    before = browser.execute_script(titles)
    assert len(before) > 100
    find("#change")[0].click()
    find("#change")[0].click()
    until(lambda: find("#text")[0].is_displayed())
    assert browser.execute_script(titles) == before
    find("#text")[0].send_keys("\ue011")  # home: nothing came before the first token
    until(lambda: "Nothing came before" in find("#looked")[0].text)
    assert not find("#heads button") and find("#head-name")[0].text == "" and "0 of" in find("#memory")[0].text
    find("#t20")[0].click()
    find("#clear")[0].click()
    until(lambda: "the last token itself" in find("#head-name")[0].text and find("#write")[0].text == "Write")
    browser.execute_script("top_k.value = 3; top_k.dispatchEvent(new Event('input'))")
    find("#edit")[0].send_keys("The old")
    find("#change")[0].click()
    until(lambda: len(find("#text .token")) == 8 and find("#write")[0].text == "Go on")
    browser.execute_script("t3.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    until(lambda: find("#t3[aria-selected=true]"))
    # An answer that arrives just after another token was chosen is not drawn.
    browser.execute_script("""
        const answered = window.fetch, drawn = showCandidates;
        window.late = [];
        window.fetch = async (...request) => {
          const answer = await answered(...request);
          if (chosen === 7) choose(3);
          return answer;
        };
        showCandidates = (candidates, token) => { late.push(token?.text); drawn(candidates, token); };
        choose(7);""")
    until(lambda: browser.execute_script("return late.length"))
    assert browser.execute_script("return late.length === 1 && late[0] === tokens[3].text")
    assert not find("#status.bad") and browser.get_log("browser") == []
