"""Drawings that are read, clips that are composed of them, and what is said about both."""

import zipfile

import pytest
import torch
from PIL import Image

from anabranch.errors import ConfigError, DataError
from anabranch.heads.pvchat import (
    Clip,
    Composed,
    Composer,
    InkEmbedder,
    Portrait,
    Warped,
    fitted,
    nearest,
    portraits,
    read_clip,
    read_drawing,
    read_drawings,
    write_clip,
)
from anabranch.heads.pvchat.clips import ACTIONS, COLOURS, PLACES, STROKES, _Part, _placed
from anabranch.heads.pvchat.drawings import SIDE, evenly, ink_of
from anabranch.heads.pvchat.generators import warped
from anabranch.places import data_folder
from drawn_subjects import made_subjects, picture, write_drawings
from real_data import needs_data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Drawings


def test_a_folder_and_a_zip_of_it_are_the_same(tmp_path):
    folder = write_drawings(tmp_path / "d")
    (folder / "one" / "a" / "notes.txt").write_text("no picture")
    (folder / "one" / ".hidden").mkdir()
    picture(9, 9).save(folder / "one" / ".hidden" / "0.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as held:
        for path in folder.rglob("*"):
            held.write(path, f"packed/{path.relative_to(folder)}")
    found, packed = read_drawings(folder), read_drawings(tmp_path / "d.zip")
    assert [each.name for each in found] == [f"{group}/{name}" for group in ("one", "two") for name in "abcd"]
    assert [each.name for each in packed] == [each.name for each in found]
    for one, other in zip(found, packed, strict=True):
        assert one.ink_NSS.shape == (3, SIDE, SIDE)
        assert torch.equal(one.ink_NSS, other.ink_NSS)
    assert {each.group for each in read_drawings(folder, groups=["two"])} == {"two"}
    assert {len(each.ink_NSS) for each in read_drawings(folder, most=2)} == {2}


def test_one_group_keeps_its_name(tmp_path):
    folder = write_drawings(tmp_path / "d", groups=("one",))
    assert [each.name for each in read_drawings(folder)] == ["one/a", "one/b", "one/c", "one/d"]


def test_ink_by_hand():
    paper = torch.ones(40, 50)
    paper[10:20, 15:17] = 0.4
    ink = ink_of(paper)
    assert ink.shape == (SIDE, SIDE)
    assert set(ink.unique().tolist()) == {0.0, 1.0}
    rows, columns = ink.nonzero().unbind(1)
    # A line of 10 by 2 stays five times as high as it is wide, in the middle, inside of the border.
    assert (int(rows.min()), int(rows.max())) == (3, SIDE - 4)
    assert 4 <= int(columns.max() - columns.min()) + 1 <= 8
    # White on black, and grey on grey, are the same drawing.
    assert torch.equal(ink_of(1 - paper), ink)
    assert torch.equal(ink_of(0.3 * paper), ink)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "L"])
def test_pictures_of_every_kind(tmp_path, mode):
    picture(1, 1).convert(mode).save(tmp_path / "a.png")
    found = read_drawing(tmp_path / "a.png")
    assert found.subject == "a"
    assert torch.equal(found.ink_SS, made_subjects(2, 2)[1].ink_NSS[1])


def test_what_is_transparent_is_paper(tmp_path):
    drawn = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    drawn.paste((0, 0, 0, 255), (10, 5, 14, 25))
    drawn.save(tmp_path / "a.png")
    assert read_drawing(tmp_path / "a.png").ink_SS.mean() > 0.05


def test_drawings_that_are_none(tmp_path):
    def refused(match, **given):
        with pytest.raises(DataError, match=match):
            read_drawings(tmp_path / "d", **given)

    refused("there is no .*d; name a folder")
    (tmp_path / "d").mkdir()
    refused("has no folder; put the drawings of each subject")
    picture(1, 1).save(tmp_path / "d" / "alone.png")
    refused("has no folder")
    write_drawings(tmp_path / "d")
    refused("has no group 'three'; it has one, two", groups=["three"])
    refused("no folder of at least 9 pictures", least=9)
    (tmp_path / "d" / "one" / "a" / "9.png").write_bytes(b"no picture")
    refused("one/a/9.png is no picture that can be read: it is in none of the formats that are known$")
    Image.new("L", (20, 20), 200).save(tmp_path / "d" / "one" / "a" / "9.png")
    refused("one/a/9.png: it shows nothing")
    (tmp_path / "d.zip").write_bytes(b"PK\x03\x04" + b"x" * 60)
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        read_drawings(tmp_path / "d.zip")
    for wrong, match in ((tmp_path, "is no file"), (tmp_path / "no.png", "cannot read")):
        with pytest.raises(DataError, match=match):
            read_drawing(wrong)
    with pytest.raises(DataError, match="has drawings 0 to 2, not 3"):
        made_subjects(1)[0].portrait(3)


def test_a_zip_that_is_damaged_inside(tmp_path):
    folder = write_drawings(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as held:
        for path in sorted(folder.rglob("*.png")):
            held.write(path, path.relative_to(folder))
    data = bytearray((tmp_path / "d.zip").read_bytes())
    data[60:90] = b"\xff" * 30
    (tmp_path / "d.zip").write_bytes(data)
    with pytest.raises(DataError):
        read_drawings(tmp_path / "d.zip")


def test_evenly():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(9, 3) == [0, 4, 8]
    assert evenly(9, 1) == [0]


@needs_data("images/omniglot_background_small1.zip")
def test_omniglot_is_read_as_it_is():
    found = read_drawings(data_folder() / "images/omniglot_background_small1.zip", groups=["Balinese"])
    assert [found[0].name, len(found), len(found[0].ink_NSS)] == ["Balinese/character01", 24, 20]


# Clips


def test_a_clip_says_what_it_shows():
    cast = portraits(made_subjects(3, 1))
    clip = Composer().compose(cast, seeded())
    assert clip.frame_FCHW.shape == (8, 3, 48, 48)
    assert [actor.subject for actor in clip.actors] == ["s0", "s1", "s2"]
    assert len({actor.place for actor in clip.actors}) == 3
    for actor in clip.actors:
        colour, _, stroke = actor.appearance.split()
        assert colour in COLOURS
        assert stroke in STROKES
        assert actor.action in ACTIONS
    again = Composer().compose(cast, seeded())
    assert torch.equal(again.frame_FCHW, clip.frame_FCHW)
    assert again.actors == clip.actors
    assert not torch.equal(Composer().compose(cast, seeded(1)).frame_FCHW, clip.frame_FCHW)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_said_can_be_seen(seed):
    """The bright pixels of a lone actor lie in its quadrant, have its colour, and move as it is said."""
    clip = Composer(Composer.Config(noise=0.0)).compose(portraits(made_subjects(1, 1)), seeded(seed))
    (actor,) = clip.actors
    frame = clip.frame_FCHW.float() / 255
    bright = frame.amax(1) > 0.6
    assert bool(bright.flatten(1).any(1).all())
    middles = [torch.stack([part.float().mean() for part in each.nonzero().unbind(1)]) for each in bright]
    column, row = PLACES[actor.place]
    mean_y, mean_x = torch.stack(middles).mean(0)
    assert (mean_x > 24) == (column > 0)
    assert (mean_y > 24) == (row > 0)
    dy, dx = (middles[-1] - middles[0]).tolist()
    moved = {
        "moves left": dx < -5,
        "moves right": dx > 5,
        "moves up": dy < -5,
        "moves down": dy > 5,
        "spins": abs(dx) < 8 and abs(dy) < 8,
        "grows": float(bright[-1].sum()) > 1.5 * float(bright[0].sum()),
    }
    assert moved[actor.action]
    colour = torch.stack([frame[:, channel][bright].mean() for channel in range(3)])
    nearest_colour = min(COLOURS, key=lambda name: float((colour - torch.tensor(COLOURS[name])).norm()))
    assert nearest_colour == actor.appearance.split()[0]


def test_places_by_hand():
    part = _Part(torch.zeros(SIDE, SIDE), "red", "thin", "moves right", "bottom left")
    theta = _placed(part, 3)
    # The middle of the drawing lies where the map gives zero.
    for number, x in enumerate((-0.7, -0.5, -0.3)):
        seen = theta[number] @ torch.tensor([x, 0.5, 1.0])
        assert seen.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_an_image_is_a_clip_of_one_frame():
    clip = Composer(Composer.Config(frames=1)).compose(portraits(made_subjects(1, 1)), seeded())
    assert clip.is_image
    assert clip.actors[0].action is None
    longer = Composer().compose(portraits(made_subjects(1, 1)), seeded())
    first = longer.first_frame()
    assert first.is_image
    assert (first.actors[0].action, first.actors[0].place) == (None, longer.actors[0].place)


def test_clips_that_are_none():
    for wrong in (
        torch.zeros(2, 3, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
    ):
        with pytest.raises(DataError, match="must be uint8"):
            Clip(wrong)
    with pytest.raises(DataError, match="is empty"):
        Clip(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ConfigError, match="1 to 4 subjects, not 0"):
        Composer().compose([], seeded())


def test_any_clip_is_fitted():
    clip = Clip(torch.randint(256, (20, 3, 50, 70), dtype=torch.uint8))
    made = fitted(clip, 8, 48)
    assert (made.shape, made.dtype) == ((8, 3, 48, 48), torch.uint8)
    same = Clip(torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8))
    assert torch.equal(fitted(same, 8, 48), same.frame_FCHW)
    flat = Clip(torch.full((1, 3, 96, 96), 77, dtype=torch.uint8))
    assert fitted(flat, 8, 48).unique().tolist() == [77]


def test_clips_are_written_and_read(tmp_path):
    clip = Composer().compose(portraits(made_subjects(2, 1)), seeded())
    write_clip(tmp_path / "a.webp", clip, scale=1)
    assert torch.equal(read_clip(tmp_path / "a.webp").frame_FCHW, clip.frame_FCHW)
    write_clip(tmp_path / "a.gif", clip)
    found = read_clip(tmp_path / "a.gif")
    assert found.frame_FCHW.shape == (8, 3, 192, 192)
    near = fitted(found, 8, 48).float() - clip.frame_FCHW.float()
    assert float(near.abs().mean()) < 12  # a palette of 256 colours
    assert len(read_clip(tmp_path / "a.gif", most_frames=3).frame_FCHW) == 3
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(clip.frame_FCHW):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{number}.png")
    assert torch.equal(read_clip(tmp_path / "frames").frame_FCHW, clip.frame_FCHW)
    Image.new("RGB", (5, 5)).save(tmp_path / "frames" / "9.png")
    for wrong, match in ((tmp_path / "frames", "have sizes"), (tmp_path / "no", "cannot read")):
        with pytest.raises(DataError, match=match):
            read_clip(wrong)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no frames"):
        read_clip(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"written as \.gif or \.webp"):
        write_clip(tmp_path / "a.mp4", clip)


# Generators


def test_others_are_never_the_subject():
    subjects = made_subjects(3, 2)
    made = Composed(Composer(), portraits(subjects)).clips([subjects[0].portrait(0)], 40, seeded())
    casts = [[actor.subject for actor in clip.actors] for clip in made]
    assert all(cast[0] == "s0" and cast.count("s0") == 1 and len(set(cast)) == len(cast) for cast in casts)
    assert {len(cast) for cast in casts} == {1, 2, 3}


def test_another_hand_keeps_what_is_drawn():
    """A drawing bent a little is nearer to itself than to any other."""
    subjects = made_subjects(8, 1)
    bank = portraits(subjects)
    for number, portrait in enumerate(bank):
        drawn = Portrait("x", warped(portrait.ink_SS, seeded(number)))
        assert not torch.equal(drawn.ink_SS, portrait.ink_SS)
        assert float(drawn.ink_SS.max()) > 0.5
        assert nearest(InkEmbedder(), drawn, bank, 1)[0][0] == number
    same = warped(bank[0].ink_SS, seeded(), strength=0.0)
    assert torch.equal(same > 0.5, bank[0].ink_SS > 0.5)


def test_warped_clips_show_the_subject():
    clips = Warped(Composed()).clips(portraits(made_subjects(2, 1)), 3, seeded())
    assert [clip.actors[0].subject for clip in clips] == ["s0", "s1", "s0"]


def test_nearest_is_what_a_plain_search_finds():
    bank = portraits(made_subjects(12, 4))
    rows = InkEmbedder().embed(bank)
    rows = rows / (rows**2).sum(1, keepdims=True) ** 0.5
    for number in (0, 13, 40):
        found = nearest(InkEmbedder(), bank[number], bank, 5)
        order = (-(rows @ rows[number])).argsort()[:5]
        assert [row for row, _ in found] == order.tolist()
        assert [cosine for _, cosine in found] == pytest.approx((rows @ rows[number])[order].tolist(), abs=1e-5)
    assert nearest(InkEmbedder(), bank[0], [], 5) == []
