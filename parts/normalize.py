"""Rewards of zero mean and unit variance (`train.py --normalize_rewards`), by changing a model.

It computes no scores: they are handed in, as the model is. A loss of differences leaves the mean of
the rewards open, and PPO wants one that is known: Ouyang et al. (2022, section 3.5) set a bias so
that the labelers' demonstrations have a mean of 0. Here mean and variance are those of the end
scores of the eval responses.
"""

import math

import torch

from parts.guards import counted


@torch.no_grad()
def normalize(model, scores: list[float]) -> str:
    """Change a reward model so that `scores`, which it gave, would have had mean 0 and deviation 1.

    The scale goes into v_head. The shift goes into the bias of the last norm where v_head reads its
    output (gpt2, opt, gpt_neox), so that every program which loads the checkpoint sees it. A last
    norm without a bias (RMSNorm), or one with a projection after it (OPT-350m), cannot hold it:
    there it becomes `reward_bias`, which is saved in config.json. Returns a line that says so.
    Raises ValueError where all scores are the same.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    mean, deviation = values.mean().item(), values.std(correction=0).item()
    if not (math.isfinite(deviation) and deviation > 0):
        raise ValueError(
            f"--normalize_rewards: the {len(scores)} end scores of the eval responses have mean "
            f"{mean:g} and standard deviation {deviation:g}; expected one above 0; omit the flag"
        )
    head, norm = model.v_head.weight, model.backbone.norm
    shift = (model.reward_bias - mean) / deviation
    head /= deviation
    if isinstance(norm, torch.nn.LayerNorm) and model.backbone.project_out is None:
        norm.bias += (shift / head.square().sum()) * head[0]
        model.reward_bias, place = 0.0, "the last norm's bias"
    else:
        model.reward_bias, place = shift, "config.json (reward_bias)"
    return (
        f"end scores of {counted(len(scores), 'eval response')}: mean {mean:.4f}, standard "
        f"deviation {deviation:.4f}; normalized to 0 and 1 in v_head and {place}"
    )
