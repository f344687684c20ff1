"""LoRA (Hu et al. 2021, arXiv 2106.09685): a weight W keeps its values, and a product of two thin matrices is trained beside it.

    y = x W^T + b + (x R) L / dim        R: (in, dim), L: (dim, out)

`add` puts R and L beside the layers of a reward model; `merge` makes plain weights of them, W + (R L)^T / dim.

As DeepSpeed-Chat has it (dschat/utils/module/lora.py), with its lora_scaling of 1 and without dropout. In the paper's terms
R is A transposed, L is B transposed, and alpha is 1.
"""

import math

import torch
from torch import nn

from model import FAMILIES


class LoRALinear(nn.Linear):
    """A linear layer with LoRA of rank `dim` beside it. Weight and bias are those of `linear` themselves; the weight is frozen."""

    def __init__(self, linear: nn.Linear, dim: int):
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.lora_right_weight = nn.Parameter(linear.weight.new_empty(self.in_features, dim))
        self.lora_left_weight = nn.Parameter(linear.weight.new_zeros(dim, self.out_features))
        # Uniform within 1 / sqrt(dim): DeepSpeed-Chat's R is (in, dim), so this takes dim for the fan-in. The authors' code has
        # the transpose, and so 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_right_weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        dim = self.lora_right_weight.shape[1]
        return super().forward(x) + x @ self.lora_right_weight / dim @ self.lora_left_weight


def add(model, dim: int, module_name: str | None = None, only: bool = False) -> int:
    """Put LoRA of rank `dim` beside linear layers of the blocks of a `rm.RewardModel`, in place. Returns beside how many.

    It comes before DistributedDataParallel, `fully_shard` and the optimizer, which take the parameters as they are then.

    module_name: what a layer's name must contain, None: nothing. The name is DeepSpeed-Chat's: "rwtransformer." and Hugging
    Face's (FAMILIES in model.py), e.g. rwtransformer.decoder.layers.0.self_attn.q_proj. gpt2's q, k and v share one name.
    only: train R, L and the value head alone, as DeepSpeed-Chat's step 2 does (its main.py, since DeepSpeedExamples pull
    request 758). Without it only the weights that have R and L beside them are frozen; their biases are not.

    Raises ValueError that names --lora_module_name where no layer matches, and --lora_dim where R and L would be no thinner
    than a weight. The model is then as it was.
    """
    names = FAMILIES[model.backbone.config.model_type]["names"]
    layers = [
        ("rwtransformer." + names[f"blocks.{{}}.{child}"].format(i), block, child)
        for i, block in enumerate(model.backbone.blocks)
        for child, module in block.named_children()
        if isinstance(module, nn.Linear)
    ]
    matching = [layer for layer in layers if module_name is None or module_name in layer[0]]
    if not matching:
        examples = dict.fromkeys(
            name for name, block, _ in layers if block is model.backbone.blocks[0]
        )
        raise ValueError(
            f"--lora_module_name: found {module_name!r}, which no name of a linear layer contains; those of the first "
            f"block are {', '.join(examples)}"
        )
    for name, block, child in matching:
        out_features, in_features = getattr(block, child).weight.shape
        if not 0 < dim < min(in_features, out_features):
            raise ValueError(
                f"--lora_dim: found {dim}; expected 1 to {min(in_features, out_features) - 1}, because {name} goes from "
                f"{in_features} to {out_features} features"
            )
    for _, block, child in matching:
        setattr(block, child, LoRALinear(getattr(block, child), dim))
    if only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name == "v_head.weight")
    return len(matching)


def merge(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a model with LoRA -> that of the plain model which computes the same. What comes in is not changed.

    The sum is computed in float32 or wider and has the dtype of the weight; tensors without LoRA are passed on as they are.
    """
    merged = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    for name, right in state.items():
        if name.endswith("lora_right_weight"):
            layer, dim = name.removesuffix("lora_right_weight"), right.shape[1]
            weight, left = state[layer + "weight"], state[layer + "lora_left_weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            merged[layer + "weight"] = (
                weight.to(wide) + (right.to(wide) @ left.to(wide)).T / dim
            ).to(weight.dtype)
    return merged
