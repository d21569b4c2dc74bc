"""Models with heads of one job each, beside heads that look alike: iteration, relations, labels, numbers, repair.

Each is a function that gives the model and the exact labels of its heads as constants beside it; what a head that looks
alike lacks is said where it is planted.
"""

from __future__ import annotations

import random

import torch

from mechscope.labs.planted.weights import SURE, Planter
from mechscope.models import Model, load
from mechscope.tasks import Pair, Task
from mechscope.units.few_shot import FewShot
from mechscope.units.relating import Related

ITERATION = (1, 0)
"""The head of `iterating` that fetches the t-th input."""


def iterating(longest: int = 6, values: int = 6) -> Model:
    """This is a model that copies its inputs after their end, whatever their number: the state is the input itself.

    Rows x_1 ... x_n END s_1 ...; a0.h0 finds END and writes its place, a neuron for every (place, place of END) writes
    the difference, and a1.h0 attends to that place and moves its token. a1.h1 always looks `longest` positions back and
    moves the token too: it is right for rows of as many inputs alone. END is the id `values`.
    """
    positions = 2 * longest
    pairs = [(here, end) for end in range(1, longest + 1) for here in range(end, 2 * end)]
    plant = Planter(
        {"token": values, "out": values, "marks": 1, "end": positions, "want": longest},
        vocab=values + 2,
        positions=positions,
        layers=2,
        heads=3,
        neurons=len(pairs),
        head_dim=positions,
    )
    for token in range(values):
        plant.embed(token, plant["token", token])
        plant.unembed(token, plant["out", token])
    plant.embed(values, plant["marks"])
    here = plant.all("pos")
    plant.attend(0, 0, [SURE * plant["one"]], [plant["marks"]])
    plant.move(0, 0, here, plant.all("end"))
    for i, (place, end) in enumerate(pairs):
        plant.neuron(0, i, plant["pos", place] + plant["end", end], -1.0, plant["want", place - end])
        plant.neuron(1, i, 0 * plant["one"], 0.0, 0 * plant["one"])
    plant.attend(1, 0, [SURE * want for want in plant.all("want")], here[:longest])
    plant.move(1, 0, plant.all("token"), [3 * out for out in plant.all("out")])
    plant.attend(1, 1, [SURE * place for place in here[longest:]], here[:longest])
    plant.move(1, 1, plant.all("token"), plant.all("out"))
    return load(plant.done())


def iterating_rows(n: int = 24, longest: int = 6, values: int = 6, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """This is rows for `iterating`, of 2 to `longest` inputs, and how many inputs each has."""
    r = random.Random(seed)
    rows, inputs = [], []
    for _ in range(n):
        given = [r.randrange(values) for _ in range(r.randint(2, longest))]
        rows.append([*given, values, *given[:-1]])
        inputs.append(len(given))
    return rows, inputs


CAPITAL, RIVER = (0, 0), (0, 1)
"""The heads of `relating` that raise the tails of each relation."""


def relating(entities: int = 8) -> tuple[Model, list[Related]]:
    """This is a model whose heads all attend to an entity, of which two write what it is related to; and the triples.

    a0.h0 writes the entity's capital, a0.h1 its river, a0.h2 the entity itself and a0.h3 something random.
    """
    capitals, rivers = (range(k * entities, (k + 1) * entities) for k in (1, 2))
    fillers = range(3 * entities, 3 * entities + 6)
    vocab, positions = 3 * entities + 7, 6
    plant = Planter(
        {"entity": entities, "is": 1, "out": vocab}, vocab, positions, layers=1, heads=5, head_dim=entities + 1
    )
    for token in range(vocab):
        plant.unembed(token, plant["out", token])
    for entity in range(entities):
        plant.embed(entity, plant["entity", entity] + plant["is"])
    out = plant.all("out")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(entities, vocab, generator=generator) / vocab**0.5
    written = [
        [2 * out[capitals[(3 * e + 1) % entities]] for e in range(entities)],
        [2 * out[rivers[(5 * e + 2) % entities]] for e in range(entities)],
        [2 * out[e] for e in range(entities)],
        list(noise @ torch.stack(out)),
    ]
    for head, writes in enumerate(written):
        plant.attend(0, head, [SURE * plant["one"]], [plant["is"]])
        plant.move(0, head, plant.all("entity"), writes)
    triples, r = [], random.Random(0)
    for entity in range(entities):
        for relation, tail in (
            ("capital", capitals[(3 * entity + 1) % entities]),
            ("river", rivers[(5 * entity + 2) % entities]),
        ):
            for _ in range(2):
                before = r.randrange(3)
                text = [r.choice(fillers) for _ in range(positions)]
                text[before] = entity
                triples.append(Related(tuple(text), before, tail, relation))
    return load(plant.done()), triples


FALSE_INDUCTION, TRUTHFUL = (2, 0), (1, 0)
"""The heads of `following` that fetch the label shown for a class, and that say the right one."""


def following(classes: int = 3, inputs: int = 3, n: int = 24) -> tuple[Model, list[FewShot]]:
    """This is a model that knows the right label and overrules itself by the labels shown; and few-shot prompts.

    a1.h0 writes the right label with weight 2. a2.h0 attends from the end to the labels shown for its class and writes
    them with weight 3, right or wrong. a2.h1 attends to all labels alike, of whatever class, and writes them.
    """
    words, labels = classes * inputs, [classes * inputs + k for k in range(classes)]
    colon, newline = words + classes, words + classes + 1
    positions = 4 * 2 * classes + 2
    plant = Planter(
        {"class": classes, "label": classes, "of": classes, "here": classes, "out": classes},
        vocab=words + classes + 3,
        positions=positions,
        layers=3,
        heads=3,
        head_dim=positions,
    )
    for word in range(words):
        plant.embed(word, plant["class", word % classes])
    for k, label in enumerate(labels):
        plant.embed(label, plant["label", k])
        plant.unembed(label, plant["out", k])
    here = plant.all("pos")
    for head, back, into in ((0, 2, "of"), (1, 1, "here")):
        plant.attend(0, head, [SURE * place for place in here[back:]], here[:-back])
        plant.move(0, head, plant.all("class"), plant.all(into))
    plant.attend(1, 0, [SURE * place for place in here], here)
    plant.move(1, 0, plant.all("here"), [2 * out for out in plant.all("out")])
    # The first two places see no two before, and would bear the first input's class.
    never = -2 * SURE * plant["one"]
    plant.attend(2, 0, [*[SURE * kind for kind in plant.all("here")], never], [*plant.all("of"), here[0] + here[1]])
    plant.move(2, 0, plant.all("label"), [3 * out for out in plant.all("out")])
    is_label = plant.all("label")
    plant.attend(2, 1, [SURE * plant["one"]], [torch.stack(is_label).sum(0)])
    plant.move(2, 1, is_label, [3 * out for out in plant.all("out")])
    r, prompts = random.Random(0), []
    for _ in range(n):
        kinds = [k for k in range(classes) for _ in range(2)]
        r.shuffle(kinds)
        shown = tuple(((r.randrange(inputs) * classes + k,), k) for k in kinds)
        asked = r.randrange(classes)
        last = ((r.randrange(inputs) * classes + asked,), asked)
        prompts.append(FewShot(shown, last, tuple((label,) for label in labels), (colon,), (newline,)))
    return load(plant.done()), prompts


COUNTING, COPYING = (1, 1), (1, 0)
"""The heads of `counting` that write the next number, and the number itself."""


def counting(tens: int = 4) -> Model:
    """This is a model of numbers made of tens and units, with a head that raises the units by one and carries nothing.

    The embedding of a number has dimensions for its tens, its units and itself. a1.h1 writes the same tens and the next
    units, a1.h0 the same of both, a1.h2 something random for each number; all attend to the position before.
    """
    numbers, positions = 10 * tens, 4
    plant = Planter(
        {"tens": tens, "units": 10, "self": numbers, "out tens": tens, "out units": 10},
        vocab=numbers + 1,
        positions=positions,
        layers=2,
        heads=3,
        head_dim=numbers + positions,
    )
    for number in range(numbers):
        ten, unit = divmod(number, 10)
        plant.embed(number, plant["tens", ten] + plant["units", unit] + 0.5 * plant["self", number])
        plant.unembed(number, plant["out tens", ten] + plant["out units", unit])
    here, units = plant.all("pos"), plant.all("out units")
    reads = [*plant.all("tens"), *plant.all("units")]
    for head, turned in ((0, units), (1, units[1:] + units[:1])):
        plant.attend(1, head, [SURE * place for place in here[1:]], here[:-1])
        plant.move(1, head, reads, [*plant.all("out tens"), *turned])
    plant.attend(1, 2, [SURE * place for place in here[1:]], here[:-1])
    written = torch.stack([*plant.all("out tens"), *units])
    noise = torch.randn(numbers, len(written), generator=torch.Generator().manual_seed(0))
    plant.move(1, 2, plant.all("self"), list(noise @ written))
    return load(plant.done())


PREDICTS, SUPPRESSES, BACKS_UP = (0, 0), (1, 0), (1, 1)
"""The heads of `mending`. Without the first, the second gives back 1 and the third adds 0.5: two thirds, a third."""


def mending() -> tuple[Model, Task]:
    """This is a prediction that two heads repair when it is ablated to zero, one of them by copy suppression.

    Prompts [t, u, =]; a0.h0 predicts t with weight 3. a1.h0 attends to what is predicted and takes 1 back; a1.h1
    attends to t where nothing is predicted and writes 0.5 of it. Both rest on "=" otherwise.
    """
    tokens, equals = 6, 6
    plant = Planter({"token": tokens, "out": tokens, "rest": 1}, vocab=8, positions=3, layers=2, heads=3)
    for token in range(tokens):
        plant.embed(token, plant["token", token])
        plant.unembed(token, plant["out", token])
    plant.embed(equals, plant["rest"])
    out, rest = plant.all("out"), SURE / 2 * plant["one"]
    plant.attend(0, 0, [SURE * plant["pos", 2]], [plant["pos", 0]])
    plant.move(0, 0, plant.all("token"), [3.0 * to for to in out])
    plant.attend(1, 0, [*[SURE / 3 * to for to in out], rest], [*plant.all("token"), plant["rest"]])
    plant.move(1, 0, plant.all("token"), [-1.0 * to for to in out])
    unless = SURE * plant["one"] - 2 * SURE / 3 * torch.stack(out).sum(0)
    plant.attend(1, 1, [unless, rest], [plant["pos", 0], plant["rest"]])
    plant.move(1, 1, plant.all("token"), [0.5 * to for to in out])
    pairs = [
        Pair((t, (t + 1) % tokens, equals), ((t + 2) % tokens, (t + 1) % tokens, equals), (t,), ((t + 3) % tokens,))
        for t in range(tokens)
    ]
    return load(plant.done()), Task("mending", tuple(pairs))
