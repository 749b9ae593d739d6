"""Questions about scenes and their exact answers.

Every kind of question is a function that returns a :class:`QA` or None where the scene does not allow it.
Answers that need several looks are written as one would think aloud: first what is seen, then the conclusion.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plphp_cli.builtin.scenes import COLORS, SHAPES, Item, Scene, Split, sample_item, sample_scene

LONG_ANSWER_TOKENS = 12
"""From this length on an answer counts as long: its later tokens cannot all come from the uncut prefill."""


@dataclass(frozen=True)
class QA:
    """One question with the only answer that counts as right; ``conclusion`` is its end, where it is long."""

    kind: str
    question: str
    answer: str
    conclusion: str = ""


@dataclass(frozen=True)
class Group:
    """One prompt's images, in order, with one rendering seed each."""

    scenes: tuple[Scene, ...]
    seeds: tuple[int, ...]


def caption(scene: Scene) -> str:
    """Everything in a scene, in reading order: place, size, colour and shape."""
    parts = [
        (item.row, item.column, f"{item.place}: {item.size} {item.color} {item.shape}.")
        for item in scene.items
    ]
    if scene.sign:
        sign = scene.sign
        parts.append((sign.row, 0, f"{sign.place}: the {sign.kind} {sign.text} in {sign.color}."))
    return " ".join(text for *_, text in sorted(parts))


def listing(scene: Scene, *, places: bool = False) -> str:
    """The shapes in reading order, by colour, with their places if asked."""
    return ", ".join(f"{i.color} {i.shape}{' ' + i.place if places else ''}" for i in scene.items)


def _unique(scene: Scene) -> list[Item]:
    """Items whose shape occurs once."""
    counts = Counter(item.shape for item in scene.items)
    return [item for item in scene.items if counts[item.shape] == 1]


def _unique_color(scene: Scene) -> list[Item]:
    counts = Counter(item.color for item in scene.items)
    return [item for item in scene.items if counts[item.color] == 1]


Asker = Callable[[random.Random, Scene, str], QA | None]


def _color(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if rng.random() < 0.15:
        item = rng.choice(scene.items)
        return QA("color", f"what color is the shape at the {item.place}{where}?", item.color)
    if not (items := _unique(scene)):
        return None
    item = rng.choice(items)
    ask = rng.choice(
        ("what color is the {}{}?", "which color does the {}{} have?", "what is the color of the {}{}?")
    )
    return QA("color", ask.format(item.shape, where), item.color)


def _shape(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if rng.random() < 0.4 or not (items := _unique_color(scene)):
        item = rng.choice(scene.items)
        ask = rng.choice(("what shape is at the {}{}?", "what is at the {}{}?"))
        return QA("shape", ask.format(item.place, where), item.shape)
    item = rng.choice(items)
    return QA(
        "shape",
        rng.choice(("what shape is {}{}?", "which shape is {}{}?")).format(item.color, where),
        item.shape,
    )


def _size(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if not (items := _unique(scene)):
        return None
    item = rng.choice(items)
    ask = rng.choice(("is the {}{} small or large?", "how big is the {}{}?", "what size is the {}{}?"))
    return QA("size", ask.format(item.shape, where), item.size)


def _where(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if not (items := _unique(scene)):
        return None
    item = rng.choice(items)
    return QA(
        "where",
        rng.choice(("where is the {}{}?", "in which place is the {}{}?")).format(item.shape, where),
        item.place,
    )


def _count(rng: random.Random, scene: Scene, where: str) -> QA | None:
    ask = rng.choice(
        ("how many shapes are there{}?", "how many objects are there{}?", "how many shapes do you see{}?")
    )
    return QA("count", ask.format(where), str(len(scene.items)))


def _count_some(rng: random.Random, scene: Scene, where: str) -> QA | None:
    by_color = rng.random() < 0.5
    present = [item.color if by_color else item.shape for item in scene.items]
    wanted = rng.choice(present) if rng.random() < 0.75 else rng.choice(list(COLORS) if by_color else SHAPES)
    noun = f"{wanted} shapes" if by_color else f"{wanted}s" if wanted != "cross" else "crosses"
    number = str(present.count(wanted))
    return QA(
        "count some", rng.choice(("how many {} are there{}?", "count the {}{}.")).format(noun, where), number
    )


def _read(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if not scene.sign:
        return (
            QA("read", f"what does the sign say{where}?", "there is no sign") if rng.random() < 0.15 else None
        )
    ask = rng.choice(
        ("what does the sign say{}?", "what is written{}?", "read the text{}.", "read the sign{}.")
    )
    return QA("read", ask.format(where), scene.sign.text)


def _sign_color(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if not scene.sign:
        return None
    ask = rng.choice(("what color is the sign{}?", "what color is the text{}?"))
    return QA("sign color", ask.format(where), scene.sign.color)


def _caption(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if where:
        image = where.removeprefix(" in ")
        return QA(
            "caption",
            rng.choice(("describe {}.", "what is in {}?", "what do you see in {}?")).format(image),
            caption(scene),
        )
    ask = ("describe the picture.", "describe the image.", "what is in the picture?", "what do you see?",
           "describe what you see.")  # fmt: skip
    return QA("caption", rng.choice(ask), caption(scene))


def _list(rng: random.Random, scene: Scene, where: str) -> QA | None:
    ask = rng.choice(("list the shapes{}.", "list all shapes{}.", "name the shapes{}."))
    return QA("list", ask.format(where), listing(scene) + ".")


def _enumerate(rng: random.Random, scene: Scene, where: str) -> QA | None:
    steps = " ".join(f"{n}: {i.size} {i.color} {i.shape}." for n, i in enumerate(scene.items, 1))
    ask = rng.choice(("count the shapes one by one{}.", "number the shapes{}."))
    return QA("enumerate", ask.format(where), f"{steps} total {len(scene.items)}.")


def _exists(rng: random.Random, scene: Scene, where: str) -> QA | None:
    pairs = {(i.color, i.shape) for i in scene.items}
    pair = rng.choice(sorted(pairs)) if rng.random() < 0.5 else _absent_pair(rng, scene)
    answer = f"{listing(scene)}: {'yes' if pair in pairs else 'no'}."
    ask = rng.choice(("is there a {} {}{}?", "do you see a {} {}{}?"))
    return QA("exists", ask.format(*pair, where), answer)


def _absent_pair(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """A colour and a shape that never meet in the scene, though each may be there."""
    pairs = {(i.color, i.shape) for i in scene.items}
    while True:
        item = rng.choice(scene.items)
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        pair = (color, item.shape) if rng.random() < 0.5 else (item.color, shape)
        if pair not in pairs:
            return pair


def _relation(rng: random.Random, scene: Scene, where: str) -> QA | None:
    items = _unique(scene)
    if len(items) < 2:
        return None
    one, two = rng.sample(items, 2)
    word, a, b = rng.choice(
        (("left of", one.column, two.column), ("right of", two.column, one.column),
         ("above", one.row, two.row), ("below", two.row, one.row))
    )  # fmt: skip
    seen = f"the {one.shape} is at the {one.place} and the {two.shape} is at the {two.place}"
    question = f"is the {one.shape} {word} the {two.shape}{where}?"
    return QA("relation", question, f"{seen}: {'yes' if a < b else 'no'}.")


def _same_color(rng: random.Random, scene: Scene, where: str) -> QA | None:
    items = _unique(scene)
    if len(items) < 2:
        return None
    same = [(a, b) for a in items for b in items if a.shape != b.shape and a.color == b.color]
    one, two = rng.choice(same) if same and rng.random() < 0.6 else rng.sample(items, 2)
    verdict = "yes" if one.color == two.color else "no"
    ask = rng.choice(
        ("do the {} and the {} have the same color{}?", "are the {} and the {} of the same color{}?")
    )
    answer = f"the {one.shape} is {one.color} and the {two.shape} is {two.color}: {verdict}."
    return QA("same color", ask.format(one.shape, two.shape, where), answer)


def _sign_full(rng: random.Random, scene: Scene, where: str) -> QA | None:
    if not (sign := scene.sign):
        return None
    ask = rng.choice(("what does the sign say, in which color and where{}?", "tell me about the sign{}."))
    answer = f"the sign says {sign.text}. it is {sign.color} and stands at the {sign.place}."
    return QA("sign", ask.format(where), answer)


# Kinds that need a look-up by name are the hardest to learn, so they are asked more often.
SHORT: tuple[Asker, ...] = (
    _color, _color, _color, _shape, _size, _where, _where, _where, _count, _count_some, _count_some, _read,
    _sign_color,
)  # fmt: skip
LONG: tuple[Asker, ...] = (
    _caption, _caption, _list, _enumerate, _exists, _exists, _relation, _relation, _same_color, _same_color,
    _sign_full,
)  # fmt: skip


def _each_count(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    answer = " ".join(f"image {n}: {len(s.items)}." for n, s in enumerate(group, 1))
    return QA(
        "count each",
        rng.choice(("how many shapes are in each image?", "count the shapes in every image.")),
        answer,
    )


def _most(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    counts = [len(s.items) for s in group]
    word, best = rng.choice((("most", max(counts)), ("fewest", min(counts))))
    if counts.count(best) != 1:
        return None
    seen = " ".join(f"image {n}: {c}." for n, c in enumerate(counts, 1))
    return QA("most", f"which image has the {word} shapes?", f"{seen} so image {counts.index(best) + 1}.")


def _which(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    pairs = Counter(p for s in group for p in {(i.color, i.shape) for i in s.items})
    single = sorted(pair for pair, count in pairs.items() if count == 1)
    if not single:
        return None
    color, shape = rng.choice(single)
    found = next(
        n for n, s in enumerate(group, 1) if any((i.color, i.shape) == (color, shape) for i in s.items)
    )
    seen = " ".join(f"image {n}: {listing(s)}." for n, s in enumerate(group, 1))
    ask = rng.choice(("which image has a {} {}?", "in which image is the {} {}?"))
    return QA("which", ask.format(color, shape), f"{seen} so image {found}.")


def _compare(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    seen = " ".join(f"image {n}: {listing(s)}." for n, s in enumerate(group, 1))
    return QA("compare", rng.choice(("compare the images.", "list the shapes in each image.")), seen)


def _same_across(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    first, second = rng.sample(range(len(group)), 2)
    ones = {i.shape: i for i in _unique(group[first])}
    twos = {i.shape: i for i in _unique(group[second])}
    if not (shared := sorted(ones.keys() & twos.keys())):
        return None
    shape = rng.choice(shared)
    one, two = ones[shape].color, twos[shape].color
    question = f"is the {shape} the same color in image {first + 1} and in image {second + 1}?"
    answer = f"{one} in image {first + 1} and {two} in image {second + 1}: {'yes' if one == two else 'no'}."
    return QA("same across", question, answer)


ACROSS: tuple[Callable[[random.Random, Sequence[Scene]], QA | None], ...] = (
    _each_count, _most, _which, _compare, _same_across,
)  # fmt: skip

DROPPED = ("most",)
"""Kinds that stay about at chance: asked in training for variety, but neither claimed nor judged."""


def change_of(before: Scene, after: Scene) -> str | None:
    """What one step leads from ``before`` to ``after``, or None if they do not differ by one step."""
    old, new = set(before.items) - set(after.items), set(after.items) - set(before.items)
    if len(old) > 1 or len(new) > 1 or not (old or new) or before.sign != after.sign:
        return None
    if not old:
        (item,) = new
        return f"a {item.color} {item.shape} appeared at the {item.place}"
    (was,) = old
    if not new:
        return f"the {was.color} {was.shape} at the {was.place} is gone"
    (now,) = new
    if was.shape != now.shape or was.size != now.size:
        return None
    if was.cell == now.cell:
        return f"the {was.shape} at the {was.place} turned from {was.color} to {now.color}"
    if was.color == now.color:
        return f"the {was.color} {was.shape} moved from the {was.place} to the {now.place}"
    return None


def _changed(rng: random.Random, group: Sequence[Scene]) -> QA | None:
    if len(group) != 2 or (change := change_of(*group)) is None:
        return None
    seen = " ".join(f"image {n}: {listing(s, places=True)}." for n, s in enumerate(group, 1))
    ask = ("what changed?", "what changed between the images?", "what is different in image 2?")
    return QA("changed", rng.choice(ask), f"{seen} {change}.", conclusion=f" {change}.")


def sample_change(rng: random.Random, split: Split) -> tuple[Scene, Scene]:
    """A before/after pair that differs in one colour, place or presence, both in ``split``."""
    while True:
        before = sample_scene(rng, split, most=3, sign_share=0.2)
        items, row = list(before.items), before.sign.row if before.sign else -1
        free = [c for c in range(9) if c // 3 != row and c not in {i.cell for i in items}]
        index = rng.randrange(len(items))
        kind = rng.choice(("color", "move", "gone", "new"))
        if kind == "color":
            color = rng.choice([c for c in COLORS if c != items[index].color])
            items[index] = Item(items[index].cell, items[index].shape, color, items[index].size)
        elif kind == "move":
            old = items[index]
            items[index] = Item(rng.choice(free), old.shape, old.color, old.size)
        elif kind == "gone":
            del items[index]
        elif len(items) < 3:
            items.append(sample_item(rng, rng.choice(free)))
        after = Scene(tuple(sorted(items)), before.sign)
        if after.items and after.split == split and change_of(before, after):
            return before, after


def sample_group(rng: random.Random, split: Split, images: int, *, most: int = 5) -> Group:
    """Draw the images of one prompt; half of the pairs are before and after one change."""
    if images == 2 and rng.random() < 0.5:
        seed = rng.getrandbits(48)
        return Group(sample_change(rng, split), (seed, seed))
    limit = most if images == 1 else min(most, 3)
    share = 0.5 if images == 1 else 0.25
    scenes = tuple(sample_scene(rng, split, most=limit, sign_share=share) for _ in range(images))
    return Group(scenes, tuple(rng.getrandbits(48) for _ in scenes))


def ask(rng: random.Random, group: Group, count: int, *, long_share: float = 0.55) -> list[QA]:
    """``count`` different questions about a group, of kinds with long answers with ``long_share``."""
    scenes = group.scenes
    asked: dict[tuple[str, str], QA] = {}
    while len(asked) < count:
        is_long = rng.random() < long_share
        if len(scenes) == 1:
            qa = rng.choice(LONG if is_long else SHORT)(rng, scenes[0], "")
        elif is_long and rng.random() < 0.75:
            changes = len(scenes) == 2 and change_of(*scenes) is not None and rng.random() < 0.7
            qa = _changed(rng, scenes) if changes else rng.choice(ACROSS)(rng, scenes)
        else:
            index = rng.randrange(len(scenes))
            qa = rng.choice(LONG if is_long else SHORT)(rng, scenes[index], f" in image {index + 1}")
        if qa is not None:
            asked[qa.kind, qa.question] = qa
    return list(asked.values())
