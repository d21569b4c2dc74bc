"""The atlas: what its page takes to draw, and head importance against its arithmetic bound.

Page: GPT-2-small's shape in layers and heads (12 by 12; widths are small, for a page holds patterns, not weights), rows
of 128 tokens, in headless Chromium on this machine, a fresh page each time: from the call that draws the patterns of
all 144 heads to the frame after it, base64 decoded on the way; and what loading the whole page takes. On a machine
that is busy with other work the clock counts waiting too; what drawing takes is the processor time of all of Chromium.

Importance: mean ablation of all heads on 2 rows of 64 tokens, GPT-2-small's widths with 4 layers, in forwards over the
same rows, processor time. The bound counts what has to be run, 1 + the sum over heads of (L - l) / L.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from measure import Options, Row

from lenses import processor

TARGET = 200.0
"""Milliseconds for the patterns of all heads."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DRAWN = """async () => {
  const choice = document.querySelector('select[aria-label=Prompt]');
  const next = () => new Promise(requestAnimationFrame);
  const frame = async () => { await next(); await next(); return performance.now(); };
  await frame();
  const began = performance.now();
  choice.value = '1';
  choice.dispatchEvent(new Event('change'));
  return await frame() - began;
}"""


def measured(options: Options) -> list[Row]:
    return [*page_rows(options.rounds(5, 3)), *importance_rows(options.rounds(2, 1))]


def page_rows(rounds: int) -> list[Row]:
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        made = atlas(Path(folder))
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        drawn, spent, painted, loaded = [], [], [], []
        for _ in range(rounds):
            page = chromium.new_page(viewport={"width": 1400, "height": 950})
            page.goto(made.as_uri())
            page.wait_for_selector(".neuron h3")
            loaded.append(page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart"))
            page.wait_for_timeout(500)
            before = browser_seconds()
            drawn.append(page.evaluate(DRAWN))
            spent.append(1000 * (browser_seconds() - before))
            painted.append(float(page.locator(".all-heads").get_attribute("data-milliseconds") or "nan"))
            page.close()
        chromium.close()
        size = made.stat().st_size / 1e6
    return [
        Row(
            "patterns of 144 heads at 128 tokens, to the next frame", "ms", drawn, TARGET, note="one head enlarged too"
        ),
        Row("processor time of it", "ms", spent, TARGET),
        Row("of it, decoding and painting, by the clock", "ms", painted),
        Row("opening the page", "ms", loaded, note=f"{size:.1f} MB, 5 prompts, 200 neurons"),
    ]


def browser_seconds() -> float:
    """This is the processor time so far of all processes that this one started, and that they did."""
    times, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            process = int(stat.parent.name)
            parents[process], times[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    mine = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(times[process] for process in mine - {os.getpid()} if process in times) / os.sysconf("SC_CLK_TCK")


def atlas(folder: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import mechscope as ms
    from mechscope import jobs

    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, vocab_size=2000, n_positions=128, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(1, 2000, (64, 128), generator=torch.Generator().manual_seed(1))
    return jobs.atlas(ms.load(GPT2LMHeadModel(config).eval()), ids, folder, 200, 4).page


def importance_rows(rounds: int) -> list[Row]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import mechscope as ms
    from mechscope.units.ablating import forwards

    torch.manual_seed(0)
    model = ms.load(GPT2LMHeadModel(GPT2Config(n_layer=4)).eval())
    ids = torch.randint(0, 50257, (2, 64), generator=torch.Generator().manual_seed(1))

    def plain() -> None:
        with torch.no_grad():
            model.hf(ids)

    plain()
    base, found = [], []
    for _ in range(rounds):
        base.append(processor(plain))
        found.append(processor(lambda: ms.units.head_importance(model, ids)) / base[-1])
    return [Row("importance of 48 heads", "forwards", found, note=f"predicted {forwards(model):.1f}")]
