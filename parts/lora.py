"""LoRA (Hu et al. 2021, arXiv 2106.09685) beside the linear layers of a model, and merging it.

It knows no model and no names of layers: they are handed in (`GPT.linear_layers`). A weight W keeps
its values, and a product of two thin matrices is trained beside it:

    y = x W^T + b + (x R) L / dim        R: (in, dim), L: (dim, out)

It computes what DeepSpeed-Chat does (dschat/utils/module/lora.py), with its lora_scaling of 1 and
without dropout. In the paper's terms R is A transposed, L is B transposed, and alpha is 1.
"""

import math

import torch
from torch import nn


class LoRALinear(nn.Linear):
    """LoRA of rank `dim` beside `linear`, whose weight, now frozen, and bias are its parameters."""

    def __init__(self, linear: nn.Linear, dim: int):
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.lora_right_weight = nn.Parameter(linear.weight.new_empty(self.in_features, dim))
        self.lora_left_weight = nn.Parameter(linear.weight.new_zeros(dim, self.out_features))
        # Uniform within 1 / sqrt(dim): DeepSpeed-Chat's R is (in, dim), so this takes dim for the
        # fan-in. The authors' code has the transpose, and so 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.lora_right_weight, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute y of the equation above: (..., in) -> (..., out)."""
        dim = self.lora_right_weight.shape[1]
        return super().forward(x) + x @ self.lora_right_weight / dim @ self.lora_left_weight


def add(
    model: nn.Module,
    layers: list[tuple[str, nn.Module, str]],
    dim: int,
    module_name: str | None = None,
    only: bool = False,
) -> int:
    """Put LoRA of rank `dim` beside linear layers of `model`, in place. Returns their number.

    Call it before DistributedDataParallel, `fully_shard` and the optimizer take the parameters.
    layers: DeepSpeed-Chat's name of each, e.g. rwtransformer.decoder.layers.0.self_attn.q_proj, the
    block it belongs to, and its attribute there. gpt2's q, k and v share one name.
    module_name: what a layer's name must contain, None: nothing.
    only: train R, L and the value head alone, as DeepSpeed-Chat's step 2 does (its main.py, since
    DeepSpeedExamples pull request 758). Without it only the weights that have R and L beside them
    are frozen; their biases are not.

    Raises ValueError that names --lora_module_name where no layer matches, and --lora_dim where R
    and L would be no thinner than a weight. The model is then as it was.
    """
    matching = [layer for layer in layers if module_name is None or module_name in layer[0]]
    if not matching:
        first_block = layers[0][1]
        examples = dict.fromkeys(name for name, block, _ in layers if block is first_block)
        raise ValueError(
            f"--lora_module_name: found {module_name!r}, which no name of a linear layer contains; "
            f"those of the first block are {', '.join(examples)}"
        )
    for name, block, child in matching:
        out_features, in_features = getattr(block, child).weight.shape
        if not 0 < dim < min(in_features, out_features):
            raise ValueError(
                f"--lora_dim: found {dim}; expected 1 to {min(in_features, out_features) - 1}, "
                f"because {name} goes from {in_features} to {out_features} features"
            )
    for _, block, child in matching:
        setattr(block, child, LoRALinear(getattr(block, child), dim))
    if only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name == "v_head.weight")
    return len(matching)


def merge(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn the state dict of a model with LoRA into a plain one, with weights W + (R L)^T / dim.

    The sum is computed in float32 or wider and has the dtype of the weight; tensors without LoRA
    are passed on as they are, and `state` is not changed.
    """
    merged = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    for name, right in state.items():
        if name.endswith("lora_right_weight"):
            layer, dim = name.removesuffix("lora_right_weight"), right.shape[1]
            weight, left = state[layer + "weight"], state[layer + "lora_left_weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            product = (right.to(wide) @ left.to(wide)).T / dim
            merged[layer + "weight"] = (weight.to(wide) + product).to(weight.dtype)
    return merged
