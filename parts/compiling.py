"""Compiling: the blocks of a backbone by torch.compile, for --compile.

The blocks are in model.py; attention, which follows the lengths of a batch, in parts/packed.py.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from parts.packed import PackedAttention


def compile_blocks(blocks: Iterable[nn.Module], backend: str | Callable = "inductor"):
    """Compile blocks in place, for any length: their first calls take seconds, later ones less.

    backend: of torch.compile.
    All blocks but the last share their graphs, because their weights are inputs of a graph. Flash
    attention (`PackedAttention.with_varlen`) is a part of them. `with_masks` is not: a graph would
    have a node for each of its calls, and be new for every batch.
    """
    # Not as a decorator there: it imports torch._dynamo, which takes seconds.
    PackedAttention.with_masks = torch.compiler.disable(PackedAttention.with_masks)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
