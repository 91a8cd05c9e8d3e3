# Tiny Shakespeare, for a good loss on two CPU cores: 3 layers, 6 heads, 192 wide, 256 characters of context, 1.4M
# parameters. The run is twelve epochs long. Dropout did not help in shorter runs: see docs/training.md.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 3, 6, 192, 256
batch_size = 8
max_iters = 5800
optimizer = "muon"
learning_rate = 5e-3
muon_learning_rate = 0.02
muon_momentum = 0.95
lr_decay = "linear"
final_lr_fraction = 0.0
warmup_iters = 100
beta2 = 0.99
weight_decay = 0.1
log_interval = 50
eval_interval = 580
eval_tokens = 120_000  # all of the validation split
checkpoint_interval = 580
