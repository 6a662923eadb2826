"""One thread for every test: tiny matrices gain nothing from two, and the last bits of a sum depend on their number."""

import os

import torch

torch.set_num_threads(1)
# run by test_interpreter.py, in a process of their own
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]
