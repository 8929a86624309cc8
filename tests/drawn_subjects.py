"""Drawings that tests make: lines through a few points, each subject drawn several times by unsteady hands."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from anabranch.heads.pvchat import Subject
from anabranch.heads.pvchat.drawings import ink_of


def picture(number, hand, side=64, points=5):
    """Of a subject: black on white."""
    shape = random.Random(number)
    unsteady = random.Random(f"{number} {hand}")
    line = [(shape.randint(6, side - 6), shape.randint(6, side - 6)) for _ in range(points)]
    line = [(x + unsteady.randint(-2, 2), y + unsteady.randint(-2, 2)) for x, y in line]
    made = Image.new("L", (side, side), 255)
    ImageDraw.Draw(made).line(line, fill=0, width=3)
    return made


def write_drawings(folder, groups=("one", "two"), subjects=4, hands=3):
    """A folder of them: one/a/0.png."""
    for place, group in enumerate(groups):
        for number in range(subjects):
            where = Path(folder) / group / "abcdefgh"[number]
            where.mkdir(parents=True, exist_ok=True)
            for hand in range(hands):
                picture(place * subjects + number, hand).save(where / f"{hand}.png")
    return Path(folder)


def made_subjects(count=6, hands=3):
    """The same without files: s0, s1, ..."""
    found = []
    for number in range(count):
        pictures = [torch.from_numpy(np.array(picture(number, hand))) / 255 for hand in range(hands)]
        found.append(Subject(f"s{number}", torch.stack([ink_of(each) for each in pictures])))
    return found


def write_runs(place, runs=2, ways=3):
    """A folder as Omniglot's: the tests of a run are its subjects in another order."""
    for run in range(runs):
        folder = place / f"run{run + 1:02}"
        (folder / "training").mkdir(parents=True)
        (folder / "test").mkdir()
        lines = []
        for number in range(ways):
            answer = (number + 1 + run) % ways
            picture(100 * run + number, 0).save(folder / f"training/class{number + 1:02}.png")
            picture(100 * run + answer, 1).save(folder / f"test/item{number + 1:02}.png")
            lines.append(f"{folder.name}/test/item{number + 1:02}.png {folder.name}/training/class{answer + 1:02}.png")
        (folder / "class_labels.txt").write_text("\n".join(lines) + "\n")
    return place
