"""What writes to the stream in one block: attention, a mixer, cross-attention, the MLP; and what attention reads.

The writers are the smallest set of module outputs whose (scaled) sum is the block's output minus its input. In
post-norm blocks a norm follows each addition, and the sums are taken between the norms.
"""

from __future__ import annotations

from mechscope.models.explain import Term, explain
from mechscope.models.inside import Inside, same
from mechscope.models.neurons import read_mlp
from mechscope.models.places import Block, Place, is_norm, linear
from mechscope.models.probe import Call

INSIDE_ATTENTION = ("q", "k", "v", "scores", "pattern", "z")
WRITTEN = ("attn_out", "head_out", "resid_mid", "ln2", "mlp_pre", "mlp_up", "mlp_post", "mlp_out")
WRITTEN += ("router", "experts", "expert_weight", "expert_post")
IDENTITY = "resid_post = resid_pre + everything written by the block"


def read_block(block: Block, here: Inside) -> None:
    """This fills in the places of one block, and the reasons for those that it lacks."""
    _read_attention(block, here)
    additions = _additions(here)
    if isinstance(additions, str):
        _unexplained(block, here, additions)
        return
    by_site: dict[str, list[Term]] = {}
    for term in additions.terms:
        by_site.setdefault(here.kind(term.call), []).append(term)
    for site, terms in by_site.items():
        if len(terms) > 1 and not (site == "mlp_out" and _side_by_side(here, terms)):
            names = " and ".join(here.short(t.call) for t in terms)
            _unexplained(block, here, f"{names} both write to the stream, one after the other, as {site}")
            return
        block.places[site] = _sum(terms)
    if len(by_site.get("mlp_out", ())) > 1:
        block.unreadable("two modules write the MLP's output")
    for kind in ("", "cross_"):
        _read_core(block, here, kind)
    _read_projection(block, here, by_site)
    read_mlp(block, here, additions)
    _read_mid(block, by_site)


# --------------------------------------------------------------------------------------------------- additions


class Additions:
    """This is the terms that a block adds to the stream, in order, and the norm after each in post-norm blocks."""

    def __init__(self, terms: list[Term], norms: list[Call]):
        self.terms, self.norms = terms, norms

    def before(self, call: Call) -> list[Term]:
        """This is the terms that were complete when a call began."""
        return [term for term in self.terms if term.call.end < call.begin]


def _additions(here: Inside) -> Additions | str:
    """This is what the block adds to the stream, or, in words, how far off the best explanation is."""
    parts = here.writers()
    last = [c for c in here.calls if is_norm(c.module) and same(c.wrote, here.after)]
    if last and last[-1].read is not None:
        normed = _normed_additions(here, parts, last[-1])
        return normed or "the block's output is a norm of something that is not a sum of what it read and wrote"
    found = explain(here.after, here.before, parts)
    if not found:
        off = f"; the best sum is off by {found.off:.2g} of the largest value" if found.off != float("inf") else ""
        return f"no sum of what its modules wrote gives its output{off}"
    return Additions(sorted(found.terms, key=lambda t: t.call.end), [])


def _normed_additions(here: Inside, parts: list[Call], last: Call) -> Additions | None:
    """This follows a post-norm block backwards: norm(... norm(norm(resid_pre + a) + b) ... + c)."""
    norms, terms = [last], list[Term]()
    while len(norms) <= 3:
        total = norms[0].read
        assert total is not None
        start = explain(total, here.before, [p for p in parts if p.end < norms[0].begin], most=1)
        if start:
            return Additions([*start.terms, *terms], norms)
        for norm in reversed(
            [c for c in here.calls if is_norm(c.module) and c.end < norms[0].begin and here.writes_stream(c)]
        ):
            assert norm.wrote is not None
            between = [p for p in parts if p.begin > norm.end and p.end < norms[0].begin]
            if (step := explain(total, norm.wrote, between, most=1)) and here.reads_stream(norm):
                norms, terms = [norm, *norms], [*step.terms, *terms]
                break
        else:
            return None
    return None


def _side_by_side(here: Inside, terms: list[Term]) -> bool:
    """This says whether all terms come from modules that read one tensor, as routed and shared experts do."""
    first, *others = (here.source(term.call).read for term in terms)
    return all(same(first, other) for other in others)


def _sum(terms: list[Term]) -> Place:
    """This is the place of a sum of module outputs: the last of them, the others being added."""
    *others, last = sorted(terms, key=lambda t: t.call.end)
    plus = tuple(Place(t.call.module, "output", t.scale) for t in others)
    return Place(last.call.module, "output", last.scale, plus=plus)


def _unexplained(block: Block, here: Inside, why: str) -> None:
    """This leaves a block its two ends: nothing in between can be trusted to be what its name says."""
    block.unexplained = why
    block.places = {name: place for name, place in block.places.items() if name in ("resid_pre", "resid_post")}
    reason = f"the identity '{IDENTITY}' does not hold here: {why}"
    cross = ("cross_out", *(f"cross_{name}" for name in INSIDE_ATTENTION)) if any(map(here.crosses, here.cores)) else ()
    block.absent = dict.fromkeys(("ln1", *INSIDE_ATTENTION, *WRITTEN, "ssm", *cross), reason)
    block.readable = reason


# --------------------------------------------------------------------------------------------------- attention


def _read_attention(block: Block, here: Inside) -> None:
    """This finds ln1, what attention reads, and the norm that makes it."""
    core = here.core
    if core is None:
        block.lacks(
            "this block has no attention that mechscope can see inside",
            "ln1",
            *INSIDE_ATTENTION,
            "head_out",
            "attn_out",
        )
        return
    block.attention, block.by_interface = core, core in here.taken.interface
    if block.by_interface and core not in here.taken.twice:
        query, key = here.taken.shapes[id(core)]
        block.heads, block.kv_heads, block.d_head = query[1], key[1], query[3]
    call = here.call_of(core)
    if call.read is None or not here.reads_stream(call):
        block.lacks("attention does not read one tensor [batch, pos, d_model]", "ln1")
        block.unreadable(block.absent["ln1"])
        return
    block.places["ln1"] = Place(core, "input")
    if same(call.read, here.before):
        return
    norm = here.norm_before(call.read, call.begin)
    if norm is None or not same(norm.read, here.before):
        block.unreadable("what attention reads is not a norm of resid_pre")
    else:
        block.attention_norm = norm.module


def _read_core(block: Block, here: Inside, kind: str) -> None:
    """This places q, k, v, scores, pattern and z inside attention, or inside cross-attention."""
    core = here.core if not kind else next((m for m in here.cores if here.crosses(m)), None)
    names = [f"{kind}{name}" for name in INSIDE_ATTENTION]
    if core is None:
        return
    if core in here.taken.twice:
        block.lacks("this module computes attention more than once per forward (differential attention)", *names)
        if not kind:
            block.unreadable(block.absent["q"])
        return
    for name in names:
        block.places[name] = Place(core, "attention")


def _read_projection(block: Block, here: Inside, by_site: dict[str, list[Term]]) -> None:
    """This finds W_O: the linear map whose output is attention's output, before a post-norm or a layer scale."""
    if "attn_out" not in by_site:
        block.lacks("attention does not write to the stream here", "attn_out", "head_out")
        return
    (writer,) = (term.call for term in by_site["attn_out"])
    source = here.source(writer)
    if source is not writer:
        block.post_norm = writer.module
    linears = [c for c in here.calls if linear(c.module) and c.end <= source.end and same(c.wrote, source.wrote)]
    if not linears:
        block.lacks("attention's output is not the output of one linear map of the heads", "head_out")
    elif "z" not in block.places:
        block.lacks("attention's heads cannot be told apart: it has no z", "head_out")
    else:
        block.projection = linears[-1].module
        block.places["head_out"] = Place(block.projection, "heads")
        return
    block.unreadable(block.absent["head_out"])


def _read_mid(block: Block, by_site: dict[str, list[Term]]) -> None:
    """This places resid_mid, the stream between the mixers (attention, or what takes its place) and the MLP."""
    mixers = [term for site in ("attn_out", "ssm") for term in by_site.get(site, ())]
    if block.parallel:
        block.lacks("attention and MLP run in parallel, both reading resid_pre", "resid_mid")
    elif not mixers:
        block.lacks("nothing writes to the stream before the MLP in this block", "resid_mid")
    elif "mlp_out" not in by_site and "cross_out" not in by_site:
        block.lacks("nothing follows attention in this block, so it would be resid_post", "resid_mid")
    elif block.normed_stream:
        block.places["resid_mid"] = Place(block.normed_stream[0][1], "output")
    else:
        place = _sum(mixers)
        block.places["resid_mid"] = Place(
            place.module, "output", place.scale, plus=(Place(block.module, "input"), *place.plus)
        )
