"""The atlas's search for heads in the browser: those of a layer, and those that write a token on its prompts."""

from __future__ import annotations

import json

import pytest

from atlases import made

READY = (".all-heads .pattern[aria-pressed=true]", ".neuron h3")


@pytest.fixture(scope="module")
def document() -> dict:
    """The atlas with one head of a known kind, and one that alone writes a word that nothing else has."""
    held = json.loads(json.dumps(made().document))
    held["labels"] = [[[] for _ in row] for row in held["labels"]]
    held["labels"][7][3] = ["induction"]
    held["prompts"][0]["writes"][9][2][0][2][0][0] = " zebra"
    return held


def test_search_finds_the_heads_of_a_layer_and_those_that_write_a_token(show, document):
    page = show(document, waits=READY)
    rows = page.locator(".found [role=option]")

    def search(words: str) -> list[str]:
        page.keyboard.press("Escape")
        page.locator("h1").click()
        page.keyboard.press("/")
        page.keyboard.type(words)
        # The text of what a row holds, whether or not it is laid out yet: innerText breaks lines only once it is.
        return rows.all_text_contents()

    layer = search("head 7")
    assert len(layer) == 12 and layer[0].startswith("head 7.3") and "induction" in layer[0]
    assert all(row.startswith("head 7.") for row in layer) and search("layer 7") == layer
    assert search("heads")[0].startswith("head 7.3") and "and 104 more" in page.locator(".found").inner_text()
    (writer,) = search("zebra")
    assert writer.startswith("head 9.2") and "writes" in writer
    page.keyboard.press("Enter")
    assert page.locator(".head-said h3").first.inner_text().split()[1] == "9.2"
    assert search("head 99") == []
