# GPT-2 124M, finetuned on tiny Shakespeare in byte-pair encoding. The weights are good already and the text is short
# (an epoch is about ten steps), so AdamW gets a small constant rate.
init_from = "gpt2"
dataset = "shakespeare"
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 40
optimizer = "adamw"
learning_rate = 3e-5
beta2 = 0.95
final_lr_fraction = 1.0
warmup_iters = 0
dropout = 0.1
eval_interval = 10
eval_tokens = 32_768
log_interval = 1
checkpoint_interval = 20
patience = 2
