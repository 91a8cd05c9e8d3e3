# The quickest way to a GPT: tiny Shakespeare, 2 layers, 0.1M parameters. 9 seconds on two CPU cores of an AMD EPYC
# (Zen 3), validation loss 1.89.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 2, 2, 64, 64
batch_size = 24
max_iters = 320
optimizer = "muon"
learning_rate = 1.4e-2
muon_learning_rate = 0.06
muon_momentum, beta1 = 0.9, 0.7  # a short run: averages over fewer steps
lr_decay = "linear"
warmup_iters = 5
beta2 = 0.99
weight_decay = 0.1
final_lr_fraction = 0.0
patience = 4
log_interval = 50
eval_interval = 160
eval_tokens = 120_000  # all of the validation split
checkpoint_interval = 160
