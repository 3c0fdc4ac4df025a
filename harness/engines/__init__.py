"""Who runs the ranks: torchrun, the fork agent, this process, or a pool of warm engines."""
