"""Whole jobs, from a name to a file: what the command line calls, for use from Python too.

`circuit` is the main job: model + task -> circuit -> evidence -> a page. `evaluate` asks a question about what it
found, `patch` is the same for a sweep of patches, `reproduce` for a published analysis, and `replay` makes a saved
result again. `lens` and `weights` read a model as it is; `atlas` maps all its heads and neurons; `train_dictionaries`
trains autoencoders and transcoders for its sites.
"""

from mechscope.jobs.atlas import Atlas, atlas, predicted_forwards
from mechscope.jobs.circuit import Interrupted, Outcome, circuit, score
from mechscope.jobs.dictionaries import Trained, train_dictionaries
from mechscope.jobs.evaluate import Evaluated, evaluate
from mechscope.jobs.lens import Looked, lens
from mechscope.jobs.patch import Patched, patch
from mechscope.jobs.replay import Replay, replay
from mechscope.jobs.reproduce import Reproduced, reproduce
from mechscope.jobs.tasks import task_for
from mechscope.jobs.weights import Weighed, weights

__all__ = [
    "Atlas",
    "Evaluated",
    "Interrupted",
    "Looked",
    "Outcome",
    "Patched",
    "Replay",
    "Reproduced",
    "Trained",
    "Weighed",
    "atlas",
    "circuit",
    "evaluate",
    "lens",
    "patch",
    "predicted_forwards",
    "replay",
    "reproduce",
    "score",
    "task_for",
    "train_dictionaries",
    "weights",
]
