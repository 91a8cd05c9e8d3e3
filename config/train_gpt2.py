# GPT-2 124M on OpenWebText by nanoGPT's recipe: 600,000 steps of 40 * 12 * 1024 = 491,520 tokens.
#
#     pip install datasets
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# The first run prepares the data, which takes hours. FineWeb-Edu's sample of 10 billion tokens is a good replacement:
#
#     pip install huggingface_hub pyarrow
#     hf download HuggingFaceFW/fineweb-edu --repo-type=dataset --include="sample/10BT/*" --local-dir=fineweb
#     python prepare.py --dataset=fineweb --input="fineweb/sample/10BT/*.parquet" --tokenizer=gpt2 --val_fraction=0.0005
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py --dataset=fineweb
#
# What to expect on OpenWebText: nanoGPT's README reports about 4 days on eight A100 40GB, and a validation loss of
# about 2.85. Those are its figures, measured with its code. Nobody has run this file to its end yet.
dataset = "openwebtext"
prepare = "--val_fraction=0.0005"
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
bias = False
dropout = 0.0
batch_size = 12
gradient_accumulation_steps = 5 * 8    # over all processes: their number should divide it
max_iters = 600_000
optimizer = "adamw"
learning_rate = 6e-4
lr_decay = "cosine"
final_lr_fraction = 0.1
warmup_iters = 2000
beta1, beta2 = 0.9, 0.95
weight_decay = 0.1
grad_clip = 1.0
log_interval = 10
eval_interval = 1000
eval_tokens = 2_000_000
checkpoint_interval = 1000
