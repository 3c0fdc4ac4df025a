"""What makes a network's evaluations faster without another result: engine.optimize."""
