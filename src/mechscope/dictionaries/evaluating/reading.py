"""Reading attributes off edited activations: by a probe, or by the model's own answers to questions.

A `Read` is asked what value an attribute has, given vectors that were put in place of some rows' own. What values are
is up to the caller: they are small integers, as in `values[attribute]` [n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mechscope.edits import Edit, unchanged
from mechscope.errors import DictionaryError

if TYPE_CHECKING:
    from mechscope.models.edit import Where
    from mechscope.models.model import Model

Values = Mapping[str, Tensor]
"""What each row is: {attribute: [n] int64}."""


class Read(Protocol):
    """This says which value of `attribute` is read off `vectors` [m, d], put in place of those of `rows` [m]: [m]."""

    def __call__(self, attribute: str, rows: Tensor, vectors: Tensor) -> Tensor: ...


def probed(x: Tensor, values: Values) -> Read:
    """This reads attributes by multinomial logistic regressions that are fitted on x [n, d].

    >>> x = torch.eye(3).repeat(20, 1)
    >>> read = probed(x, {"which": torch.arange(3).repeat(20)})
    >>> read("which", torch.arange(3), torch.eye(3)[[2, 0, 1]]).tolist()
    [2, 0, 1]
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as missing:
        raise DictionaryError("probes need scikit-learn: pip install 'mechscope[probe]'") from missing
    size = float(x.double().square().mean().sqrt()) or 1.0
    made: dict[str, Any] = {}
    for attribute, held in values.items():
        if len(held.unique()) < 2:
            raise DictionaryError(f"all rows have one value of {attribute!r}; an attribute needs two or more")
        made[attribute] = LogisticRegression(C=10.0, max_iter=1000).fit(
            (x / size).detach().cpu().double().numpy(), held.cpu().numpy()
        )

    def read(attribute: str, rows: Tensor, vectors: Tensor) -> Tensor:
        said = made[attribute].predict((vectors / size).detach().cpu().double().numpy())
        return torch.from_numpy(said).to(vectors.device)

    return read


@dataclass(frozen=True, eq=False)
class Placed(Edit):
    """This puts a vector of its own at a position of its own in each row of the batch."""

    vectors: Tensor = None  # type: ignore[assignment]
    positions: Tensor = None  # type: ignore[assignment]

    def apply(self, x: Tensor, where: Where) -> Tensor:
        out = x.clone()
        for i, row in enumerate(where.rows):
            out[i, int(self.positions[row]) % x.shape[1]] = self.vectors[row].to(x)
        return out


def asked(
    model: Model,
    site: str,
    prompts: Mapping[str, Sequence[Any]],
    answers: Mapping[str, Sequence[int]],
    at: Sequence[int] | int = -1,
    together: int = 256,
) -> Read:
    """This reads attributes by asking the model: which value's token has the largest logit at the prompt's end.

    site: where the vectors are put. prompts: for each attribute a prompt of every row that asks for it, as text or ids.
    answers: for each attribute the token of every value. at: the position at which a row's vector is put, or one for
    each row; from the end where negative. together: how many prompts run at once.
    """

    def read(attribute: str, rows: Tensor, vectors: Tensor) -> Tensor:
        if attribute not in prompts:
            raise DictionaryError(f"no prompts ask for {attribute!r}; there are some for {', '.join(prompts)}")
        tokens = torch.tensor(list(answers[attribute]))
        said = []
        for part in torch.arange(len(rows)).split(together):
            chosen = [prompts[attribute][int(row)] for row in rows[part]]
            ids = model.ids([list(p) if isinstance(p, tuple) else p for p in chosen])
            places = torch.tensor([at if isinstance(at, int) else at[int(row)] for row in rows[part]])
            out = model.run(ids, edits={site: unchanged(Placed(vectors[part], places))})
            ends = torch.tensor([len(row) - 1 for row in ids])
            logits = out.logits[torch.arange(len(ids)), ends]
            said.append(logits[:, tokens].argmax(-1))
        return torch.cat(said)

    return read
