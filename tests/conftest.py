"""Two threads for every test: the last bits of a sum depend on their number."""

import torch

torch.set_num_threads(2)
