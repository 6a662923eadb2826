"""One thread for every test: tiny matrices gain nothing from two, and the last bits of a sum depend on their number."""

import torch

torch.set_num_threads(1)
