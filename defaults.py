"""What train.py chooses for the settings that nobody has named: sizes, steps and rates that fit the text.

    python train.py --dataset=mine              # prints what it chose
    python train.py --dataset=mine --n_layer=4  # the same choice, but with 4 layers

More text deserves a larger model, a longer context and more steps. The numbers for a CPU come from trials on one or
two cores with texts from 50 KB to 20 MB: see docs/training.md. Of those for a GPU, only one was tried, with 1 MB of
characters.
"""
import math

# For texts of up to this many tokens; "steps" is max_iters.
COLUMNS = "tokens", "n_layer", "n_embd", "block_size", "batch_size", "steps"
ON_A_CPU = [(100_000, 2, 128, 64, 8, 700),
            (5_000_000, 2, 128, 128, 16, 1750),
            (math.inf, 3, 192, 256, 16, 1200)]
# A vocabulary of byte pairs is large, so the last layer takes most of the time. Steps of few tokens are best then.
BYTE_PAIRS_ON_A_CPU = [(50_000, 2, 128, 32, 8, 600),
                       (1_500_000, 2, 128, 64, 8, 600),
                       (math.inf, 2, 128, 64, 16, 1000)]
ON_A_GPU = [(200_000, 4, 256, 128, 32, 600),
            (5_000_000, 6, 384, 256, 64, 2000),
            (math.inf, 8, 512, 256, 128, 5000)]
# The most epochs. With more, the model begins to learn the text by heart.
EPOCHS, EPOCHS_ON_A_GPU, EPOCHS_OF_BYTE_PAIRS = 8, 6, 3  # the last one is for finetuning, too
SHORT = 250_000  # tokens; for texts of up to this many, a higher rate is better for Muon
MOST_TO_EVALUATE = 2_000_000  # tokens


def choose_settings(config, tokens, vocab_size, device, finetune):
    """Values for those settings of train.py that are None. tokens: in the training split. finetune: whether training
    starts from the weights of a trained model, which decide the sizes."""
    byte_pairs = vocab_size > 5000
    table = ON_A_GPU if device.type != "cpu" else BYTE_PAIRS_ON_A_CPU if byte_pairs else ON_A_CPU
    row = dict(zip(COLUMNS, next(row for row in table if tokens <= row[0]), strict=True))
    given = {name: value for name, value in config.items() if value is not None}
    heads = given.get("n_head", 1)
    width = given.get("n_embd", max(1, row["n_embd"] // heads) * heads)
    context = given.get("block_size", max(1, min(row["block_size"], tokens // 4)))
    optimizer = given.get("optimizer", "adamw" if finetune else "muon")
    best = row | {"n_embd": width, "block_size": context, "optimizer": optimizer,
                  "n_head": max(n for n in range(1, min(4096, max(1, width // 32)) + 1) if width % n == 0),
                  "learning_rate": 1e-4 if finetune else 1e-3 if optimizer == "adamw" else round(0.9 / width, 4)}
    if optimizer == "muon":
        best["muon_learning_rate"] = 0.03 if tokens <= SHORT and not finetune else 0.02
    if finetune:  # perhaps a large model: as many tokens in a step as in the table
        best["batch_size"] = max(1, row["batch_size"] * row["block_size"] // context)
    sequences = given.get("batch_size", best["batch_size"]) * given.get("gradient_accumulation_steps", 1)
    epochs = EPOCHS_OF_BYTE_PAIRS if byte_pairs or finetune else EPOCHS if device.type == "cpu" else EPOCHS_ON_A_GPU
    best["max_iters"] = min(row["steps"], max(1 if finetune else 50, epochs * tokens // (sequences * context)))
    steps = given.get("max_iters", best["max_iters"])
    best["eval_interval"] = max(1, steps // 8)
    # Nine evaluations of both splits then take about a seventh of the time: reading a token costs a third of a step.
    enough = max(10_000 if byte_pairs else 120_000, steps * sequences * context // 40)
    best["eval_tokens"] = MOST_TO_EVALUATE if given.get("eval_only") else min(MOST_TO_EVALUATE, enough)
    return {name: best[name] for name, value in config.items() if value is None and name in best}
