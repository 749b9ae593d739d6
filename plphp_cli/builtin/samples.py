"""Draw the sample images and their prompts: ``python -m plphp_cli.builtin.samples --out sample_images``.

All scenes are held out of training. ``prompts.jsonl`` has one prompt a line with its expected answer.
"""

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from plphp_cli.builtin.questions import QA, Group, ask, sample_change
from plphp_cli.builtin.scenes import Scene, render, sample_scene

SEED = 7
SIDE = 384
# EXIF orientation 6: the file must be turned right by 90 degrees to be seen upright.
_TURN_RIGHT = 6

QUESTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("shapes.png",), ("caption", "enumerate", "count", "color")),
    (("sign.png",), ("caption", "sign", "read", "where")),
    (("signpost.png",), ("caption", "read", "sign color")),
    (("wide.png",), ("enumerate", "shape", "count some")),
    (("turned.jpg",), ("caption", "exists", "size")),
    (("before.png", "after.png"), ("changed", "compare", "count each")),
    (("set-1.png", "set-2.png", "set-3.png"), ("which", "compare", "count each", "count", "color")),
)
"""Per set of images the kinds of question asked about it."""


@dataclass(frozen=True)
class Sample:
    """A scene and the file that shows it; ``size`` is width and height in pixels."""

    name: str
    scene: Scene
    size: tuple[int, int] = (SIDE, SIDE)
    seed: int = SEED


def samples(rng: random.Random) -> list[Sample]:
    """The sample scenes."""

    def held_out(least: int, most: int, sign_share: float) -> Scene:
        return sample_scene(rng, "held-out", least=least, most=most, sign_share=sign_share)

    before, after = sample_change(rng, "held-out")
    return [
        Sample("shapes.png", held_out(4, 5, 0)),
        Sample("sign.png", held_out(3, 4, 1), seed=SEED + 4),
        Sample("signpost.png", held_out(1, 2, 1), seed=SEED + 5),
        Sample("before.png", before),
        Sample("after.png", after),
        *(Sample(f"set-{n}.png", held_out(2, 3, 0.3), seed=SEED + n) for n in (1, 2, 3)),
        Sample("wide.png", held_out(3, 4, 0), size=(560, 420), seed=SEED + 6),
        Sample("turned.jpg", held_out(3, 4, 0.5), seed=SEED + 9),
    ]


def questions_about(rng: random.Random, group: Group, kinds: tuple[str, ...]) -> list[QA] | None:
    """One question of each kind about a group, the shortest that came up; None when a kind did not."""
    found: dict[str, QA] = {}
    for _ in range(50):
        for qa in ask(rng, group, 4):
            if len(qa.question) < len(found.get(qa.kind, qa).question) or qa.kind not in found:
                found[qa.kind] = qa
    return [found[kind] for kind in kinds] if set(kinds) <= found.keys() else None


def draw(seed: int) -> tuple[list[Sample], list[tuple[tuple[str, ...], QA]]] | None:
    """Scenes and questions of one seed; None when its scenes do not allow every question."""
    rng = random.Random(seed)
    chosen = samples(rng)
    by_name = {sample.name: sample for sample in chosen}
    asked = []
    for names, kinds in QUESTIONS:
        shown = [by_name[name] for name in names]
        group = Group(tuple(s.scene for s in shown), tuple(s.seed for s in shown))
        found = questions_about(rng, group, kinds)
        if found is None:
            return None
        asked += [(names, qa) for qa in found]
    return chosen, asked


def save(sample: Sample, folder: Path) -> None:
    """Render a sample; a ``.jpg`` is stored lying on its side, with the EXIF mark that says so."""
    image, _ = render(sample.scene, sample.seed, width=sample.size[0], height=sample.size[1])
    if sample.name.endswith(".jpg"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = _TURN_RIGHT
        image.transpose(Image.Transpose.ROTATE_90).save(folder / sample.name, exif=exif, quality=92)
    else:
        image.save(folder / sample.name, optimize=True)


def main() -> None:
    """Draw the samples from the command line."""
    parser = argparse.ArgumentParser(prog="python -m plphp_cli.builtin.samples", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    chosen, asked = next(drawn for seed in itertools.count(SEED) if (drawn := draw(seed)))
    for sample in chosen:
        save(sample, folder)
    rows = [{"images": list(names), "prompt": qa.question, "answer": qa.answer} for names, qa in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
