"""Tests import the project's files from the repository root.

Their tensors are small: one thread is fastest.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)
