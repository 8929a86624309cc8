"""A subject that moves in a clip, cut out of its frames: what comes of it by hand, among others, and what is made of it."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anabranch.errors import DataError
from anabranch.heads.pvchat import (
    Clip,
    Composer,
    InkEmbedder,
    OneShotSet,
    Portrait,
    Seen,
    cut_out,
    portraits,
    read_clip,
    read_drawing,
    read_reference,
    write_clip,
)
from anabranch.heads.pvchat.clips import ACTIONS
from anabranch.heads.pvchat.cut_out import views_of
from anabranch.heads.pvchat.drawings import ink_of
from drawn_subjects import made_subjects, picture

SUBJECTS = made_subjects(8, 2)
FEW = OneShotSet.Config(positives=6, augmented=4, hard_negatives=2, easy_negatives=2, wordings=1)

# An F, whose level lines lie on themselves when it moves sideways.
LETTER = torch.zeros(18, 14, dtype=torch.bool)
LETTER[:, :3] = LETTER[:3] = LETTER[8:11, :10] = True


def moved(places, *, size=(60, 80), colour=(255, 60, 50), ground=(40, 50, 30), letter=LETTER, beside=()):
    """A clip of a letter with its upper left corner at each of the places; ``beside`` are places of squares that stand or move."""
    frames = []
    for number, (row, column) in enumerate(places):
        frame = torch.tensor(ground, dtype=torch.uint8)[:, None, None].repeat(1, *size)
        for path in beside:
            y, x = path[number % len(path)]
            frame[:, y : y + 12, x : x + 12] = 200
        piece = frame[:, row : row + letter.shape[0], column : column + letter.shape[1]]
        piece[:, letter[: piece.shape[1], : piece.shape[2]]] = torch.tensor(colour, dtype=torch.uint8)[:, None]
        frames.append(frame)
    return Clip(torch.stack(frames))


SIDEWAYS = [(20, 10 + 4 * number) for number in range(8)]


def drawn():
    """The letter as a picture of it is read."""
    paper = torch.ones(40, 40)
    paper[6:24, 6:20][LETTER] = 0
    return ink_of(paper)


@pytest.mark.parametrize(
    "places",
    [
        SIDEWAYS,
        [(4 + 4 * number, 30) for number in range(8)],
        [(5 + 3 * number, 8 + 5 * number) for number in range(8)],
        SIDEWAYS[:2],
    ],
    ids=["sideways", "down", "slanting", "two frames"],
)
def test_what_moves_is_the_drawing_in_every_frame(places):
    found = cut_out(moved(places), "f")
    assert found.subject == "f"
    assert isinstance(found, Seen)
    assert len(found.view_NSS) == len(places)
    for view in found.view_NSS:
        torch.testing.assert_close(view, drawn(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.ink_SS, drawn(), atol=1e-5, rtol=0)


@given(
    row=st.integers(1, 40),
    column=st.integers(1, 20),
    way=st.sampled_from([(0, 5), (0, 3), (2, 4)]),
    count=st.integers(4, 8),
    colour=st.sampled_from([(255, 255, 255), (0, 0, 0), (70, 130, 255)]),
    ground=st.sampled_from([(90, 90, 90), (20, 60, 20)]),
)
def test_wherever_it_goes_in_any_colour(row, column, way, count, colour, ground):
    places = [(row + way[0] * number, column + way[1] * number) for number in range(count)]
    places = [(min(y, 41), min(x, 65)) for y, x in places]
    found = cut_out(moved(places, colour=colour, ground=ground), "f")
    for view in views_of(found):
        torch.testing.assert_close(view.ink_SS, drawn(), atol=1e-5, rtol=0)


DARK_ON_LIGHT = {"colour": (0, 0, 0), "ground": (255, 255, 255)}


@pytest.mark.parametrize(
    "colours", [DARK_ON_LIGHT, {"colour": (255, 255, 255), "ground": (0, 0, 0)}, {}], ids=["dark", "light", "red"]
)
@pytest.mark.parametrize(
    "places",
    [[(5, 5), (30, 50)], [(20, 10), (20, 13)], [(5, 5), (30, 50)] * 2, [(5, 5), (5, 30), (30, 50), (30, 5)]],
    ids=["far", "near", "to and fro", "four"],
)
def test_of_an_even_number_of_frames_neither_dark_nor_light_is_the_background(places, colours):
    """The lower of two in the middle is the darker: it took a dark subject for what is behind it."""
    found = views_of(cut_out(moved(places, **colours), "f"))
    assert len(found) == len(places)
    for view in found:
        torch.testing.assert_close(view.ink_SS, drawn(), atol=1e-5, rtol=0)


@given(
    places=st.lists(st.tuples(st.integers(0, 44), st.integers(0, 68)), min_size=2, max_size=6),
    shades=st.sampled_from([(0, 255), (60, 200), (100, 30), (10, 120)]),
    beside=st.booleans(),
    noise=st.sampled_from([0, 3]),
)
def test_a_clip_and_its_negative_are_cut_out_alike(places, shades, beside, noise):
    """Whatever comes of it; in shades of grey between, so that both fit."""

    def outcome(clip):
        try:
            return [view.ink_SS for view in views_of(cut_out(clip, "f"))]
        except DataError as error:
            return str(error)

    ink, ground = shades
    clip = moved(places, colour=(ink,) * 3, ground=(ground,) * 3, beside=[[(2, 60)]] if beside else ())
    generator = torch.Generator().manual_seed(0)
    drawn_FCHW = torch.randint(-noise, noise + 1, clip.frame_FCHW.shape, generator=generator)
    clip = Clip((clip.frame_FCHW.int() + drawn_FCHW).clamp(0, 255).to(torch.uint8))
    if len(set(places)) == 1:
        # A picture, in which paper is light.
        return
    found, wanted = outcome(Clip(255 - clip.frame_FCHW)), outcome(clip)
    if isinstance(wanted, str):
        assert found == wanted
    else:
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-3, rtol=0)


def test_level_lines_are_not_lost():
    """By what differs from the background alone they would be: the middle of the F's lines is the median there."""
    clip = moved([(20, 20 + number) for number in range(5)])
    away = (clip.frame_FCHW.float() - clip.frame_FCHW.float().median(0).values).abs().amax(1)
    assert float(away[2, 20, 24:30].max()) == 0
    torch.testing.assert_close(cut_out(clip, "f").ink_SS, drawn(), atol=1e-5, rtol=0)


def test_what_stands_still_beside_it_is_left_out():
    clip = moved(SIDEWAYS, beside=[[(2, 60)], [(40, 30)]])
    torch.testing.assert_close(cut_out(clip, "f").ink_SS, drawn(), atol=1e-5, rtol=0)


def test_several_things_that_move_are_refused():
    other = [(47, 60 - 5 * number) for number in range(8)]
    with pytest.raises(
        DataError, match=r"several things move in 8 of 8 frames; give a clip in which the subject alone"
    ):
        cut_out(moved(SIDEWAYS, beside=[other]), "f")
    # Where something else is there for a moment, that frame is left out.
    passing = [(47, 60), *[(47, 90)] * 7]
    found = cut_out(moved(SIDEWAYS, beside=[passing]), "f")
    assert len(found.view_NSS) == 7
    for view in found.view_NSS:
        torch.testing.assert_close(view, drawn(), atol=1e-5, rtol=0)


def test_frames_that_cut_it_off_are_left_out():
    places = [(20, 10), (20, 30), (20, 50), (20, 72), (20, 77)]
    found = cut_out(moved(places), "f")
    assert len(found.view_NSS) == 3
    for view in found.view_NSS:
        torch.testing.assert_close(view, drawn(), atol=1e-5, rtol=0)


def test_a_clip_of_one_frame_and_one_in_which_nothing_moves_are_pictures(tmp_path):
    picture(3, 0).convert("RGB").save(tmp_path / "a.png")
    wanted = read_drawing(tmp_path / "a.png").ink_SS
    clip = read_clip(tmp_path / "a.png")
    noise = torch.randint(-4, 5, (6, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    still = (clip.frame_FCHW.repeat(6, 1, 1, 1).int() + noise).clamp(0, 255).to(torch.uint8)
    still[0] = clip.frame_FCHW[0]
    for each in (clip, Clip(clip.frame_FCHW.repeat(5, 1, 1, 1)), Clip(still)):
        found = cut_out(each, "a")
        assert type(found) is Portrait
        torch.testing.assert_close(found.ink_SS, wanted, atol=0.01, rtol=0)
    with pytest.raises(DataError, match="it shows nothing"):
        cut_out(Clip(torch.full((3, 3, 20, 20), 90, dtype=torch.uint8)), "a")


@pytest.mark.parametrize("ending", ["webp", "gif", "folder"])
def test_files_of_clips_and_of_pictures(tmp_path, ending):
    clip, path = moved(SIDEWAYS), tmp_path / f"cat.{ending}"
    if ending == "folder":
        path.mkdir()
        for number, frame_CHW in enumerate(clip.frame_FCHW):
            Image.fromarray(frame_CHW.permute(1, 2, 0).numpy()).save(path / f"{number}.png")
    else:
        write_clip(path, clip, scale=2)
    found = read_reference(path)
    assert (found.subject, len(views_of(found))) == ("cat.folder" if ending == "folder" else "cat", 8)
    assert (found.ink_SS - drawn()).abs().mean() < 0.06
    assert read_reference(path, "one/b").subject == "one/b"
    # A folder of one picture is that picture.
    picture(3, 0).save(tmp_path / "a.png")
    (tmp_path / "one").mkdir()
    picture(3, 0).save(tmp_path / "one" / "0.png")
    for place in (tmp_path / "a.png", tmp_path / "one"):
        found = read_reference(place)
        assert torch.equal(found.ink_SS, read_drawing(tmp_path / "a.png").ink_SS)
    assert found.subject == "one"


def test_files_that_cannot_be_cut_out_are_named(tmp_path):
    write_clip(tmp_path / "two.webp", moved(SIDEWAYS, beside=[[(47, 60 - 5 * number) for number in range(8)]]), scale=1)
    with pytest.raises(DataError, match=r"two.webp: several things move"):
        read_reference(tmp_path / "two.webp")
    (tmp_path / "no.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"no.gif is no picture"):
        read_reference(tmp_path / "no.gif")


@pytest.mark.parametrize("action", ACTIONS)
def test_subjects_of_composed_clips_are_told_apart(action):
    """Textures, noise, thin coloured lines of a pixel: what is cut out looks most like the drawing that was shown, of all."""
    embedder, composer = InkEmbedder(), Composer()
    drawings = [subject.portrait(0) for subject in SUBJECTS]
    vector_ND = torch.nn.functional.normalize(torch.from_numpy(embedder.embed(drawings)), dim=1)
    right = asked = 0
    generator = torch.Generator().manual_seed(ACTIONS.index(action))
    for number, portrait in enumerate(drawings):
        clip = composer.compose([portrait], generator)
        while clip.actors[0].action != action:
            clip = composer.compose([portrait], generator)
        views = views_of(cut_out(clip, portrait.subject))
        # One that turns is seen upright at first.
        seen = views[:1] if action == "spins" else [cut_out(clip, portrait.subject)]
        found_1D = torch.nn.functional.normalize(torch.from_numpy(embedder.embed(seen)), dim=1)
        right += int((found_1D @ vector_ND.T).argmax()) == number
        asked += 1
    assert right >= asked - 1


# What is made of it


def test_clips_are_made_of_all_that_was_seen():
    seen = cut_out(moved([(5 + 3 * number, 8 + 5 * number) for number in range(3)]), "f")
    views = torch.stack([torch.roll(seen.ink_SS, number, 0) for number in range(3)])
    seen = Seen("f", views[1], views)

    class Told:
        """Keeps what it is given."""

        def __init__(self):
            self.given = []

        def clips(self, references, count, generator):
            self.given.append((list(references), count))
            return [composer.compose([references[number % len(references)]], generator) for number in range(count)]

    composer, positives, augmented = Composer(), Told(), Told()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OneShotSet(FEW, "<F>", seen, portraits(SUBJECTS), positives=positives, augmented=augmented)
    for given_to, count in ((positives.given[0], 6), (augmented.given[0], 4)):
        references, asked = given_to
        assert asked == count
        assert [each.subject for each in references] == ["f"] * 3
        assert all(torch.equal(each.ink_SS, view) for each, view in zip(references, views, strict=True))


def test_one_view_makes_the_set_of_a_picture():
    portrait, bank = SUBJECTS[0].portrait(0), portraits(SUBJECTS)
    alone = Seen(portrait.subject, portrait.ink_SS, portrait.ink_SS[None])
    one, other = (OneShotSet(FEW, "<a>", reference, bank) for reference in (portrait, alone))
    assert one.found == other.found
    for (source, clip), (wanted, theirs) in zip(one.clips, other.clips, strict=True):
        assert source == wanted
        assert torch.equal(clip.frame_FCHW, theirs.frame_FCHW)
