"""Decoded clips against the written pictures: timing, crops, unusable videos, lists."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import numbered, write_video
from PIL import Image

from fastlightgen.data.lists import Row, read_list
from fastlightgen.data.video import Unusable, fit, nearest, read_clip, source_hash, upright

SIZE = [(32, 48)]
LOSSY = 6  # grey levels: the codecs below leave at most 4 on flat pictures


def shown(clip) -> list[int]:
    """The numbers of `numbered`'s pictures that a clip shows."""
    levels = clip.reshape(len(clip), -1).mean(1)
    numbers = np.round((levels - 20) / 10).astype(int)
    assert np.abs(levels - 20 - 10 * numbers).max() < LOSSY / 2
    return numbers.tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov", ".gif"])
def test_pictures_are_those_shown_at_the_times(tmp_path, suffix):
    """20 pictures at 10 per second, read at 4 per second from 0.5 s: times .5 .75 1 1.25 1.5 show 5 7 10 12 15."""
    file = write_video(tmp_path / f"a{suffix}", numbered(20), 10)
    assert shown(read_clip(Row("a", file, "x", start=0.5), 4, 5, SIZE)) == [5, 7, 10, 12, 15]
    assert shown(read_clip(Row("a", file, "x"), 10, 17, SIZE)) == list(range(17))  # the same rate: every picture once
    assert shown(read_clip(Row("a", file, "x"), 25, 5, SIZE)) == [0, 0, 0, 1, 1]  # a faster rate repeats


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_a_rate_that_its_clock_cannot_hold(tmp_path, suffix):
    """Time stamps in whole milliseconds at 16 and 24 pictures per second: every picture is still shown once."""
    for fps in (16, 24):
        file = write_video(tmp_path / f"{fps}{suffix}", numbered(21), fps)
        assert shown(read_clip(Row("a", file, "x"), fps, 21, SIZE)) == list(range(21))


def test_a_late_start_seeks_to_the_right_picture(tmp_path):
    """With a key picture every 7 pictures, a seek lands before the start; the pictures between are not shown."""
    file = write_video(tmp_path / "a.mp4", numbered(23), 5, options={"g": "7"})
    for start in (1.2, 2.0, 3.4):
        clip = read_clip(Row("a", file, "x", start=start), 5, 5, SIZE)
        assert shown(clip) == [round(start * 5) + k for k in range(5)]


def test_uneven_time_stamps(tmp_path):
    """Pictures at 0, .1, .6, .7 s: a player shows picture 1 from .1 to .6 s."""
    file = write_video(tmp_path / "a.mkv", numbered(4), 10, stamps=[0, 1, 6, 7])
    assert shown(read_clip(Row("a", file, "x"), 10, 5, SIZE)) == [0, 1, 1, 1, 1]
    assert shown(read_clip(Row("a", file, "x", start=0.5), 10, 3, SIZE)) == [1, 2, 3]


def test_time_counts_from_the_first_picture(tmp_path):
    file = write_video(tmp_path / "a.mkv", numbered(6), 10, stamps=range(30, 36))
    assert shown(read_clip(Row("a", file, "x", start=0.2), 10, 4, SIZE)) == [2, 3, 4, 5]


def test_moving_edge(tmp_path):
    """An edge that moves 4 pixels per picture moves 8 pixels when read at half the rate, to a pixel."""
    film = np.zeros((12, 32, 64, 3), np.uint8)
    for k in range(12):
        film[k, :, 8 + 4 * k :] = 255
    file = write_video(tmp_path / "a.mp4", film, 12)
    clip = read_clip(Row("a", file, "x"), 6, 5, [(32, 64)])
    edges = (clip[:, 16, :, 0] < 128).sum(1)
    assert np.abs(edges - (8 + 8 * np.arange(5))).max() <= 1


def test_a_folder_of_pictures_is_exact(tmp_path):
    film = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    (tmp_path / "a").mkdir()
    for k, picture in enumerate(film):
        Image.fromarray(picture).save(tmp_path / "a" / f"{k:03d}.png")
    assert np.array_equal(read_clip(Row("a", tmp_path / "a", "x"), 16, 5, SIZE), film[:5])
    assert np.array_equal(read_clip(Row("a", tmp_path / "a", "x", start=1 / 16), 16, 5, SIZE), film[1:])
    (tmp_path / "a" / "002.png").write_bytes(b"no picture")
    with pytest.raises(Unusable, match="002.png: is no picture; wanted PNG, JPEG, WEBP, BMP"):
        read_clip(Row("a", tmp_path / "a", "x"), 16, 5, SIZE)


def test_what_is_too_short_or_broken(tmp_path):
    file = write_video(tmp_path / "a.mp4", numbered(20), 10)
    with pytest.raises(Unusable, match=r"too short: 1.00 s from 1 s on, wanted 1.70 s \(17 frames\)"):
        read_clip(Row("a", file, "x", start=1), 10, 17, SIZE)
    with pytest.raises(Unusable, match="too short: 0.50 s"):
        read_clip(Row("a", file, "x", end=0.5), 10, 9, SIZE)
    assert shown(read_clip(Row("a", file, "x", start=0.2, end=0.7), 10, 5, SIZE)) == [2, 3, 4, 5, 6]
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(file.read_bytes()[:600])
    for name in ("text.mp4", "cut.mp4", "absent.mp4"):
        with pytest.raises(Unusable, match="cannot be decoded"):
            read_clip(Row("a", tmp_path / name, "x"), 10, 5, SIZE)
    with pytest.raises(Unusable, match="given up"):
        read_clip(Row("a", file, "x", problem="given up"), 10, 5, SIZE)


def test_buckets():
    assert nearest(1080, 1920, [(480, 832), (832, 480)]) == (480, 832)
    assert nearest(1920, 1080, [(480, 832), (832, 480)]) == (832, 480)
    assert nearest(100, 100, [(480, 832), (832, 480), (624, 624)]) == (624, 624)
    assert nearest(100, 100, [(480, 832), (832, 480)]) == (480, 832)  # equally near: the first one


def test_crop_is_centred_and_keeps_its_shape():
    """A 100 x 300 picture in a 50 x 50 bucket: columns 100..199 remain; a linear ramp stays linear to a grey level."""
    ramp = np.broadcast_to((np.arange(300) * 0.8)[None, :, None], (100, 300, 3)).astype(np.uint8)
    out = fit(ramp, (50, 50))
    wanted = (100 + 2 * np.arange(50) + 0.5) * 0.8  # the mean of two columns
    assert out.shape == (50, 50, 3)
    assert np.abs(out[25, 2:-2, 0] - wanted[2:-2]).max() <= 1.5
    tall = np.broadcast_to((np.arange(300) * 0.8)[:, None, None], (300, 100, 3)).astype(np.uint8)
    assert np.array_equal(fit(tall, (50, 50)), out.transpose(1, 0, 2))
    # pixels twice as wide as high: a picture of 100 x 150 is shown as 100 x 300
    wide = np.broadcast_to((np.arange(150) * 1.6)[None, :, None], (100, 150, 3)).astype(np.uint8)
    assert np.abs(fit(wide, (50, 50), aspect=2.0)[25, 2:-2, 0].astype(int) - out[25, 2:-2, 0]).max() <= 2


def test_a_turned_picture_is_put_upright():
    class Frame:
        def to_ndarray(self, format):
            assert format == "rgb24"
            return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    plain = Frame().to_ndarray("rgb24")
    assert np.array_equal(upright(Frame(), 0), plain)
    assert np.array_equal(upright(Frame(), 1)[::-1, 0], plain[0])  # counter-clockwise: top row to left column


def test_source_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    (tmp_path / "c").write_bytes(b"2")
    a, b, c = (source_hash(tmp_path / name) for name in "abc")
    assert a == b == "6b86b273ff34fce1" != c  # sha256 of "1"


def rows(path: Path, min_dover: float = 80) -> list[tuple]:
    return [(r.name, r.caption, r.start, r.end, r.problem) for r in read_list(path, min_dover)]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("a.mp4", "b.gif"):
        (tmp_path / "v" / name).write_bytes(b"")
    return tmp_path


def test_csv(files):
    (files / "list.csv").write_text(
        'file,caption,start,end,dover,other\nv/a.mp4,"a cat, running",1.5,3,90,x\nv/b.gif,a dog,,,79.5,y\n'
        "v/c.mp4,gone,,,,\nv/a.mp4,,,,,\nv/a.mp4,late,2,1,,\nv/a.mp4,odd,soon,,,\nv/a.mp4,odd,nan,,,\nv,empty,,,,\n"
    )
    assert rows(files / "list.csv") == [
        ("v/a.mp4", "a cat, running", 1.5, 3.0, ""),
        ("v/b.gif", "a dog", 0.0, None, "dover=79.5 is below min_dover=80"),
        ("v/c.mp4", "gone", 0.0, None, "not found"),
        ("v/a.mp4", "", 0.0, None, "no caption"),
        ("v/a.mp4", "late", 2.0, 1.0, "start=2, end=1.0: wanted 0 <= start < end"),
        ("v/a.mp4", "odd", 0.0, None, "start='soon' is not a number"),
        ("v/a.mp4", "odd", 0.0, None, "start='nan' is not a finite number of at most 100,000,000"),
        ("v", "empty", 0.0, None, "a folder without pictures"),
    ]
    assert read_list(files / "list.csv", 79)[1].problem == ""


def test_json_lines(files):
    lines = [{"file": "v/a.mp4", "caption": "ä", "end": 2}, {"file": str(files / "v" / "b.gif"), "caption": "b"}]
    (files / "list.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    assert rows(files / "list.jsonl") == [
        ("v/a.mp4", "ä", 0.0, 2.0, ""),
        (str(files / "v" / "b.gif"), "b", 0.0, None, ""),
    ]


def test_a_folder_with_captions(files):
    (files / "v" / "a.txt").write_text("a cat\n")
    (files / "v" / "c").mkdir()
    Image.new("RGB", (4, 4)).save(files / "v" / "c" / "0.png")
    (files / "v" / "c.txt").write_text("a fox")
    (files / "v" / "notes.md").write_text("not a video")
    assert rows(files / "v") == [
        ("a.mp4", "a cat", 0.0, None, ""),
        ("b.gif", "", 0.0, None, "no caption: b.txt is missing or empty"),
        ("c", "a fox", 0.0, None, ""),
    ]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("l.csv", "file,text\na,b\n", "l.csv: has no column 'caption'; wanted file, caption"),
        ("l.csv", "file,caption\n", "l.csv: lists no clips; wanted one line per clip"),
        ("l.jsonl", '{"file": 3\n', "l.jsonl, line 1: cannot be read as JSON"),
        ("l.jsonl", '{"file": "a"}\n', "l.jsonl: line 1 is not an object like"),
        ("l.txt", "a", "l.txt: neither a folder nor a .csv or .jsonl file"),
        ("absent", None, "absent: there is no such folder; wanted one, or a .csv or .jsonl file"),
        ("absent.csv", None, "absent.csv: not found"),
    ],
)
def test_a_bad_list_is_named(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_list(tmp_path / name, 80)


def test_helpers_write_what_they_say(tmp_path):
    """The videos of these tests: 10 pictures at 5 per second last 2 s."""
    import av

    with av.open(str(write_video(tmp_path / "a.mp4", numbered(10), 5))) as container:
        assert container.duration == 2_000_000 and container.streams.video[0].average_rate == Fraction(5)
