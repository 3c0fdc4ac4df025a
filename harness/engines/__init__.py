"""Who runs the ranks: torchrun, the fork agent, this process, a pool."""
