# nanoGPT's recipe for a laptop, with the same hyperparameters: what the other recipes are compared with.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
batch_size = 12
max_iters = 2000
optimizer = "adamw"
learning_rate = 1e-3
lr_decay = "cosine"
final_lr_fraction = 0.1
beta2 = 0.99
warmup_iters = 100
weight_decay = 0.1
log_interval = 50
eval_interval = 250
eval_tokens = 120_000  # all of the validation split
checkpoint_interval = 500
