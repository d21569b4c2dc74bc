"""Inputs and the states that an iteration goes through on them, one after another: a chain of thought.

    x_1 ... x_n END s_1 ... s_(n-1)      with s_t = F(s_(t-1), x_t), s_0 = 0; s_n is predicted at the last position

The state s_t is predicted at position n + t - 1, which reads s_(t-1) and has to fetch x_t, at position t - 1. How many
inputs there are differs from row to row, so that no fixed distance leads there. Tasks of Cabannes et al. 2024
(arXiv:2406.02128): copying, parity, and a polynomial modulo a prime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TASKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "copy": lambda state, x, modulus: x,
    "parity": lambda state, x, modulus: (state + x) % 2,
    "polynomial": lambda state, x, modulus: (state * x + 1) % modulus,
}
"""name -> F(state, input, modulus)."""

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Chains:
    """This is rows of inputs and states: ids and targets [row 2 * longest - ...], and how many inputs each row has.

    targets are IGNORED where no state is predicted: at the inputs, and after the last state.
    """

    ids: Tensor
    targets: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> list[list[int]]:
        """This is the ids of each row without what stands after its last state."""
        return [row[: 2 * n].tolist() for row, n in zip(self.ids, self.lengths.tolist())]

    def by_length(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This is, for each number of inputs n, the ids and targets [row 2n] of the rows of so many."""
        for n in self.lengths.unique().tolist():
            mine = self.lengths == n
            yield n, self.ids[mine, : 2 * n], self.targets[mine, : 2 * n]


def chains(
    task: str, n: int, longest: int, modulus: int, generator: torch.Generator, held_out: bool = False, shortest: int = 1
) -> Chains:
    """This draws `n` chains of a task with `shortest` to `longest` inputs, trained on or held out.

    A fifth of all input sequences of four or more is held out. Inputs are bits, or of a polynomial any number below
    `modulus`; END is the id `modulus`.

    >>> found = chains("parity", 2, 6, 7, torch.Generator().manual_seed(0), shortest=6)
    >>> bool((found.targets[0, 6:] == found.ids[0, :6].cumsum(0) % 2).all())
    True
    """
    few: list[Tensor] = []
    while sum(map(len, few)) < n:
        highest = modulus if task == "polynomial" else 2
        x = torch.randint(highest, (8 * n if held_out else 2 * n, longest), generator=generator)
        lengths = torch.randint(shortest, longest + 1, (len(x), 1), generator=generator)
        places = torch.arange(longest)
        coded = (x * (places + 1) ** 2 * (places < lengths)).sum(1) + lengths[:, 0]
        held = (coded % 5 == 0) & (lengths[:, 0] >= 4)
        few.append(torch.cat([x, lengths], 1)[held == held_out])
    drawn = torch.cat(few)[:n]
    x, lengths = drawn[:, :-1], drawn[:, -1]
    state, states = torch.zeros(n, dtype=torch.long), []
    for t in range(longest):
        state = TASKS[task](state, x[:, t], modulus)
        states.append(state)
    return _laid_out(x, torch.stack(states, 1), lengths, modulus)


def _laid_out(x: Tensor, states: Tensor, lengths: Tensor, end: int) -> Chains:
    longest, n = x.shape[1], lengths[:, None]
    place = torch.arange(2 * longest).expand(len(x), -1)
    step = place - n  # of the state before; the next one is predicted here
    writing = (step >= 0) & (step < n)
    before = states.gather(1, (step - 1).clamp(0, longest - 1))
    ids = torch.where(step > 0, before, end)
    ids = torch.where(place < n, x.gather(1, place.clamp(max=longest - 1)), ids)
    ids = torch.where(step >= n, end, ids)
    targets = torch.where(writing, states.gather(1, step.clamp(0, longest - 1)), IGNORED)
    return Chains(ids, targets, lengths)
