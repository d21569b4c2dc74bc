"""End-to-end training: a dictionary is judged by what the model does with its reconstruction, not by the vectors.

    judged = EndToEnd(TopK(192, 3072, k=32, reads="blocks.3.resid_post"), model, later=1.0)
    sae = train(judged, rows_of_ids, steps=5000).dictionary

Source: Braun et al. 2024, Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning,
arXiv:2405.12241; equation 3 (e2e), equation 4 (e2e + downstream reconstruction).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Dictionary, Features, Reconstruction
from mechscope.edits import set as put
from mechscope.edits import unchanged
from mechscope.errors import DictionaryError
from mechscope.models.token_mask import TokenMask

if TYPE_CHECKING:
    from mechscope.models.model import Model


class EndToEnd(Dictionary):
    """This is a dictionary with another loss: KL(model || model with the reconstruction in place), and what it adds.

    dictionary: what is trained; its penalties (L1, the auxiliary loss) stay. model: its weights do not change. later:
    the weight of the mean squared distance at the sites `downstream`, each in units of its variance; by default the
    streams after all blocks above. local: the weight of the dictionary's own squared error, 0 in the paper. mask: the
    tokens that are replaced, all but special ones unless given.

    Batches are ids [rows, context]. Saved and checkpointed as the dictionary that it holds.
    """

    def __init__(
        self,
        dictionary: Coder,
        model: Model,
        *,
        later: float = 0.0,
        local: float = 0.0,
        downstream: str | None = None,
        mask: TokenMask | None = None,
    ):
        reads, writes = dictionary.reads, dictionary.writes
        if not isinstance(reads, str) or not isinstance(writes, str):
            raise DictionaryError("end-to-end training needs one site: make the dictionary with reads='blocks....'")
        super().__init__(dictionary.d_in, dictionary.n_latents, dictionary.d_out, reads=reads, writes=writes)
        self._reads, self._writes = reads, writes
        self.dictionary, self._model = dictionary, [model]  # in a list, so that torch does not take the model for ours
        self.idle = dictionary.idle
        self.later, self.local = later, local
        sites = list(model.sites())
        asked = downstream or "blocks.*.resid_post"
        after = sites.index(writes)
        self.downstream = [r.key for r in model.resolve(asked) if sites.index(r.site) > after] if later else []
        self.mask = (mask or TokenMask()).of(model)

    def reconstruct(self, batch: Any) -> Reconstruction:
        (model,) = self._model
        ids, x, target, keep, clean = self._seen(batch)
        found = self.dictionary(x, None if self.reads == self.writes else target)
        spliced = clean[self._writes].detach().clone()
        spliced[keep] = found.output.detach().to(spliced)
        seen: dict[str, Tensor] = {}

        def metric(logits: Tensor) -> Tensor:
            wanted = clean.logits[keep].float().log_softmax(-1)
            kl = (wanted.exp() * (wanted - logits[keep].float().log_softmax(-1))).sum(-1).mean()
            return kl + self.later * self._distance(seen, clean, keep)

        looks = {site: unchanged(_look(seen, site)) for site in self.downstream}
        run = model.run(ids, self._writes, {self._writes: unchanged(put(spliced)), **looks}, grad=metric)
        assert run.grad is not None and run.value is not None
        # The gradient at the site, as a loss whose gradient to the dictionary is the one through the model.
        pull = (run.grad[self._writes][keep].to(found.output) * (found.output - found.output.detach())).sum()
        losses = {"end to end": pull + run.value, **{k: v for k, v in found.losses.items() if k != "mse"}}
        if self.local:
            losses["mse"] = self.local * found.losses["mse"]
        return Reconstruction(found.output, found.features, losses, found.fvu)

    def parts(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        _, x, target, _, _ = self._seen(batch)
        return x, None if self.reads == self.writes else target

    def _seen(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """This is (ids, what is read [n, d_in], what is written [n, d_out], which tokens [rows pos], the clean run)."""
        (model,) = self._model
        ids = torch.as_tensor(batch)
        clean = model.run(ids, save=list(dict.fromkeys([self._reads, self._writes, *self.downstream])))
        keep = self.mask(ids).to(clean[self._writes].device)
        return ids, clean[self._reads][keep], clean[self._writes][keep], keep, clean

    def _distance(self, seen: dict[str, Tensor], clean: Any, keep: Tensor) -> Tensor:
        """This is the mean over the later sites of the squared distance from the clean run, by their variance."""
        if not seen:
            return torch.zeros(())
        each = []
        for site, value in seen.items():
            wanted = clean[site][keep].float()
            spread = (wanted - wanted.mean(0)).square().sum(1).mean()
            each.append((value[keep].float() - wanted).square().sum(1).mean() / spread)
        return torch.stack(each).mean()

    # All else is the dictionary's own

    def encode(self, x: Tensor) -> Tensor:
        return self.dictionary.encode(x)

    def decode(self, features: Features, x: Tensor | None = None) -> Tensor:
        return self.dictionary.decode(features, x)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Reconstruction:
        return self.dictionary(x, target)

    def direction(self, latent: int) -> Tensor:
        return self.dictionary.direction(latent)

    def begin(self, x: Tensor, target: Tensor | None) -> None:
        self.dictionary.begin(x, target)

    def anneal(self, fraction: float) -> None:
        self.dictionary.anneal(fraction)

    def after_step(self) -> None:
        self.dictionary.after_step()

    def count(self, found: Reconstruction) -> None:
        self.dictionary.count(found)

    def options(self) -> dict[str, Any]:
        return self.dictionary.options()

    def tensors(self) -> dict[str, Tensor]:
        return self.dictionary.tensors()

    def header(self) -> dict[str, Any]:
        kind = {"later": self.later, "local": self.local, "downstream": self.downstream}
        held = self.dictionary.header()
        return {**held, "facts": {**self.facts, **held["facts"], "end_to_end": kind}}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.dictionary.load_state_dict(state_dict, strict, assign)

    def named_parameters(self, *args: Any, **more: Any) -> Any:
        return self.dictionary.named_parameters(*args, **more)


def _look(seen: dict[str, Tensor], site: str) -> Any:
    def look(x: Tensor) -> Tensor:
        seen[site] = x
        return x

    return look
