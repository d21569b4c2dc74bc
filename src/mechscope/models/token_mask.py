"""Which tokens count: one `TokenMask`, shared by streams, stores, training, evaluation and features.

Some tokens are not worth a dictionary's latents, and spoil its statistics: BOS and padding, whose activations never
vary, and attention sinks, whose norm may be a hundred times the others'. All that reads activations token by token
takes the same mask, and what was made with one records it, so that a dictionary is evaluated on tokens like those that
it was trained on.

    mask = ms.models.TokenMask(first=1, outliers=10)        as asked
    stream = model.stream(texts, at=site, mask=mask)        its first batch fixes the median norm
    stream.mask                                             as used: the ids and medians in it; pass this one on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechscope.errors import TokenError, did_you_mean

if TYPE_CHECKING:
    from mechscope.models.model import Model


@dataclass(frozen=True)
class TokenMask:
    """This says which tokens of a text count.

    special: the tokenizer's special tokens do not. ids: nor do these. first: nor do the first so many of a row, BOS
    among them. outliers: nor does a token whose norm is more than so many times the median norm of a site, where the
    median is that of the other tokens of a first batch, and then stays (`medians`, by site); None keeps all norms.
    `special_ids` are the ids that `special` stands for, once a model has told.

    >>> TokenMask(ids=(7,), first=1)([[5, 6, 7, 8]]).tolist()
    [[False, True, False, True]]
    """

    special: bool = True
    ids: tuple[int, ...] = ()
    first: int = 0
    outliers: float | None = None
    special_ids: tuple[int, ...] | None = None
    medians: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(sorted(set(map(int, self.ids)))))
        if self.special_ids is not None:
            object.__setattr__(self, "special_ids", tuple(sorted(set(map(int, self.special_ids)))))
        object.__setattr__(self, "medians", {site: float(norm) for site, norm in self.medians.items()})
        if self.first < 0:
            raise TokenError(f"first={self.first}: give how many tokens of every row to leave out, 0 or more")
        if self.outliers is not None and self.outliers <= 1:
            raise TokenError(
                f"outliers={self.outliers}: that would leave out every norm above {self.outliers} medians; give a "
                "number above 1, such as 10"
            )

    def of(self, model: Model) -> TokenMask:
        """This is the mask with the ids of the model's special tokens in it; raises TokenError for another model's."""
        if not self.special:
            return self
        mine = tuple(sorted(set(getattr(model.tokenizer, "all_special_ids", ()) or ())))
        if self.special_ids is not None and self.special_ids != mine:
            raise TokenError(
                f"this mask was made for a tokenizer with the special ids {list(self.special_ids)}, and those of "
                f"{model.name} are {list(mine)}; make another: TokenMask(...)"
            )
        return replace(self, special_ids=mine)

    def fitted(self, ids: Tensor | Sequence[Sequence[int]], attention: Tensor | None, values: Mapping[str, Tensor]):
        """This is the mask with the median norms of a first batch; the mask itself where it asks for none or has them.

        ids, attention: [batch pos]. values: {site: [batch pos d]}.
        """
        missing = [site for site in values if site not in self.medians]
        if self.outliers is None or not missing:
            return self
        counted = replace(self, outliers=None)(ids, attention)
        if not counted.any():
            raise TokenError("no token of the first batch counts, so there is no median norm; give more text")
        medians = {site: _norms(values[site])[counted.to(values[site].device)].median().item() for site in missing}
        return replace(self, medians={**self.medians, **medians})

    def __call__(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        attention: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """This is True [batch pos] at every token that counts.

        ids: [batch pos]. attention: [batch pos], True at real tokens; all are unless given. values: {site: [batch pos
        d]}, which a mask of outliers needs; a token must be none at any of these sites.

        Raises TokenError for a mask of outliers without values, or without the median norm of a site.
        """
        ids = torch.as_tensor(ids)
        real = torch.ones_like(ids, dtype=torch.bool) if attention is None else torch.as_tensor(attention).bool().cpu()
        out = [*self.ids, *(self.special_ids or ())] if self.special else list(self.ids)
        kept = real & ~torch.isin(ids.cpu(), torch.tensor(out, dtype=torch.long)) if out else real.clone()
        if self.first:
            kept &= real.cumsum(-1) > self.first
        if self.outliers is None:
            return kept
        if values is None:
            raise TokenError(f"this mask leaves out norms above {self.outliers} medians; pass values={{site: tensor}}")
        for site, x in values.items():
            if site not in self.medians:
                known = ", ".join(map(repr, self.medians)) or "none"
                raise TokenError(
                    f"this mask has no median norm for {site!r} (it has {known}); take the mask of a stream that read "
                    "this site, or mask.fitted(ids, attention, values)"
                )
            kept &= (_norms(x) <= self.outliers * self.medians[site]).cpu()
        return kept

    def to_json(self) -> dict[str, Any]:
        """This is the mask as plain JSON, for a header; `from_json` is the inverse."""
        facts = asdict(self)
        return {
            **facts,
            "ids": list(self.ids),
            "special_ids": None if self.special_ids is None else [*self.special_ids],
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> TokenMask:
        """This is the mask that `to_json` wrote; raises TokenError for a field that no mask has."""
        known = cls.__dataclass_fields__
        for name in facts:
            if name not in known:
                raise TokenError(f"a token mask has no {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")
        return cls(**facts)

    def __str__(self) -> str:
        parts = [
            *(["special tokens"] if self.special else []),
            *([f"the ids {', '.join(map(str, self.ids))}"] if self.ids else []),
            *([f"the first {self.first} of a row"] if self.first else []),
            *([f"norms above {self.outliers:g} medians"] if self.outliers is not None else []),
        ]
        return f"all tokens but {'; '.join(parts)}" if parts else "all tokens"


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.float(), dim=-1)


__all__ = ["TokenMask"]
