"""Activations whose sparse features are known: what dictionary learning, transcoders and crosscoders are measured on.

    from mechscope.labs import sparse

    data = sparse.Sparse(d=64, n_atoms=128, active=4, structure="hierarchical", noise=0.02, seed=0)
    for x, codes in data.batches(256): ...               # or data.stream(256): x alone, without end
    sparse.mean_max_cosine(found, data.atoms)            # 1 where every true atom was found
    sparse.matched_cosine(found, data.atoms).recovered() # share of true atoms found, each found atom used once
    sparse.chance(found, data.atoms)                     # what shuffled entries reach: the control
    sparse.PlantedMap(data, n_units=64, fan_in=2)        # x and y with the units between them
    sparse.Sites(data, n_sites=2, shared=0.5)            # the same codes in several spaces
    sparse.Manifold(d=32, kind="circle")                 # places on circles or spheres instead of directions

`python -m mechscope.labs.sparse` draws the structures and what scikit-learn recovers of them.
"""

from mechscope.dictionaries.evaluating.recovery import Match, chance, cosines, matched_cosine, mean_max_cosine
from mechscope.labs.sparse.generator import STRUCTURES, Batch, Sparse
from mechscope.labs.sparse.lab import LABS, check, run
from mechscope.labs.sparse.manifold import Manifold
from mechscope.labs.sparse.paired import Mapped, PlantedMap, Seen, Sites

__all__ = [
    "LABS",
    "STRUCTURES",
    "Batch",
    "Manifold",
    "Mapped",
    "Match",
    "PlantedMap",
    "Seen",
    "Sites",
    "Sparse",
    "chance",
    "check",
    "cosines",
    "matched_cosine",
    "mean_max_cosine",
    "run",
]
