"""A peer's TopK training step in turn with the dense reference, in an environment that has the peer.

    python topk_step.py PEER ROUNDS

PEER: sae-lens (`SAETrainer.step`), eai-sparsify (`SparseCoder` and Adam, as its trainer does a step on one process) or
dictionary-learning (`TopKTrainer.update`). Prints JSON: seconds a round of both, and the version.
"""

import gc
import json
import sys
import time
import types
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dense_topk import Dense, data

D, LATENTS, K, BATCH = 768, 16_384, 32, 4096


def sae_lens():
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=LATENTS, k=K, device="cpu"))
    config = SAETrainerConfig(total_training_samples=BATCH * 1000, train_batch_size_samples=BATCH, lr_end=3e-4)
    trainer = SAETrainer(config, sae, iter([]))
    return trainer.step


def eai_sparsify():
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D, SparseCoderConfig(num_latents=LATENTS, k=K))
    adam = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step(x):
        if coder.cfg.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        if coder.cfg.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def dictionary_learning():
    # It asks for an nnsight that cannot be installed beside this torch, and for wandb; its trainers use neither.
    for name in ("nnsight", "wandb"):
        stand_in = types.ModuleType(name)
        stand_in.LanguageModel = stand_in.save = None
        sys.modules.setdefault(name, stand_in)
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=100_000, activation_dim=D, dict_size=LATENTS, k=K, layer=0, lm_name="none", device="cpu", seed=0
    )
    number = iter(range(10**6))
    return lambda x: trainer.update(next(number), x)


def main():
    name, rounds = sys.argv[1], int(sys.argv[2])
    step = {"sae-lens": sae_lens, "eai-sparsify": eai_sparsify, "dictionary-learning": dictionary_learning}[name]()
    x = data(D, BATCH)
    dense = Dense(D, LATENTS, K)
    ways = {"peer": step, "dense": dense.step}
    seconds = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in list(ways) if number % 2 else list(ways)[::-1]:
            gc.collect()
            started = time.perf_counter()
            ways[way](x)
            if number:
                seconds[way].append(time.perf_counter() - started)
    print(json.dumps({**seconds, "version": metadata.version(name)}))


if __name__ == "__main__":
    main()
