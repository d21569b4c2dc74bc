"""Attention-output dictionaries: which heads, which source positions and what below them make a feature.

A dictionary on `blocks.L.z` reads the heads side by side, so a latent's pre-activation is a sum, with nothing to be
approximated:

    pre_i(q) = c_i + sum over heads h of  W_enc[i, h] . z_h(q)                                       by_head
             = c_i + sum over heads h and positions k of  pattern_h(q, k) W_enc[i, h] . v_h(k)       by_source
             = c_i' + sum over h, k and parts p of the stream at k of
                      pattern_h(q, k) W_enc[i, h] . W_V^h norm_k(p)                                  below

with the norm's scale, as the pattern, held as it is. Each is checked against the one above it when it is made.

Sources: Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders", arXiv:2406.17759,
section 2 (direct feature attribution by head and by source position; heads by the weights of the decoder) and appendix
on recursive direct feature attribution. What is left out: the queries and keys, which are held; see
`causal.attribution_patching` for those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import DictionaryError
from mechscope.models.norm import frozen

if TYPE_CHECKING:
    from mechscope.dictionaries.dictionary import Coder
    from mechscope.models import Model, Run

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Attribution:
    """This is a latent's pre-activation as a sum.

    pre: [batch pos], in the units of `encode`. constant: what the biases add. values: [batch head pos], or [batch head
    query key] by source; their sum over heads (and keys) is pre - constant.
    """

    latent: int
    pre: Tensor
    constant: float
    values: Tensor

    def share(self, at: Tensor | None = None) -> Tensor:
        """This is each head's share of what the heads add, [head], over the positions where `at` [batch pos] holds.

        By default those where the pre-activation is above 0. Shares add up to 1; a head that takes away has a negative
        one. Raises DictionaryError where there is no such position.
        """
        at = self.pre > 0 if at is None else at
        if not bool(at.any()):
            raise DictionaryError(f"latent {self.latent} is above 0 at no position of this run")
        heads = self.values.sum(-1) if self.values.dim() == 4 else self.values
        added = heads.transpose(1, 2)[at].sum(0)
        return added / added.sum()


@dataclass(frozen=True)
class Below:
    """This is what the stream's parts, at each source position, add to a latent's pre-activation at one query.

    parts: their names, `embed`, `pos_embed`, `blocks.0.head_out[head=0]` ..., last "biases". values: [batch part head
    key]; summed over parts they are `by_source` at `pos`.
    """

    latent: int
    pos: int
    parts: tuple[str, ...]
    values: Tensor

    def top(self, k: int = 5, row: int = 0) -> list[tuple[str, int, int, float]]:
        """This is the k greatest terms of a row: (part, head, source position, how much)."""
        here = self.values[row]
        order = here.flatten().abs().argsort(descending=True)[:k]
        places = torch.stack(torch.unravel_index(order, here.shape), 1).tolist()
        return [(self.parts[p], h, key, float(here[p, h, key])) for p, h, key in places]


def by_head(dictionary: Coder, found: Run | Tensor, latent: int) -> Attribution:
    """This is what each head adds to a latent's pre-activation at each position.

    found: a run that saved the site of heads that the dictionary reads (`blocks.1.z`), or its value [batch head pos
    d_head]. Raises DictionaryError for a value of other sizes, or no such latent.

    >>> out = model.run(ids, save="blocks.1.z")  # doctest: +SKIP
    >>> by_head(sae, out, latent=12).share()  # doctest: +SKIP
    tensor([0.97, 0.01, 0.01, 0.01])
    """
    z = found if isinstance(found, Tensor) else found[_site(dictionary)]
    rows = _by_head(dictionary, latent, z)
    values = torch.einsum("bhqd, hd -> bhq", z.to(rows), rows)
    pre, constant = _pre(dictionary, latent, z)
    _check(values.sum(1) + constant, pre, "the sum over heads")
    return Attribution(latent, pre, constant, values)


def by_source(dictionary: Coder, found: Run, latent: int) -> Attribution:
    """This is what each head adds from each source position, [batch head query key].

    found: a run that saved z, v and pattern of the dictionary's block. A head's values may be more than one head's, as
    in grouped-query attention.
    """
    site = _site(dictionary)
    prefix = site.rpartition(".")[0]
    z, v, pattern = (found[f"{prefix}.{name}"] for name in ("z", "v", "pattern"))
    rows = _by_head(dictionary, latent, z)
    written = torch.einsum("bhkd, hd -> bhk", _expanded(v, z).to(rows), rows)
    values = pattern.to(rows) * written[:, :, None]
    pre, constant = _pre(dictionary, latent, z)
    _check(values.sum((1, 3)) + constant, pre, "the sum over heads and source positions")
    return Attribution(latent, pre, constant, values)


def weights_by_head(dictionary: Coder, heads: int) -> Tensor:
    """This is each head's share of the norm of what a latent writes, [latent head]: which heads a feature is of.

    Source: Kissane et al. 2024, "weight-based head attribution".
    """
    norms = dictionary.W_dec.detach().unflatten(1, (heads, -1)).norm(dim=-1)
    return norms / norms.sum(1, keepdim=True)


@torch.no_grad()
def below(dictionary: Coder, model: Model, inputs: Any, latent: int, pos: int = -1) -> Below:
    """This is one step down: what the stream's parts at each source position add to a latent at `pos`.

    The parts are the embeddings and what each head and each MLP of the blocks below wrote; each goes through the norm
    with its scale held, and the model's own value map, as the user's module computes it. The last part, "biases", is
    what is left with none of them. inputs: rows of one length.

    Raises DictionaryError where the block's values are no linear map of what it reads, and where the stream is not the
    sum of what was written to it.
    """
    site = _site(dictionary)
    prefix = site.rpartition(".")[0]
    number = next((i for i, block in enumerate(model.anatomy.layers()) if block.prefix == prefix), None)
    if number is None:
        raise DictionaryError(f"'{site}' is in no block of a plain stack, so there is no stream below it to follow")
    block = model.anatomy.layers()[number]
    if block.readable:
        raise DictionaryError(f"what attention reads at {prefix} cannot be recomputed: {block.readable}")
    if any(b.normed_stream or b.unexplained for b in model.anatomy.layers()[:number]):
        raise DictionaryError(f"the stream at {prefix} is not the sum of what the blocks below wrote to it")
    parts = _parts(model, number)
    names = [f"{prefix}.{name}" for name in ("resid_pre", "ln1", "z", "v", "pattern")]
    out = model.run(inputs, save=[*names, *dict.fromkeys(name.split("[")[0] for name in parts)])
    source = by_source(dictionary, out, latent)
    stream, z = out[f"{prefix}.resid_pre"], out[f"{prefix}.z"]
    norm = block.attention_norm
    through = frozen(norm, stream) if norm is not None else (lambda x: x)

    def values_of(read: Tensor) -> Tensor:
        """This is the block's values, had it read that."""
        v = model.run(inputs, save=f"{prefix}.v", edits={f"{prefix}.ln1": _put(read)}, stop_at=f"{prefix}.v")
        return _expanded(v[f"{prefix}.v"], z)

    rows = _by_head(dictionary, latent, z)
    weights = out[f"{prefix}.pattern"][:, :, pos].to(rows)  # [batch head key]
    nothing = values_of(torch.zeros_like(stream))

    def added(v: Tensor) -> Tensor:
        return weights * torch.einsum("bhkd, hd -> bhk", v.to(rows), rows)

    terms = [added(values_of(through(_value(model, out, name))) - nothing) for name in parts]
    read_without = out[f"{prefix}.ln1"] - sum(through(_value(model, out, name)) for name in parts)
    terms.append(added(values_of(read_without)))
    values = torch.stack(terms, 1)
    _check(values.sum(1), source.values[:, :, pos], "the sum over the stream's parts")
    return Below(latent, pos, (*parts, "biases"), values)


def _parts(model: Model, number: int) -> list[str]:
    """This is what the stream of a block is the sum of: one name a head, where heads can be told apart."""
    listed = model.certificate.sites
    names = [name for name in ("embed", "pos_embed") if name in listed]
    for block in model.anatomy.layers()[:number]:
        whole = f"{block.prefix}.head_out"
        if whole in listed and block.post_norm is None:
            names += [f"{whole}[head={head}]" for head in range(block.heads)]
        else:
            names += [f"{block.prefix}.{name}" for name in ("attn_out",) if f"{block.prefix}.{name}" in listed]
        names += [f"{block.prefix}.{name}" for name in ("ssm", "mlp_out") if f"{block.prefix}.{name}" in listed]
    return names


def _value(model: Model, out: Run, name: str) -> Tensor:
    value = out[name]
    if name == "embed":
        return model.anatomy.embed_scale * value
    if ".head_out[" in name:
        block = next(b for b in model.anatomy.blocks if name.startswith(f"{b.prefix}."))
        return block.places["attn_out"].scale * value
    return value


class _put:
    """This puts a value at a site, which may be what is there already."""

    quiet = True

    def __init__(self, value: Tensor):
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        return self.value.to(x)


def _site(dictionary: Coder) -> str:
    site = dictionary.reads
    if not isinstance(site, str) or not site.endswith(".z"):
        raise DictionaryError(
            f"direct feature attribution is of a dictionary on heads side by side, and this one reads {site!r}; make "
            "it with reads='blocks.1.z'"
        )
    return site


def _by_head(dictionary: Coder, latent: int, z: Tensor) -> Tensor:
    """This is a latent's row of the encoder in the site's units, [head d_head], for the heads of z."""
    if not -dictionary.n_latents <= latent < dictionary.n_latents:
        raise DictionaryError(f"there is no latent {latent}: this dictionary has {dictionary.n_latents}, from 0")
    heads, width = z.shape[1], z.shape[3]
    if heads * width != dictionary.d_in:
        raise DictionaryError(
            f"the dictionary reads vectors of {dictionary.d_in}, and {heads} heads of {width} side by side make "
            f"{heads * width}"
        )
    return (dictionary.W_enc[latent].detach() * dictionary.scale_in).unflatten(0, (heads, width))


@torch.no_grad()
def _pre(dictionary: Coder, latent: int, z: Tensor) -> tuple[Tensor, float]:
    """This is a latent's pre-activation [batch pos], and what of it is constant."""
    flat = z.transpose(1, 2).flatten(2)
    row, bias = dictionary.W_enc[latent], dictionary.b_enc[latent]
    pre = dictionary.inner(flat) @ row + bias
    return pre, float(dictionary.inner(torch.zeros_like(flat[:1, :1]))[0, 0] @ row + bias)


def _expanded(v: Tensor, z: Tensor) -> Tensor:
    """This is the values by query head: [batch head pos d_head]."""
    return v.repeat_interleave(z.shape[1] // v.shape[1], dim=1)


def _check(total: Tensor, expected: Tensor, what: str) -> None:
    off = float((total - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    if not off <= TOLERANCE:
        raise DictionaryError(
            f"{what} is off by {off:.2g} of the pre-activation; the values of this block are no linear map of the heads"
        )


__all__ = ["Attribution", "Below", "below", "by_head", "by_source", "weights_by_head"]
