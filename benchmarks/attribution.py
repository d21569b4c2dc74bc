"""Edge attribution, in units of the plain forward, and against the tools that people use for it.

GPT-2-small shape, 16 pairs of 16 tokens, 32,491 edges: EAP and EAP-IG with 5 steps, next to the plain Hugging Face
forward on the 16 clean prompts and to one forward and backward with respect to the embeddings. A peer runs in an
environment of its own, against the plain forward of its own process, so that ratios can be compared: auto-circuit
(PyPI) is installed into MECHSCOPE_BENCH or ~/.cache/mechscope-bench on first use; EAP-IG's own code is not on PyPI and
is run where `--eap-ig-env` names an environment that has it. Where a peer cannot run, figures that were measured before
are given, marked as quoted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import measure
from measure import Options, Row

PAIRS, POSITIONS = 16, 16
PLAIN, BOTH, EAP, EAP_IG = "plain forward", "forward and backward", "EAP", "EAP-IG, 5 steps"

# An unpinned install does not start: auto-circuit needs attrs without saying so and a TransformerLens that still has
# past_key_value_caching, and that needs transformers 4.
AUTO_CIRCUIT = ["torch==2.13.0", "auto-circuit==1.0.1", "attrs", "transformer-lens==2.15.4", "transformers<5"]

# Measured on 2 threads, n = 1 to 2, cold; (what, × forward, peak MB).
QUOTED = {
    "auto-circuit": [("mask-gradient EAP", 141, 4740), ("EAP", 278, 8263)],
    "EAP-IG's own code": [("EAP", 59, 2364), ("EAP-IG, 5 steps", 240, 3160)],
}


def calls():
    """This is what is compared, by name, on one model and one set of pairs."""
    import torch

    import mechscope as ms

    hf = measure.gpt2_small()
    model = ms.load(hf)
    clean, corrupt = (measure.random_ids(PAIRS, POSITIONS, seed) for seed in (1, 2))
    pairs = [
        ms.tasks.Pair(tuple(a), tuple(b), (i,), (i + PAIRS,))
        for i, (a, b) in enumerate(zip(clean.tolist(), corrupt.tolist(), strict=True))
    ]
    task = ms.tasks.Task("random", tuple(pairs))

    def plain():
        with torch.no_grad():
            return hf(clean, use_cache=False)

    def both():
        hf.requires_grad_(False)
        start = hf.get_input_embeddings()(clean).requires_grad_()
        logits = hf(inputs_embeds=start, use_cache=False).logits[:, -1]
        rows = torch.arange(PAIRS)
        return torch.autograd.grad((logits[rows, rows] - logits[rows, rows + PAIRS]).sum(), start)

    return {
        PLAIN: plain,
        BOTH: both,
        EAP: lambda: ms.circuits.eap(model, task),
        EAP_IG: lambda: ms.circuits.eap_ig(model, task, steps=5),
    }


def measured(options: Options) -> list[Row]:
    seconds = measure.in_turn(calls(), options.rounds(7, 3))
    rows = [Row(PLAIN, "s", seconds[PLAIN])]
    for name, target in ((BOTH, None), (EAP, 6.0), (EAP_IG, 20.0)):
        rows.append(Row(name, "× forward", measure.ratios(seconds, name, PLAIN), target))
    processes = options.rounds(3, 1)
    peaks = {
        name: [measure.in_a_process("attribution.py", name, **measure.OWN_PAGES) for _ in range(processes)]
        for name in (BOTH, EAP, EAP_IG)
    }
    for kind, label in (("tensors", "tensors"), ("resident", "resident memory")):
        twice = 2 * measure.median([found[kind] for found in peaks[BOTH]])
        for name, found in peaks.items():
            target, why = (None, "") if name == BOTH else (twice, f"target: twice {BOTH}")
            rows.append(Row(f"peak of {label}, {name}", "MB", [one[kind] for one in found], target, note=why))
    if options.peers:
        ours = {
            name: (rows_named(rows, name), rows_named(rows, f"peak of resident memory, {name}"))
            for name in (EAP, EAP_IG)
        }
        for peer, run in (("auto-circuit", auto_circuit), ("EAP-IG's own code", eap_ig_code)):
            rows += against(peer, run(options), ours)
    return rows


def rows_named(rows: list[Row], what: str) -> float:
    return next(row.median for row in rows if row.what == what)


def against(peer: str, found: dict | None, ours: dict[str, tuple[float, float]]) -> list[Row]:
    """This is a peer's time and peak, and ours beside them: ten times as fast, with a quarter of the memory."""
    rows = []
    if found is None:
        figures = [(what, [float(time)], [float(peak)]) for what, time, peak in QUOTED[peer]]
    else:
        base = measure.median(found["forward"]["seconds"])
        figures = [
            (what, [second / base for second in found[what]["seconds"]], found[what]["peak_mb"])
            for what, _, _ in QUOTED[peer]
            if what in found
        ]
    for what, times, peaks in figures:
        time, peak = ours[what if what in ours else EAP]
        quoted = found is None
        rows += [
            Row(f"{peer}: {what}", "× forward", times, quoted=quoted),
            Row(f"{peer}: {what}, over ours", "× as slow", [t / time for t in times], 10, True, quoted=quoted),
            Row(f"{peer}: {what}, peak", "MB", peaks, quoted=quoted),
            Row(f"ours, of that peak ({what})", "× of theirs", [peak / p for p in peaks], 0.25, quoted=quoted),
        ]
    return rows


# ---------------------------------------------------------------------------------------- peers


def auto_circuit(options: Options) -> dict | None:
    """This runs auto-circuit in an environment of its own, made on first use; None where that fails, saying why."""
    try:
        python = environment("auto-circuit", AUTO_CIRCUIT)
        return measure.in_a_process("peers/auto_circuit_eap.py", "1", python=python, timeout=3600)
    except (OSError, RuntimeError, subprocess.SubprocessError) as problem:
        print(f"auto-circuit could not run, so its figures are quoted: {problem}", file=sys.stderr)
        return None


def eap_ig_code(options: Options) -> dict | None:
    """This runs EAP-IG's own code where an environment was named; None where none was, or where it fails."""
    if options.eap_ig_env is None:
        return None
    try:
        python = options.eap_ig_env / "bin/python"
        return measure.in_a_process("peers/eap_ig_code.py", "1", python=python, timeout=3600)
    except (OSError, RuntimeError, subprocess.SubprocessError) as problem:
        print(f"EAP-IG's own code could not run, so its figures are quoted: {problem}", file=sys.stderr)
        return None


def environment(name: str, packages: list[str]) -> Path:
    """This is the Python of a virtual environment that has these packages; made once, and again when they change.

    A package written "name --no-deps" is installed after the others and without what it asks for.
    """
    folder = measure.CACHE / name
    stamp = folder / "packages.json"
    python = folder / "bin/python"
    if stamp.is_file() and json.loads(stamp.read_text()) == packages:
        return python
    print(f"installing {name} into {folder} (some minutes)", file=sys.stderr)
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet"]
    alone = [package.split() for package in packages if package.endswith("--no-deps")]
    together = [package for package in packages if not package.endswith("--no-deps")]
    for asked in (together, *alone):
        done = subprocess.run(
            [*command, *asked], capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"}
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-500:])
    stamp.write_text(json.dumps(packages))
    return python


if __name__ == "__main__":
    print(json.dumps(measure.peak_of(calls()[sys.argv[1]])))
