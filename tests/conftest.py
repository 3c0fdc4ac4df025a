"""One thread for every test: small tensors, and other tests' ranks on the same cores."""

import torch

torch.set_num_threads(1)
