"""Generates text with a trained model and prints it token by token.

    python sample.py --start="ROMEO:"                          # the best checkpoint of the run in out/
    python sample.py --start=FILE:prompt.txt --num_samples=3 --top_p=0.9
    python sample.py --temperature=0                           # always the most likely token
    python sample.py --init_from=gpt2 --start="The answer is"  # GPT-2's weights: by name, or a Hugging Face folder

Several samples are generated together. The first is printed while it is written, the others when they are complete.
"""
import os

init_from = "resume"               # resume: the run in out_dir; else gpt2, ..., gpt2-xl, a Hugging Face name, a folder
out_dir = "out"                    # the run to take the model from
start: str | None = None           # the prompt, in which \n is a newline, or FILE:path; None: a newline
                                   # "": none, so that a new text begins (only with GPT-2's tokens)
num_samples = 1                    # texts to write
max_new_tokens = 500               # tokens in each, at most
temperature = 0.8                  # below 1 plays safe, above 1 dares more, 0 always takes the most likely token
top_k: int | None = None           # draw from the k most likely tokens only
top_p: float | None = None         # draw from the smallest set of tokens that holds this much probability
repetition_penalty = 1.0           # above 1 makes tokens that have occurred less likely
stop: str | None = None            # a text, in which \n is a newline, that ends a sample; it is not shown
interactive = False                # read prompts from the keyboard; Ctrl-C stops a text, Ctrl-D (Windows: Ctrl-Z) ends
seed = 1337                        # the same seed gives the same text
device: str | None = None          # cpu, cuda, cuda:1, mps, xpu; None: the best there is
dtype: str | None = None           # of the weights: float32, bfloat16, float16, int8; None: 16 bits on CUDA, else 32
compile = False                    # compile the step for one token: up to minutes, on a CPU once for each num_samples
# Settings are read before the heavy imports, so that --help and a typo answer at once.
exec(open(os.path.join(os.path.dirname(os.path.realpath(__file__)), "configurator.py"), encoding="utf-8").read())

import contextlib
import itertools
import math
import sys

from files import UserError, check, read_small, unescape

check(config, "at least 1", lambda x: x >= 1, "num_samples", "top_k")
check(config, "at least 0", lambda x: x >= 0, "max_new_tokens")
check(config, "at least 0 and finite", lambda x: 0 <= x < math.inf, "temperature")
check(config, "in (0, 1]", lambda x: 0 < x <= 1, "top_p")
check(config, "from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6, "repetition_penalty")  # else logits could be infinite
check(config, "a text, not empty", bool, "stop")
check(config, "float32, bfloat16, float16 or int8", lambda x: x in ("float32", "bfloat16", "float16", "int8"), "dtype")

import torch

from checkpoint import load_to_sample
from device import check_generation_memory, choose_device, choose_dtype
from fast import for_inference


class Text:
    """The text of one sample, from its ids: ends at the end-of-text token or where the stop string begins."""

    def __init__(self, tok):
        self.tok, self.decoder, self.text, self.shown, self.done = tok, tok.stream(), "", 0, False

    def push(self, i):
        """Takes one more id, unless the sample has ended."""
        if self.done or i == self.tok.eot:
            self.end()
            return
        self.text += self.decoder.push(i)
        if stop and stop in self.text:
            self.text, self.done = self.text[:self.text.index(stop)], True

    def end(self):
        """No more ids will come: adds what the decoder held back, since a character may consist of several tokens."""
        if not self.done:
            self.text, self.done = self.text + self.decoder.flush(), True

    def show(self):
        """Prints what is new, except for an ending that is the beginning of the stop string."""
        held = 0
        if stop and not self.done:
            held = max((n for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        print(self.text[self.shown:len(self.text) - held], end="", flush=True)
        self.shown = max(self.shown, len(self.text) - held)


def read_prompt(start):
    """The setting `start` -> the prompt as text and as ids."""
    if start is None:
        prompt = "\n" if tok.eot is not None or "\n" in tok.chars else tok.chars[0]
    elif start == "FILE:":
        raise UserError("--start=FILE: needs the name of a file, as in --start=FILE:prompt.txt")
    elif start.startswith("FILE:") and "\0" in start:
        raise UserError(f"{start[5:]!r} cannot be the name of a file")
    elif start.startswith("FILE:"):
        try:
            prompt = read_small(os.path.expanduser(start[5:]), pipes=True).decode("utf-8-sig")
            prompt = prompt.replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{start[5:]} is not UTF-8 at byte {e.start}; convert it first, for example with iconv"
                            ) from None
    else:
        prompt = unescape(start)
        if tok.eot is not None:
            return prompt.replace("<|endoftext|>", ""), tok.encode_prompt(prompt) or [tok.eot]
    if not prompt and tok.eot is None:
        raise UserError(f"{'the file' if start else '--start'} is empty, and this model has no end-of-text token to "
                        "begin with; give some text")
    return prompt, tok.encode(prompt) or [tok.eot]  # after the end of a text, a new one begins


def write_texts(prompt, ids):
    """Generates the samples that follow a prompt and prints them."""
    if len(ids) > model.config.block_size:
        print(f"the prompt has {len(ids)} tokens; the model reads the last {model.config.block_size}", file=sys.stderr)
    length = min(model.config.block_size, len(ids) + max_new_tokens)  # of the key-value cache
    check_generation_memory(device, model, num_samples, length, temperature, "lower --num_samples")
    texts = [Text(tok) for _ in range(num_samples)]
    stream = model.stream(torch.tensor([ids], device=device), max_new_tokens, temperature, top_k, top_p,
                          repetition_penalty, tok.eot, num_samples, generator=generator)
    first_steps = list(itertools.islice(stream, 2))  # before printing: the second may say that it compiles
    print(prompt, end="", flush=True)
    for step in itertools.chain(first_steps, stream):
        for text, i in zip(texts, step.tolist(), strict=True):
            text.push(i)
        texts[0].show()
        if all(text.done for text in texts):
            break
    for n, text in enumerate(texts):
        text.end()
        if n > 0:
            print(f"---\n{prompt}", end="")
        text.show()
        print(flush=True)


def converse():
    """Reads a prompt from each line and writes what follows, until the input ends. Ctrl-C stops a text."""
    if sys.stdin is None:
        raise UserError("standard input is closed")
    with contextlib.suppress(ImportError):  # Windows has no readline, and needs none
        import readline  # noqa: F401 (input() then has arrow keys and a history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").rstrip("\r")
            if any("\ud800" <= c <= "\udfff" for c in line):
                raise UserError("the prompt is not UTF-8; convert it first, for example with iconv")
            if line:
                write_texts(*read_prompt(line))
        except UserError as e:  # such as a character that the model does not know
            print(f"error: {e}", file=sys.stderr)
        except OSError as e:
            if e.filename is None:  # not a prompt's file, but the input or the output
                raise
            print(f"error: {e.filename}: {e.strerror}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print(end="\n" * sys.stdin.isatty())
            return


device = choose_device(device)
model, tok = load_to_sample(init_from, out_dir)
stop = stop and unescape(stop)
prompt = None if interactive and start is None else read_prompt(start)  # before the model is prepared, to fail at once
for_inference(model.to(device), choose_dtype(device, dtype, training=False), compile)
generator = torch.Generator(device).manual_seed(seed)
if prompt is not None:
    try:
        write_texts(*prompt)
    except KeyboardInterrupt:  # stops the text, not the conversation
        if not interactive:
            raise
        print()
if interactive:
    converse()
