"""docs/play in a browser, from a plain file server: its clips against Python's, its sentences, its parts by name."""

import functools
import json
import shutil
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import PROGRAM, Browser
from helpers import small_wan
from play import PAGE, maker

from fastlightgen.config import SHAPES_PROMPT
from fastlightgen.flow import ladder
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import load_model, trained_folder
from fastlightgen.models.sample import sample
from fastlightgen.world import captions
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.shapes import WORLD

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")

STEPS, WAIT = 3, 300  # steps of the student; seconds
CHECKS = Path(__file__).with_name("page_checks.js").read_text()
AFTER = "[...document.querySelectorAll('.{} .steps button')]"
# Whether the frame is the same one for three times as long as a frame is shown.
STANDS = """new Promise((done) => {
  const frame = document.querySelector("#frame"), before = frame.value;
  setTimeout(() => done(frame.value === before), 500);
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def student() -> VideoDiT:
    """One block with weights large enough that all parts of the network show in a clip."""
    torch.manual_seed(1)
    model = small_wan(1).requires_grad_(False).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(scope="module")
def site(student, tmp_path_factory):
    """The page with this student and the shipped teacher, on a server."""
    folder = tmp_path_factory.mktemp("site") / "play"
    shutil.copytree(PAGE, folder)
    make, card = maker(), {"ladder": ladder(STEPS, 3.0), "shift": 3.0, "guidance": 1.0, "sampler": "stochastic"}
    page = json.loads((folder / "play.json").read_text())
    teacher = load_model(trained_folder("tiny")).eval()
    made = make.describe(student, card | {"world": WORLD}, teacher, {"steps": 50, "shift": 3.0, "guidance": 2.0})
    made["ways"]["teacher"]["sampler"] = "ode"  # so that both samplers are compared
    (folder / "play.json").write_text(json.dumps(made | {"bytes": page["bytes"]}))
    make.pack(student, make.example(student, made), folder / "student.net.gz")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def wait(browser: Browser, condition: str) -> None:
    end = time.monotonic() + WAIT
    while not browser.run(condition):
        assert time.monotonic() < end, (condition, browser.run("document.querySelector('#status').textContent"))
        time.sleep(0.2)


def finished(way: str) -> str:
    return f"/^[\\d.]+ s$/.test(document.querySelector('.{way} .time')?.textContent)"


@pytest.fixture(scope="module")
def ready(browser, site):
    """The page when its first clips are made."""
    browser.errors.clear()
    browser.open(site, 1440)
    wait(browser, finished("student") + " && " + finished("teacher"))
    return browser


def press(browser: Browser, key: str, code: int) -> None:
    text = {"text": {"Enter": "\r"}.get(key, key)} if key != "Tab" else {}
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)


def write(browser: Browser, prompt: str, seed: int) -> None:
    """Type a sentence and press Enter, as a user does."""
    browser.run(f"document.querySelector('#seed').value = {seed}")
    browser.run("document.querySelector('#prompt').select(); document.querySelector('#prompt').focus()")
    browser.call("Input.insertText", text=prompt)
    press(browser, "Enter", 13)


def film(browser: Browser, way: str) -> np.ndarray:
    """What the large picture of a card shows, frame by frame: [frame, row, column, colour]."""
    shots = browser.run(
        """[...Array(8).keys()].map((i) => {
          const slider = document.querySelector("#frame"), canvas = document.querySelector(".WAY .clip");
          slider.value = i + 1;
          slider.oninput();
          return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        })""".replace("WAY", way)
    )
    return np.array(shots).reshape(8, 20, 20, 4)[..., :3]


def noises(browser: Browser, seed: int, count: int) -> list[torch.Tensor]:
    drawn = browser.run(
        f"import('./world.js').then(({{ noise }}) => {{ const all = noise({seed}, 9600); "
        f"return Array.from({{ length: {count} }}, () => [...all.next().value]); }})"
    )
    return [torch.tensor(one).view(1, 12, 8, 10, 10) for one in drawn]


def of_python(model: VideoDiT, prompt: str, drawn: list, guidance: float, kind: str, monkeypatch) -> np.ndarray:
    """The clip of the package's sampler from this noise."""
    world = BuiltIn()
    world.scale = 1
    wish, fresh = world.wish(prompt, None, "", 1), iter(drawn[1:])
    monkeypatch.setattr("fastlightgen.models.sample.normal_like", lambda *_: next(fresh))
    x0 = sample(model, wish.cond, wish.null, drawn[0], ladder(STEPS, 3.0), guidance, kind)
    return world.frames(x0)[0].astype(int)


def test_clips_move_until_they_are_paused(ready):
    frame = "document.querySelector('#frame').value"
    shown = ready.run(frame)
    wait(ready, f"{frame} !== '{shown}'")
    ready.run("document.querySelector('#play').click()")
    assert ready.run(STANDS)


def test_a_sentence_becomes_the_clip_of_python(ready, student, monkeypatch):
    """Within 2 levels of 255; the page rounds the student's matrices to 9 bits, and the teacher's have 7."""
    prompt, seed = "a cyan cross moves up slowly then turns left with a red ball", 123456
    write(ready, prompt, seed)
    wait(ready, finished("student") + " && " + finished("teacher"))
    drawn = noises(ready, seed, STEPS)
    teacher = load_model(trained_folder("tiny")).eval()
    for way, model, guidance, kind in (("student", student, 1.0, "stochastic"), ("teacher", teacher, 2.0, "ode")):
        found, wanted = film(ready, way), of_python(model, prompt, drawn, guidance, kind, monkeypatch)
        assert wanted.std() > 5
        assert np.abs(found - wanted).max() <= 2, way


def test_each_step_can_be_seen(ready):
    """The estimate after each step, the last one first; a choice of a step stays until the next clip."""
    last = film(ready, "teacher")
    for step in range(STEPS):
        ready.run(f"{AFTER.format('teacher')}[{step}].click()")
        pressed = ready.run(f"{AFTER.format('teacher')}.map((b) => b.ariaPressed)")
        assert pressed == [str(i == step).lower() for i in range(STEPS)]
        shown = film(ready, "teacher")
        assert (np.abs(shown - last).max() == 0) == (step == STEPS - 1)


def test_an_unknown_word_is_answered(ready):
    before = film(ready, "student")
    write(ready, "a pink dragon sleeps", 1)
    said = ready.run("document.querySelector('#hint').textContent")
    assert said.startswith("This small world has no word “pink”. It knows a, moves, then, goes, on, stops, turns,")
    assert ready.run("document.querySelector('#prompt').ariaInvalid") == "true"
    assert np.array_equal(film(ready, "student"), before)
    write(ready, "a " * 16, 1)
    assert "That is 16 words; this world reads 15 at most." in ready.run("document.querySelector('#hint').textContent")


def test_sentences_are_those_of_the_package(ready):
    """Tokens of words and lengths, and each caption of the grammar, both ways."""
    texts = ["", "red", SHAPES_PROMPT, "a red ball moves right fast then turns up with a blue cross", "up " * 15]
    page = ready.run("fetch('play.json').then((r) => r.json())")
    world, choices = json.dumps(page["world"]), json.dumps(page["choices"])
    call = "import('./world.js').then((w) => {})"
    found = ready.run(call.format(f"{json.dumps(texts)}.map((text) => [...w.encode(text, {world})])"))
    assert np.array_equal(np.array(found).reshape(-1, captions.TOKENS, captions.TEXT_DIM), captions.tokenise(texts)[0])

    stated = [
        (colour, kind, direction, speed, change, other)
        for colour, kind, direction, speed in ((0, 0, 0, 0), (5, 2, 1, 1), (3, 1, 2, 0), (1, 1, 3, 1))
        for change in range(len(captions.CHANGES))
        for other in (None, (2, 1))
    ]
    wanted = [captions.caption(*one) for one in stated]
    parsed = ready.run(call.format(f"{json.dumps(wanted)}.map((text) => w.parse(text, {choices}))"))
    for (colour, kind, direction, speed, change, other), made in zip(stated, parsed):
        assert made["colour"] == captions.COLOURS[colour] and made["kind"] == captions.KINDS[kind]
        assert made["direction"] == captions.DIRECTIONS[direction] and made["speed"] == captions.SPEEDS[speed]
        assert made["change"] == change
        assert made["other"] == (f"{captions.COLOURS[other[0]]} {captions.KINDS[other[1]]}" if other else "")
    made = f"{json.dumps(parsed)}.map((choice) => w.caption(choice, {choices}))"
    assert ready.run(call.format(made)) == wanted
    assert ready.run(call.format('w.tidy(" A red  ball, moves.")')) == "a red ball moves"
    for text in ("a red ball", "a red ball moves right fast then turns left", "a red ball moves fast right then stops"):
        assert ready.run(call.format(f"w.parse({json.dumps(text)}, {choices})")) is None


def test_the_noise_is_normal(ready):
    """Moments of 76,800 numbers, within five standard errors; other seeds and later draws are unrelated."""
    draws = torch.stack([*noises(ready, 7, 4), *noises(ready, 8, 4)]).flatten(1).double()
    every, count = draws.flatten(), draws.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((every**power).mean() - moment) < 5 * (variance / count) ** 0.5
    related = torch.corrcoef(draws) - torch.eye(len(draws))
    assert related.abs().max() < 5 / draws.shape[1] ** 0.5


def test_a_keyboard_reaches_everything(ready):
    """The order of Tab, a visible ring, and Space and Enter on what they reach."""
    ready.call("Emulation.setFocusEmulationEnabled", enabled=True)
    ready.run("document.querySelector('#prompt').focus()")
    order = []
    while len(order) < 40:
        order.append(ready.run("((e) => e.id || e.ariaLabel || e.tagName)(document.activeElement)"))
        ring = ready.run("((s) => s.outlineStyle + parseInt(s.outlineWidth))(getComputedStyle(document.activeElement))")
        assert ring == "solid3", order[-1]
        if order[-1] == f"After step {STEPS}" and order.count(order[-1]) == 2:
            break
        press(ready, "Tab", 9)
    picks = ["SUMMARY", "colour", "kind", "direction", "speed", "change", "other", "seed"]
    steps = [f"After step {step}" for step in range(1, STEPS + 1)]
    assert order == ["prompt", "surprise", "go", *picks, "play", "frame", *steps, *steps]
    press(ready, " ", 32)
    assert ready.run(f"{AFTER.format('teacher')}[{STEPS - 1}].ariaPressed") == "true"
    ready.run("document.querySelector('#play').focus()")
    said = ready.run("document.querySelector('#play').textContent")
    press(ready, " ", 32)
    assert {said, ready.run("document.querySelector('#play').textContent")} == {"Play", "Pause"}


def test_choices_write_the_sentence(ready):
    ready.run("Object.assign(document.querySelector('#direction'), { value: 'left' }).onchange()")
    ready.run("Object.assign(document.querySelector('#change'), { value: 2 }).onchange()")
    prompt = ready.run("document.querySelector('#prompt').value")
    assert " moves left " in prompt and " then turns up" in prompt and captions.parse(prompt)
    ready.run("document.querySelector('#surprise').click()")
    assert captions.parse(ready.run("document.querySelector('#prompt').value"))


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_window_and_scheme(browser, site, width, scheme):
    """Nothing is cut off, parts have names, text stands out, and motion stays off where the system asks for it."""
    wanted = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", "reduce")]
    browser.call("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in wanted])
    browser.errors.clear()
    browser.open(site, width)
    browser.run(CHECKS)
    wait(browser, finished("student"))
    browser.run("unfold()")
    assert browser.run("fits()") and browser.run("cut()") == []
    assert browser.run("words()") == {"broken": [], "outside": []}
    assert browser.run("document.querySelector('#play').textContent") == "Play" and browser.run(STANDS)
    assert not browser.errors
    assert film(browser, "student").std() > 5
    nodes = [n for n in browser.call("Accessibility.getFullAXTree")["nodes"] if not n.get("ignored")]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes]
    interactive = ("button", "textbox", "combobox", "slider", "spinbutton", "image", "group", "progressbar")
    assert [role for role, name in named if role in interactive and not name] == []
    assert {"Describe a clip", "Colour", "Then", "Noise", "Frame", "After step 1"} <= {name for _, name in named}
    assert any(role == "image" and name.startswith("Student, 3\u00a0steps: “a red ball moves") for role, name in named)
    assert browser.run("contrast()") >= 4.5  # WCAG 2.2, level AA, for text of any size
    browser.call("Emulation.setEmulatedMedia", features=[])
