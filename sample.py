"""Writes text with a trained model, as it comes.

    python sample.py --start="ROMEO:"                          # the best checkpoint of the run in out/
    python sample.py --start=FILE:prompt.txt --num_samples=3 --top_p=0.9
    python sample.py --temperature=0                           # always the likeliest token
    python sample.py --init_from=gpt2 --start="The answer is"  # GPT-2's weights: by name, or a Hugging Face folder

Several samples are generated together; the first is shown as it comes, the others when they are complete.
"""
import sys
from pathlib import Path

import torch

from checkpoint import load_model, load_pretrained

init_from = "resume"               # resume: the run in out_dir; else gpt2, ..., gpt2-xl, a Hugging Face name or folder
out_dir = "out"                    # the run to take the model from
start = "\n"                       # the prompt, or FILE:path to read it from a file; "" for an end-of-text token
num_samples = 1                    # texts to write
max_new_tokens = 500               # tokens in each, at most
temperature = 0.8                  # below 1 plays safe, above 1 dares more, 0 always takes the likeliest token
top_k: int | None = None           # draw from the k likeliest tokens only
top_p: float | None = None         # draw from the smallest set of tokens that holds this much probability
repetition_penalty = 1.0           # above 1 makes tokens that have occurred less likely
stop: str | None = None            # a text that ends a sample; it is not shown
seed = 1337                        # the same seed gives the same text
device: str | None = None          # cpu, cuda, cuda:1, mps; None: the best there is
dtype: str | None = None           # of the weights: float32, bfloat16 or int8; None: bfloat16 on CUDA, else float32
compile = False                    # compile the step for one token: faster from a few hundred tokens on
exec((Path(__file__).resolve().parent / "configurator.py").read_text(encoding="utf-8"))


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
        """No more ids will come: adds what the decoder held back."""
        if not self.done:
            self.text, self.done = self.text + self.decoder.flush(), True

    def show(self):
        """Prints what is new, except for an ending that may yet become the stop string."""
        held = 0
        if stop and not self.done:
            held = max((n for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)
        print(self.text[self.shown:len(self.text) - held], end="", flush=True)
        self.shown = max(self.shown, len(self.text) - held)


@torch.inference_mode()
def main():
    """Loads the model, generates, prints."""
    model, tok = load_model(out_dir)[:2] if init_from == "resume" else load_pretrained(init_from)
    if tok is None:
        raise ValueError(f"{init_from} has no tokenizer that is known here (GPT-2's); a character model can be sampled from "
                         "its run's folder, with --out_dir")
    where = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    precision = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    if precision not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"dtype must be float32, bfloat16 or int8, got {precision!r}")
    try:
        model.to(where).for_inference(precision, compile)
    except (RuntimeError, AssertionError) as e:  # torch raises either, depending on the device
        raise ValueError(f"device {where!r} cannot be used: {str(e).splitlines()[0]}") from None

    prompt = start
    if start.startswith("FILE:"):
        try:
            prompt = Path(start[5:]).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{start[5:]} is not UTF-8 at byte {e.start}; convert it first, for example with iconv") from None
    ids = tok.encode(prompt) if prompt else [tok.eot] if tok.eot is not None else []
    if not ids:
        raise ValueError(f"{'the file' if start else '--start'} is empty, and this model has no end-of-text token to begin "
                         "with; give some text")
    if len(ids) > model.config.block_size:
        print(f"the prompt has {len(ids)} tokens; the model reads the last {model.config.block_size}", file=sys.stderr)

    texts = [Text(tok) for _ in range(num_samples)]
    generator = torch.Generator(where).manual_seed(seed)
    stream = model.stream(torch.tensor([ids], device=where), max_new_tokens, temperature, top_k, top_p,
                          repetition_penalty, tok.eot, num_samples, generator=generator)
    print(prompt, end="", flush=True)
    for step in stream:
        for text, i in zip(texts, step.tolist()):
            text.push(i)
        texts[0].show()
        if all(text.done for text in texts):
            break
    for n, text in enumerate(texts):
        text.end()
        if n > 0:
            print(f"---\n{prompt}", end="")
        text.show()
        print()


try:
    main()
except (ValueError, RuntimeError, OSError) as e:
    if isinstance(e, BrokenPipeError):  # the reader of our output, head for example, has had enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(f"error: {e}")
except KeyboardInterrupt:
    print()
    sys.exit(130)
