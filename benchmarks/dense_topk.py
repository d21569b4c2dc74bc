"""A TopK training step as one would write it first: what our step and every peer's are held against."""

import torch


def data(d, batch):
    """This is vectors with sparse structure, so that every way has the same thing to learn."""
    draw = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2 * d, d, generator=draw), dim=1)
    which = torch.randint(2 * d, (batch, 16), generator=draw)
    return (atoms[which] * torch.rand(batch, 16, 1, generator=draw)).sum(1) * d**0.5


class Dense:
    """Features as a dense tensor [batch, latents], autograd through everything, the same fused Adam as ours."""

    def __init__(self, d, latents, k, scale=1.0):
        draw = torch.Generator().manual_seed(0)
        rows = torch.nn.functional.normalize(torch.randn(latents, d, generator=draw), dim=1)
        weights = rows, torch.zeros(latents), rows, torch.zeros(d)
        self.k, self.scale = k, scale
        self.weights = [torch.nn.Parameter(w.clone()) for w in weights]
        self.adam = torch.optim.Adam(self.weights, lr=3e-4, fused=True)

    def like(self, weights):
        """This begins from given weights (W_enc, b_enc, W_dec, b_dec) instead."""
        with torch.no_grad():
            for mine, theirs in zip(self.weights, weights):
                mine.copy_(theirs)
        return self

    def step(self, x):
        W_enc, b_enc, W_dec, b_dec = self.weights
        x = x * self.scale
        pre = (x - b_dec) @ W_enc.T + b_enc
        values, latents = pre.topk(self.k, dim=1)
        features = torch.zeros_like(pre).scatter(1, latents, values.relu())
        loss = (x - features @ W_dec - b_dec).square().sum(1).mean()
        loss.backward()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.item()
