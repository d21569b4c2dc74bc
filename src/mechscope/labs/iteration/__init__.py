"""The laboratory of iteration heads: two layers that compute step by step, writing every state down.

`python -m mechscope.labs.iteration` trains a model for each of three tasks (`chains`), then parity again from the
weights that another task left (`train`); `lab` holds the evidence on the model that ships and on its untrained twin.
Source: Cabannes et al. 2024 (arXiv:2406.02128).
"""

from mechscope.labs.iteration.chains import TASKS, Chains, chains
from mechscope.labs.iteration.lab import LABS

__all__ = ["LABS", "TASKS", "Chains", "chains"]
