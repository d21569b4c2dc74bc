"""The first sparse autoencoder: a ReLU, and a penalty on the sum of the activations.

Sources: Bricken et al. 2023, Towards Monosemanticity; Conerly et al. 2024 (the penalty weighs each activation by its
decoder's norm), https://transformer-circuits.pub/2024/april-update; tied: Cunningham et al. 2023, arXiv:2309.08600.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mechscope.dictionaries.dictionary import Coder, Features


class ReLU(Coder):
    """This is a ReLU dictionary: loss = |x - x_hat|^2 + l1 * sum_i f_i |W_dec_i|, on inputs of mean norm sqrt(d).

    l1: the weight of the penalty; it rises from 0 over the first `warmup` of the training. tied: the encoder is the
    decoder (rows of norm 1).

    >>> ReLU(64, 512, l1=4.0).encode(torch.randn(8, 64)).shape
    torch.Size([8, 512])
    """

    sparse = False

    def __init__(
        self, d_in: int, n_latents: int, d_out: int | None = None, *, l1: float = 4.0, tied: bool = False,
        warmup: float = 0.05, **more: Any,
    ):  # fmt: skip
        super().__init__(d_in, n_latents, d_out, **more)
        self.l1, self.tied, self.warmup, self.rising = l1, tied, warmup, 1.0
        self.unit = tied
        if tied:
            self.W_enc = self.W_dec

    def anneal(self, fraction: float) -> None:
        self.rising = min(1.0, fraction / self.warmup) if self.warmup else 1.0

    def penalties(self, found: Features, pre: Features, inner: Tensor, error: Tensor) -> dict[str, Tensor]:
        assert isinstance(found, Tensor)
        return {"sparsity": self.rising * self.l1 * (found @ self.W_dec.norm(dim=1)).mean()}

    def tensors(self) -> dict[str, Tensor]:
        held = super().tensors()
        return {name: value for name, value in held.items() if name != "W_enc"} if self.tied else held

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if self.tied:
            state_dict = {**state_dict, "W_enc": state_dict["W_dec"]}
        return super().load_state_dict(state_dict, strict, assign)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "l1": self.l1, "tied": self.tied, "warmup": self.warmup}
