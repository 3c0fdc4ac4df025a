"""Searching for good configurations: a sweeper of Hydra that lets Optuna choose the jobs."""
