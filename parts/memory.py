"""A full memory: told from other errors, and said in a line with what makes room.

The programs print the line (parts/distributed.py, tools/score.py). The kernel may also kill a
process without an error, and nothing can be said then.
"""

import errno

import torch

# In the RuntimeErrors of PyTorch's allocator on Linux and Windows, of C++, and of sizes whose
# product is no number of bytes.
CPU_SIGNS = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "Storage size calculation overflowed",
)
GPU_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "ALLOC_FAILED")


def full_memory(error: BaseException) -> str:
    """Name the memory that an error is about, "GPU's" or "machine's"; "" for other errors."""
    text = str(error)
    is_runtime_error = isinstance(error, RuntimeError)
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU's"
    if is_runtime_error and any(sign in text for sign in GPU_SIGNS):
        return "GPU's"
    if isinstance(error, MemoryError):
        return "machine's"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "machine's"
    if is_runtime_error and any(sign in text for sign in CPU_SIGNS):
        return "machine's"
    return ""


def memory_line(error: BaseException, advice: str) -> str:
    """Say in a line which memory is full, and what makes room. error: one of a full memory."""
    found = str(error).partition("\n")[0] or type(error).__name__
    return f"the {full_memory(error)} memory is full ({found}); {advice}"
