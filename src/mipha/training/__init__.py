"""Two stages on plain torch: batches -> loss_sum, num_tokens -> step. `torchrun -m mipha train ...` for several processes."""
