"""One small transformer for every laboratory: published checkpoints are converted to it, planted weights set in it.

    stream = embed(ids) + pos_embed(0 ... n - 1)
    stream = stream + attention(norm(stream));  stream = stream + mlp(norm(stream))     for each block
    logits = unembed(norm(stream))

Every part is an option: the norms ("none", "layer", "rms"), the MLP (intermediate_size 0 leaves it out), the positions,
the causal mask, the biases. Blocks are GradientCheckpointingLayers, as in transformers' own models, so that whatever
reads those reads these.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mechscope.errors import LoadError, did_you_mean
from mechscope.labs.toy.parts import MLP, Attention

NORMS = ("none", "layer", "rms")


class ToyConfig(PreTrainedConfig):
    """This says what a `ToyTransformer` is made of; sizes are free of each other.

    intermediate_size: neurons of each MLP; 0 for attention only.
    norm, final_norm: "none", "layer" or "rms"; the final norm is of the blocks' kind unless given.
    learned_positions: whether positions are embedded; without them, only a causal mask tells positions apart.
    attention_scale: what scores are multiplied by; 1 / sqrt(head_dim) unless given.
    output_size: the number of logits; the vocabulary's unless given.
    mask_padding: whether keys at `pad_token_id` are hidden from attention even without an attention mask.
    smeared_keys: whether a head may mix each key with the one before it (Olsson et al. 2022), by a learned share.
    readout: the one position whose logits are returned, [batch 1 output]; all positions, [batch pos output], unless
        given.

    Raises LoadError for an unknown norm or activation.

    >>> ToyConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2).head_dim
    4
    """

    model_type = "mechscope_toy"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        head_dim: int | None = None,
        intermediate_size: int = 0,
        hidden_act: str = "relu",
        norm: str = "none",
        final_norm: str | None = None,
        norm_eps: float = 1e-5,
        max_position_embeddings: int = 64,
        learned_positions: bool = True,
        causal: bool = True,
        attention_bias: bool = False,
        unembed_bias: bool = False,
        attention_scale: float | None = None,
        output_size: int | None = None,
        mask_padding: bool = False,
        readout: int | None = None,
        smeared_keys: bool = False,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm = norm
        self.final_norm = norm if final_norm is None else final_norm
        self.norm_eps = norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.learned_positions = learned_positions
        self.causal = causal
        self.attention_bias = attention_bias
        self.unembed_bias = unembed_bias
        self.attention_scale = attention_scale
        self.output_size = vocab_size if output_size is None else output_size
        self.mask_padding = mask_padding
        self.readout = readout
        self.smeared_keys = smeared_keys
        self.initializer_range = initializer_range
        self.use_cache = kwargs.pop("use_cache", causal and not smeared_keys)
        for name in (self.norm, self.final_norm):
            if name not in NORMS:
                raise LoadError(f"no norm {name!r}{did_you_mean(name, NORMS)}; there are {', '.join(NORMS)}")
        if hidden_act not in ACT2FN:
            raise LoadError(f"no activation {hidden_act!r}{did_you_mean(hidden_act, ACT2FN)}; such as relu, gelu, silu")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class ToyBlock(GradientCheckpointingLayer):
    """This is one block: attention, then the MLP where there is one, each reading the normed stream."""

    def __init__(self, config: ToyConfig, layer: int):
        super().__init__()
        self.attn_norm = make_norm(config.norm, config)
        self.attn = Attention(config, layer, config.causal, config.attention_bias, config.smeared_keys)
        self.mlp_norm = make_norm(config.norm, config) if config.intermediate_size else None
        self.mlp = MLP(config) if config.intermediate_size else None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        read = hidden_states if self.attn_norm is None else self.attn_norm(hidden_states)
        hidden_states = hidden_states + self.attn(read, **kwargs)[0]
        if self.mlp is None:
            return hidden_states
        read = hidden_states if self.mlp_norm is None else self.mlp_norm(hidden_states)
        return hidden_states + self.mlp(read)


def make_norm(kind: str, config: ToyConfig) -> nn.Module | None:
    if kind == "none":
        return None
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](config.hidden_size, eps=config.norm_eps)


class ToyTransformer(PreTrainedModel, GenerationMixin):
    """This is the transformer that a `ToyConfig` describes, with random weights until they are set, trained or loaded.

    Source of the shape: GPT-2 and the small models of mechanistic interpretability, with every part optional.

    >>> model = ToyTransformer(ToyConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 10])
    """

    config: ToyConfig
    config_class = ToyConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        )
        self.blocks = nn.ModuleList([ToyBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.final_norm = make_norm(config.final_norm, config)
        self.unembed = nn.Linear(config.hidden_size, config.output_size, bias=config.unembed_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        config = self.config
        if (config.use_cache if use_cache is None else use_cache) and config.causal and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is None and config.mask_padding:
            attention_mask = (input_ids != config.pad_token_id).long()
        elif attention_mask is not None and attention_mask.dim() == 2 and self.pos_embed is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        stream = self.embed(input_ids)
        if self.pos_embed is not None:
            stream = stream + self.pos_embed(positions)
        if config.causal:
            mask = create_causal_mask(config, stream, attention_mask, past_key_values, positions)
        else:
            mask = create_bidirectional_mask(config, stream, attention_mask)
        for block in self.blocks:
            stream = block(stream, attention_mask=mask, past_key_values=past_key_values)
        final = stream if self.final_norm is None else self.final_norm(stream)
        logits = self.unembed(final if config.readout is None else final[:, [config.readout]])
        loss = None
        if labels is not None:  # one class a row, or the next token at every position
            guessed, wanted = (logits, labels) if config.readout is not None else (logits[:, :-1], labels[:, 1:])
            loss = nn.functional.cross_entropy(guessed.flatten(0, -2), wanted.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


M = TypeVar("M", bound=PreTrainedModel)


def untrained(model: M, seed: int = 0) -> M:
    """This is a twin of a model with the same configuration and random weights of the same sizes: the control.

    Every matrix keeps its root mean square, so that the twin's activations are of the model's order; one that is all
    zeros, which a hand or a compiler leaves, gets the others' average, so that nothing is silent.
    """
    sizes = [p.detach().square().mean().sqrt() for p in model.parameters() if p.dim() > 1]
    usual = sum(sizes) / len(sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = type(model)(model.config).eval()
        cast(nn.Module, twin).to(device=model.device, dtype=model.dtype)
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
                if mine.dim() > 1:
                    mine.normal_().mul_(theirs.square().mean().sqrt() or usual)
    return twin


AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
AutoModelForCausalLM.register(ToyConfig, ToyTransformer, exist_ok=True)
