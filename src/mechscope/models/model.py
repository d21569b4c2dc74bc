"""`Model`: the user's own module with its sites named; `run`, `stream` and `generate` are the three ways to use it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechscope.errors import EditError, GradientError, SiteError
from mechscope.models import attached, tokens
from mechscope.models.anatomy import Anatomy
from mechscope.models.batches import batches
from mechscope.models.certificate import Certificate
from mechscope.models.contexts import Texts
from mechscope.models.edit import as_edit
from mechscope.models.generate import Generation, generate
from mechscope.models.probe import call, input_embedding
from mechscope.models.readout import Readout
from mechscope.models.result import Gradients, Run, gather, merge
from mechscope.models.run import Pass, Plan, Stop, frozen
from mechscope.models.sites import Request, Site, resolve
from mechscope.models.stream import Stream
from mechscope.models.token_mask import TokenMask

Inputs = (
    Any  # str | list[str] | LongTensor [batch pos] | list of id lists | the dict that a Hugging Face processor returns
)
Edits = Mapping[str, Any]


class Model:
    """This is a Hugging Face module with names on it. The module, `model.hf`, is the user's own and stays as it is.

    Made by `ms.load`, which derives the anatomy and proves it; not made directly.
    """

    def __init__(
        self, hf: nn.Module, tokenizer: Any, name: str, anatomy: Anatomy, certificate: Certificate, source: str = ""
    ):
        self.hf, self.tokenizer, self.name, self.source = hf, tokenizer, name, source
        self.anatomy, self.certificate = anatomy, certificate
        self._hashes: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
        self._busy = False

    # ---------------------------------------------------------------- what it is

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def config(self) -> Any:
        return getattr(self.hf, "config", None)

    @property
    def n_layers(self) -> int:
        return len(self.anatomy.layers() or self.anatomy.layers("decoder.blocks"))

    @property
    def n_heads(self) -> int:
        return max((block.heads for block in self.anatomy.blocks), default=0)

    @property
    def n_kv_heads(self) -> int:
        return max((block.kv_heads for block in self.anatomy.blocks), default=0)

    @property
    def d_head(self) -> int:
        return max((block.d_head for block in self.anatomy.blocks), default=0)

    @property
    def d_model(self) -> int:
        return self.certificate.d_model

    @property
    def d_vocab(self) -> int:
        return self.certificate.d_vocab

    @property
    def main_input(self) -> str:
        """This is the name of what the module reads: `input_ids`, or `pixel_values` for an image model."""
        return getattr(self.hf, "main_input_name", "input_ids")

    @property
    def n_embeddings(self) -> int:
        """This is how many ids the token embedding takes; 0 for a model that reads no ids."""
        return int(getattr(input_embedding(self.hf), "num_embeddings", 0))

    def sites(self) -> dict[str, Site]:
        """This is every site that this model has, by full name, in forward order, with those of dictionaries."""
        return {request.site: request.row for name in self.listed() for request in self.resolve(name)}

    def listed(self) -> dict[str, tuple[int, ...]]:
        """This is the shape of every site on the certificate's short input, with those of attached dictionaries."""
        own, out = self.certificate.sites, {}
        if not self.anatomy.attached:
            return own
        for site, shape in own.items():
            out[site] = shape
            for what in self.anatomy.attached.values():
                out |= what.shapes(own) if what.writes == site else {}
        return out

    @property
    def absent(self) -> dict[str, str]:
        """This is every site that this architecture lacks, with the reason."""
        return self.anatomy.absent

    def resolve(self, asked: str) -> list[Request]:
        """This is the sites that a name, selection or wildcard stands for; raises SiteError with what to type."""
        found = resolve(asked, self.listed(), self.anatomy.absent, type(self.hf).__name__, self.anatomy.rotary)
        attached.check_latents(found, self.anatomy)
        return found

    # ---------------------------------------------------------------- dictionaries

    def attach(self, site: str, dictionary: attached.Encoder, name: str = "sae", writes: str | None = None) -> str:
        """This makes a dictionary's features a site, `SITE/NAME`, and what it leaves out another, `SITE/NAME/error`.

        dictionary: anything with `encode(x) -> features [..., latent]` and `decode(features) -> x`; it takes the
            site's vectors, those of heads side by side. A run without an edit of features is the model's own, bit for
            bit; edited features reach the rest of the network as decode(features) + error.
        writes: the site that a transcoder writes, where it is not the one that it reads; a dictionary that says where
            it `reads` and `writes` is believed.

        Returns the features' name. Raises SiteError for a site without one vector at each position, and
        DictionaryError for a dictionary of another width, or a name that is taken. Undone by `detach`.

        >>> model.attach("blocks.3.resid_post", sae)  # doctest: +SKIP
        'blocks.3.resid_post/sae'
        >>> model.run("Ben and John", edits={"blocks.3.resid_post/sae[1234]": ms.zero()})  # doctest: +SKIP
        """
        what = attached.attach(self, site, dictionary, name, writes)
        self.anatomy.attached[what.site] = what
        return what.site

    def detach(self, name: str) -> None:
        """This takes off the dictionary with that name or features' site; a name that several share, all of them.

        Raises SiteError where there is none.
        """
        attached.detach(self.anatomy, name)

    def weights_hash(self) -> str:
        """This is the SHA-256 of the weights: names, shapes and bytes. It is kept until a weight changes."""
        return self._hashed(self.hf)

    def _hashed(self, module: nn.Module) -> str:
        state = module.state_dict()
        key = tuple((name, t.data_ptr(), t._version) for name, t in state.items())
        if module not in self._hashes or self._hashes[module][0] != key:
            digest = hashlib.sha256()
            for name, tensor in state.items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._hashes[module] = (key, digest.hexdigest())
        return self._hashes[module][1]

    def provenance(self) -> dict[str, Any]:
        """This is what a result records of its model: name, where it was loaded from, class, weights hash, dtype.

        The dictionaries attached to it are recorded too, each with the site that it writes and its own hash.
        """
        attached = {
            site: {
                "class": type(what.dictionary).__name__,
                "writes": what.writes,
                "weights": self._hashed(what.dictionary) if isinstance(what.dictionary, nn.Module) else None,
            }
            for site, what in self.anatomy.attached.items()
        }
        return ({"dictionaries": attached} if attached else {}) | {
            "model": self.name,
            "source": self.source,
            "class": type(self.hf).__name__,
            "weights": self.weights_hash(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.hf.parameters())
        return (
            f"Model({self.name}: {type(self.hf).__name__}, {size / 1e6:.3g} M parameters, {self.n_layers} layers, "
            f"{self.n_heads} heads, {len(self.certificate.sites)} sites, {self.certificate.verdict})"
        )

    # ---------------------------------------------------------------- text and ids

    def ids(self, inputs: Inputs) -> list[list[int]]:
        """This is the exact ids that a run on `inputs` uses, row by row: the tokenizer's own defaults."""
        return tokens.to_ids(self.tokenizer, inputs, self.name)

    def strings(self, row: Sequence[int]) -> list[str]:
        """This is the text of each token of a row of ids."""
        return tokens.strings(self.tokenizer, row)

    @functools.cached_property
    def readout(self) -> Readout:
        """This is the way from the last stream to the logits: the final norm, the unembedding, soft-cap and scale."""
        return Readout(self)

    # ---------------------------------------------------------------- run

    def run(
        self,
        inputs: Inputs,
        save: str | Sequence[str] = (),
        edits: Edits | None = None,
        grad: Callable[[Tensor], Tensor] | None = None,
        stop_at: str | None = None,
    ) -> Run:
        """This runs the model, saving and editing sites on the way.

        inputs: text, a list of texts, ids [batch, pos], a list of id lists, or what a Hugging Face processor returns.
            Rows of unequal length run in groups of one length, so padding never enters the model; a function given as
            an edit is then called once for each group.
        save: names of sites; what is saved is what the rest of the network saw, after any edit.
        edits: {site: edit}; an edit is an `ms.zero()`, `ms.patch(...)` ..., a function of the tensor, or a tensor to
        set. grad: logits [batch pos d_vocab] -> scalar; one backward pass fills `out.grad[site]` for the saved sites.
            Parameters get no `.grad`.
        stop_at: the forward ends once this site is reached; there are then no logits.

        Raises SiteError (unknown, absent or unreached site), EditError (wrong shape, or changed nothing),
        GradientError.

        >>> out = model.run("Ben and John", save="blocks.*.resid_post")  # doctest: +SKIP
        >>> out["blocks.2.resid_post"].shape  # doctest: +SKIP
        torch.Size([1, 4, 192])
        """
        requests = gather(save, self)
        changes = _edits(self, edits)
        for request in requests:
            if grad is not None and (why := self.anatomy.place(request.site).readonly):
                raise GradientError(f"'{request.site}' can be read but not differentiated: {why}.")
        stop = None
        if stop_at is not None:
            (request, *more) = self.resolve(stop_at)
            if more or str(request.selection):
                raise SiteError(f"stop_at takes one whole site, not {stop_at!r}.")
            if grad is not None:
                raise GradientError("a run that stops early has no logits to differentiate; leave out stop_at or grad.")
            stop = request.site
            if "/" in stop:  # features are there once what they are read from is
                features = self.anatomy.dictionary(stop)
                stop = features.reads if stop == features.site else features.writes
        plan = Plan(requests, changes, stop, grad is not None)
        return execute(self, inputs, plan, grad)

    def generate(
        self,
        inputs: Inputs,
        max_new_tokens: int = 20,
        save: str | Sequence[str] = (),
        edits: Edits | None = None,
        use_cache: bool = True,
        **options: Any,
    ) -> Generation:
        """This generates with Hugging Face's own `generate`, saving and editing sites at every step.

        An edit applies to the prompt and to every new token unless it was made with `at="prompt"`, `at="new"` or a
        slice of absolute positions (`ms.add(v, at="new")`); a position in a site's name is absolute, a negative one
        counts from the prompt's end. Saves are concatenated along positions. `options` go to Hugging Face
        (`do_sample`, `temperature` ...); the default is greedy.

        >>> model.generate("I think", max_new_tokens=4).text  # doctest: +SKIP
        ['I think it is a good']
        """
        changes = _edits(self, edits)
        return generate(self, inputs, Plan(gather(save, self), changes), max_new_tokens, use_cache, options)

    def stream(
        self,
        texts: Texts,
        at: str | Sequence[str],
        context: int = 128,
        batch: int = 32,
        seed: int | None = None,
        loop: bool = False,
        mask: TokenMask | None = None,
        vectors: int | None = None,
        shuffle: int | str | None = None,
    ) -> Stream:
        """This yields a site's activations as tensors [n, d], or {site: [n, d]} of several sites from one forward.

        Texts are cut into contexts of one length; the forward stops at the last site; positions of special tokens, or
        whatever `mask` says, are left out. `vectors` and `shuffle` cut and mix; `.state()` and `.resume(state)` go on
        where a stream stopped, bit for bit. See `models/stream.py`.

        >>> for x in model.stream(texts, "blocks.2.resid_post", vectors=4096): ...  # doctest: +SKIP
        """
        return Stream(self, texts, at, context, batch, seed, loop, mask, vectors, shuffle)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """This keeps a run to itself: a run inside an edit of the same model would meet the outer run's hooks."""
        if self._busy:
            raise EditError(
                f"{self.name} is running already, and an edit called it again; run it before, and give the edit what "
                "it saved: "
                "ms.patch(other_run)."
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """This calls the user's module, as a plain user would, without a key-value cache."""
        return call(self.hf, batch)


def execute(model: Model, inputs: Inputs, plan: Plan, grad: Callable[[Tensor], Tensor] | None = None) -> Run:
    """This runs a plan on every group of rows of one length and puts the rows back in order."""
    given = batches(model, inputs)
    if grad is not None and len(given.groups) > 1:
        raise GradientError(
            "a gradient needs rows of one length, so that the metric sees all logits at once; run each length by "
            "itself."
        )
    passes, logits, values, gradients = [], [], [], {}
    value = None
    for rows, batch in given.groups:
        work = Pass(model.anatomy, plan, rows, model.certificate.overwritten, given.rows)
        result, ended_early = None, False
        with (
            torch.set_grad_enabled(grad is not None),
            frozen(model.hf, grad is not None),
            model.alone(),
            work.hooked(model.hf),
        ):
            try:
                result = _logits(model.forward(batch))
            except Stop:
                ended_early = True
        work.check(model.name, ended_early)
        if grad is not None:
            value, gradients = _differentiate(work, result, grad)
        passes.append(work)
        logits.append(None if result is None else result.detach())
        values.append({key: kept[0].detach() for key, kept in work.saved.items()})
    receipts = merge([list(p.receipts.values()) for p in passes])
    together = {r.key: given.assemble(r, [v[r.key] for v in values]) for r in plan.saves}
    out = None
    if logits[0] is not None:
        out = given.assemble(Request("logits", classes=logits[0].dim() == 2), logits)
    found = Gradients(gradients, model) if grad is not None else None
    return Run(model, given.ids, together, receipts, out, found, value, given.mask, plan.stop_at)


def _edits(model: Model, edits: Edits | None) -> list[tuple[Request, Any]]:
    """This is the edits by site; raises EditError for a site that can only be read."""
    found = [(r, as_edit(e)) for asked, e in (edits or {}).items() for r in model.resolve(asked)]
    for request, _ in found:
        if why := model.anatomy.place(request.site).readonly:
            raise EditError(f"'{request.site}' can be read but not edited: {why}.")
    return found


def _logits(result: Any) -> Tensor | None:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and "logits" in result:
        return result["logits"]
    return None


def _differentiate(
    work: Pass, logits: Tensor | None, grad: Callable[[Tensor], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    if logits is None:
        raise GradientError("this model returns no logits to differentiate.")
    if not logits.requires_grad:
        raise GradientError("no gradient: save at least one site that the logits depend on.")
    value = grad(logits)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise GradientError(
            f"grad must return one number, got {tuple(value.shape) if isinstance(value, Tensor) else value!r}; take "
            "a mean or a sum."
        )
    if not value.requires_grad:
        raise GradientError(
            "the metric does not depend on the logits by differentiable steps (was it detached, or an argmax?)."
        )
    names = list(work.nodes)
    found = torch.autograd.grad(value, [work.nodes[n] for n in names], allow_unused=True)
    by_site = dict(zip(names, found, strict=True))
    out = {}
    for request in work.plan.saves:
        g = by_site[request.site]
        if g is None:
            raise GradientError(f"the metric does not depend on '{request.site}', so it has no gradient there.")
        out[request.key] = g[request.selection.index(request.row.axes)]
    return float(value.detach()), out
