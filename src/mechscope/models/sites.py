"""The site table: every name a user can type, its axes and its law, in forward order; and how names are read.

The documentation page, `model.sites()` and the "did you mean" messages are printed from `SITES`. A request is a
name with, optionally, a selection (`blocks.3.z[head=3,pos=-1]`), a wildcard (`blocks.*.resid_post`,
`blocks.{4,5}.z`) or a TransformerLens name, which is translated and never stored. The features of a dictionary that was
attached at a site are a site too, after a slash (`blocks.3.resid_post/sae[1234,pos=-1]`); a wildcard meets them only
where it has the slash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mechscope.errors import SiteError, did_you_mean

STREAM = ("batch", "pos", "d_model")


@dataclass(frozen=True)
class Site:
    """This is one row of the site table: a short name, the names of its axes, and the law that it obeys."""

    name: str
    axes: tuple[str, ...]
    law: str
    block: bool = True


SITES: tuple[Site, ...] = (
    Site("embed", STREAM, "the token embedding; with pos_embed it sums (times the model's scale) to resid_pre", False),
    Site("pos_embed", STREAM, "the learned position embedding, where the model adds one", False),
    Site("resid_pre", STREAM, "equals the previous block's resid_post"),
    Site("ln1", STREAM, "what attention reads"),
    Site("q", ("batch", "head", "pos", "d_head"), "queries, after rotary and query norms"),
    Site("k", ("batch", "kv_head", "pos", "d_head"), "keys, after rotary and key norms"),
    Site("v", ("batch", "kv_head", "pos", "d_head"), "values"),
    Site("scores", ("batch", "head", "query", "key"), "exactly what softmax takes: scaled, biased, capped, masked"),
    Site("pattern", ("batch", "head", "query", "key"), "softmax(scores); rows sum to 1 (below 1 with sinks)"),
    Site("z", ("batch", "head", "pos", "d_head"), "equals pattern @ v"),
    Site("head_out", ("batch", "head", "pos", "d_model"), "summed over heads, plus the bias: attention's output"),
    Site("attn_out", STREAM, "exactly what attention adds to the stream"),
    Site("cross_q", ("batch", "head", "pos", "d_head"), "queries of cross-attention"),
    Site("cross_k", ("batch", "kv_head", "source", "d_head"), "keys of cross-attention, one per encoder position"),
    Site("cross_v", ("batch", "kv_head", "source", "d_head"), "values of cross-attention"),
    Site("cross_scores", ("batch", "head", "query", "source"), "exactly what cross-attention's softmax takes"),
    Site("cross_pattern", ("batch", "head", "query", "source"), "softmax(cross_scores)"),
    Site("cross_z", ("batch", "head", "pos", "d_head"), "equals cross_pattern @ cross_v"),
    Site("cross_out", STREAM, "exactly what cross-attention adds to the stream"),
    Site("ssm", STREAM, "exactly what a state-space, convolution or recurrent mixer adds to the stream"),
    Site(
        "resid_mid",
        STREAM,
        "equals resid_pre + attn_out (or ssm in its place), normalised where the block is post-norm",
    ),
    Site("ln2", STREAM, "what the MLP reads"),
    Site("router", ("batch", "pos", "expert"), "the router's logits over experts"),
    Site("experts", ("batch", "pos", "choice"), "the experts that the router chose, by number"),
    Site("mlp_pre", ("batch", "pos", "d_mlp"), "the gate (or only) projection before its nonlinearity"),
    Site("mlp_up", ("batch", "pos", "d_mlp"), "the linear factor of a gated MLP"),
    Site("mlp_post", ("batch", "pos", "d_mlp"), "what the down projection reads"),
    Site("expert_weight", ("batch", "pos", "expert"), "what each expert's output is multiplied by; 0 where not chosen"),
    Site(
        "expert_post",
        ("batch", "expert", "pos", "d_mlp"),
        "what each expert's down projection reads; 0 where the router did not send the token",
    ),
    Site("mlp_out", STREAM, "exactly what the MLP adds to the stream"),
    Site("resid_post", STREAM, "equals resid_mid + mlp_out (plus ssm or cross_out where they exist)"),
    Site("final", STREAM, "what the unembedding reads: unembed(final) = logits", False),
    Site("logits", ("batch", "pos", "d_vocab"), "the model's output, with its soft-cap or scale", False),
)
CLASSES = Site("logits", ("batch", "class"), "the model's output: one row of scores per input", False)
FEATURES = Site("features", ("batch", "pos", "latent"), "decode(features) + error equals the site that is written")
ERROR = Site("error", ("batch", "pos", "d_out"), "what the dictionary leaves of the site: site - decode(features)")
BY_NAME = {site.name: site for site in SITES}
ORDER = {site.name: i for i, site in enumerate(SITES)}

# TransformerLens's names for the same tensors. Left out on purpose: `ln1.hook_normalized` and `hook_scale` (before the
# norm's weights; mechscope has no such tensor), and `attn.hook_q` / `hook_k` of rotary models (before rotary).
TRANSFORMER_LENS = {
    "hook_embed": "embed",
    "hook_pos_embed": "pos_embed",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_rot_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_result": "head_out",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_pre_linear": "mlp_up",
    "mlp.hook_post": "mlp_post",
}


def row_of(site: str) -> Site:
    """This is the row of the table for a full site name; what stands after a slash is a dictionary's."""
    if "/" in site:
        return ERROR if site.endswith("/error") else FEATURES
    return BY_NAME[site.rsplit(".", 1)[-1]]


Index = int | slice | tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """This is the part of a site in square brackets: which heads, which positions, and which of a dictionary's latents.

    An integer drops its axis, as in Python; a slice or a list (`pos=0|2|5`) keeps it. `head` comes before `pos`, and
    so does a latent, which is its bare number: `[1234,pos=-1]`. In `scores` and `pattern`, `pos` selects queries.
    """

    head: Index | None = None
    pos: Index | None = None
    latent: Index | None = None

    def on(self, axis: str) -> Index | None:
        """This is what is selected of an axis; None is all of it."""
        if axis in ("head", "kv_head"):
            return self.head
        if axis in ("pos", "query"):
            return self.pos
        return self.latent if axis == "latent" else None

    def index(self, axes: tuple[str, ...]) -> tuple[Any, ...]:
        """This is the tensor index of the selection on a site with these axes."""
        chosen = [self.on(axis) for axis in axes]
        # Two lists select the block of their product, not a zip of them: the first becomes a column.
        column = sum(isinstance(i, tuple) for i in chosen) == 2
        out: list[Any] = []
        for index in chosen:
            if isinstance(index, tuple):
                out.append([[i] for i in index] if column else list(index))
                column = False
            else:
                out.append(slice(None) if index is None else index)
        return tuple(out)

    def __str__(self) -> str:
        parts = [] if self.latent is None else [_index_text(self.latent)]
        parts += [f"{k}={_index_text(v)}" for k, v in (("head", self.head), ("pos", self.pos)) if v is not None]
        return f"[{','.join(parts)}]" if parts else ""


def _index_text(index: Index) -> str:
    if isinstance(index, slice):
        parts = (index.start, index.stop) if index.step is None else (index.start, index.stop, index.step)
        return ":".join("" if i is None else str(i) for i in parts)
    return "|".join(map(str, index)) if isinstance(index, tuple) else str(index)


@dataclass(frozen=True)
class Request:
    """This is one resolved request: the site's full name, its row in the table, and the selection."""

    site: str
    selection: Selection = field(default_factory=Selection)
    classes: bool = False  # whether this is the output of a classifier

    @property
    def row(self) -> Site:
        return CLASSES if self.classes else row_of(self.site)

    @property
    def axes(self) -> tuple[str, ...]:
        """This is the axes that the selection leaves: an integer drops its own."""
        axes = self.row.axes
        return tuple(a for a, i in zip(axes, self.selection.index(axes), strict=True) if not isinstance(i, int))

    @property
    def key(self) -> str:
        return f"{self.site}{self.selection}"

    def __str__(self) -> str:
        return self.key


def resolve(
    asked: str, listed: Mapping[str, tuple[int, ...]], absent: Mapping[str, str], model: str, rotary: bool
) -> list[Request]:
    """This is every site that the text `asked` names, in forward order.

    `listed` maps the model's full site names to their shapes at load, in forward order; `absent` maps the names that
    the architecture lacks to the reason. Raises SiteError with the nearest names for a typo, with the reason for an
    absent site, and with the blocks there are for a wildcard that matches nothing.
    """
    name, selection = split(asked)
    if "hook_" in name:
        theirs, slash, features = name.partition("/")
        name = _from_transformer_lens(theirs, rotary) + slash + features
    if any(c in name for c in "*{"):
        pattern = _wildcard(name)
        found = [site for site in listed if pattern.fullmatch(site)]
        if not found:
            raise SiteError(_matches_nothing(asked, name, listed, absent, pattern, model))
    elif name in listed:
        found = [name]
    elif name in absent:
        raise SiteError(f"{model} has no {name!r}: {absent[name]}.")
    elif "/" in name and name.partition("/")[0] in listed:
        raise SiteError(_not_attached(name, listed, model))
    else:
        known = [*listed, *absent]
        raise SiteError(f"no site {name!r} in {model}{did_you_mean(name, known)}{_blocks(listed)}.")
    requests = [Request(site, selection, classes=site == "logits" and len(listed[site]) == 2) for site in found]
    for request in requests:
        _check_axes(request)
    return requests


def split(asked: str) -> tuple[str, Selection]:
    """This is the name and the selection that `asked` is made of; raises SiteError for text that cannot be read."""
    match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(.*)\])?\s*", asked)
    if match is None:
        raise SiteError(
            f"cannot read the site {asked!r}; type a name and a selection, as in 'blocks.3.z[head=3,pos=-1]'."
        )
    name, inside = match.groups()
    if inside is None:
        return name, Selection()
    chosen: dict[str, Index] = {}
    order = []
    for part in inside.split(","):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals and re.fullmatch(r"[-\d:|\s]+", key):
            key, value = "latent", key
        elif key not in ("head", "pos"):
            raise SiteError(
                f"cannot select by {key!r} in {asked!r}; select by head and pos, as in '{name}[head=3,pos=-1]'."
            )
        order.append(key)
        chosen[key] = _read_index(value, asked)
    if order == ["pos", "head"]:
        raise SiteError(f"head comes before pos in {asked!r}: type '{name}{Selection(**chosen)}'.")
    if "latent" in order[1:]:
        raise SiteError(f"a latent comes first, once, in {asked!r}: type '{name}{Selection(**chosen)}'.")
    return name, Selection(**chosen)


def _read_index(text: str, asked: str) -> Index:
    try:
        if ":" in text:
            parts = [int(p) if p.strip() else None for p in text.split(":")]
            if len(parts) > 3:
                raise ValueError
            return slice(*parts)
        if "|" in text:
            return tuple(int(p) for p in text.split("|"))
        return int(text)
    except ValueError:
        raise SiteError(
            f"cannot read {text!r} in {asked!r}; type an integer (-1), a slice (2:5) or a list (0|3|5)."
        ) from None


def _check_axes(request: Request) -> None:
    axes = request.row.axes
    if request.selection.head is not None and not {"head", "kv_head"} & set(axes):
        raise SiteError(f"'{request.site}' has no heads: its axes are {' '.join(axes)}.")
    if request.selection.pos is not None and not {"pos", "query"} & set(axes):
        raise SiteError(f"'{request.site}' has no positions to select: its axes are {' '.join(axes)}.")

    if request.selection.latent is not None and "latent" not in axes:
        raise SiteError(
            f"'{request}' selects a latent, and '{request.site}' has none: its axes are {' '.join(axes)}; select by "
            f"head and pos, as in 'blocks.3.z[head=3,pos=-1]', or a dictionary's latent, as in "
            f"'blocks.3.resid_post/sae[12]'."
        )


def _not_attached(name: str, listed: Iterable[str], model: str) -> str:
    """This says which dictionaries are attached at a site, of a name that asks for another."""
    base, _, asked = name.partition("/")
    there = [site.partition("/")[2] for site in listed if site.startswith(f"{base}/")]
    if not there:
        return (
            f"no dictionary is attached at {base!r} of {model}, so there is no {name!r}; type "
            f"model.attach({base!r}, dictionary, name={asked.split('/')[0]!r})."
        )
    near = did_you_mean(name, [f"{base}/{other}" for other in there])
    return f"no {asked!r} is attached at {base!r} of {model}{near}; there are {', '.join(map(repr, there))}."


def _wildcard(name: str) -> re.Pattern[str]:
    out = ""
    for piece in re.split(r"(\*|\{[^}]*\})", name):
        if piece == "*":
            out += r"[^./]+" if not name.startswith("*") else r"[^/]+"
        elif piece.startswith("{"):
            out += "(?:" + "|".join(re.escape(p.strip()) for p in piece[1:-1].split(",")) + ")"
        else:
            out += re.escape(piece)
    return re.compile(out)


def _matches_nothing(asked, name, listed, absent, pattern, model: str) -> str:
    lacking = [site for site in absent if pattern.fullmatch(site)]
    if lacking:
        return f"{asked!r} matches nothing in {model}: {lacking[0]!r} is absent ({absent[lacking[0]]})."
    last = name.rsplit(".", 1)[-1]
    hint = did_you_mean(last, BY_NAME) if last not in BY_NAME and "*" not in last and "{" not in last else ""
    return f"{asked!r} matches nothing in {model}{hint}{_blocks(listed)}."


def _blocks(listed: Iterable[str]) -> str:
    ranges = []
    for prefix in ("blocks", "encoder.blocks", "decoder.blocks"):
        layers = {int(m[1]) for site in listed if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", site))}
        if layers:
            ranges.append(f"{prefix}.0 to {prefix}.{max(layers)}")
    return f"; there are {' and '.join(ranges)}" if ranges else ""


def _from_transformer_lens(name: str, rotary: bool) -> str:
    prefix, short = (
        (match[1], match[2])
        if (match := re.match(r"((?:encoder\.|decoder\.)?blocks\.[^.]+\.)(.*)", name))
        else ("", name)
    )
    if rotary and short in ("attn.hook_q", "attn.hook_k"):
        raise SiteError(
            f"TransformerLens's {name!r} is taken before rotary, mechscope's '{prefix}{short[-1]}' after it; "
            f"type '{prefix}{short[-1]}' (TransformerLens's 'attn.hook_rot_{short[-1]}')."
        )
    if short not in TRANSFORMER_LENS:
        raise SiteError(f"no site for the TransformerLens name {name!r}{did_you_mean(short, TRANSFORMER_LENS)}.")
    return prefix + TRANSFORMER_LENS[short]
