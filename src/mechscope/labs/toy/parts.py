"""Attention and a hidden layer, as every model of the laboratories has them: trained, planted, converted or compiled.

Attention goes through transformers' AttentionInterface, so that whatever opens the attention of transformers' own
models opens this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Attention(nn.Module):
    """This is multi-head attention whose heads have any width.

    The configuration has hidden_size, num_attention_heads, head_dim, and attention_scale: what scores are multiplied
    by, or None for 1 / sqrt(head_dim). smeared_keys: whether each key is mixed with the one before it.
    """

    def __init__(self, config: PreTrainedConfig, layer: int, causal: bool, bias: bool, smeared_keys: bool = False):
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer, config.head_dim
        self.is_causal = causal
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)
        # Olsson et al. 2022: keys are s k[j] + (1 - s) k[j - 1], s = sigmoid of one number a head.
        self.smear = nn.Parameter(torch.zeros(config.num_attention_heads)) if smeared_keys else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.smear is not None:
            assert past_key_values is None, "smeared keys are not cached: a key needs the one before it"
            own = self.smear.sigmoid()[:, None, None]
            key = own * key + (1 - own) * torch.cat([key[:, :, :1], key[:, :, :-1]], 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        z, pattern = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(z.flatten(2)), pattern


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """This is attention written out: z [batch pos head d_head] and the pattern [batch head query key]."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = scores.softmax(-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class MLP(nn.Module):
    """This is one hidden layer of neurons: hidden_size, intermediate_size and hidden_act of the configuration."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(hidden_states)))
