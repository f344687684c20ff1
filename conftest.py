"""For all tests: one thread, which is faster for tiny models, here and in the processes that tests start."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
