"""The losses over the ranks of a `torch.distributed` process group.

`functional` calls `loss_across` for candidates of all ranks, `full_loss` and `indexed_loss` for a
table whose rows are spread over the ranks; `group` is what an argument `process_group` becomes.
"""
