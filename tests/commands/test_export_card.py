"""The README of an export: its program runs as it stands, its head names licence and teacher, it leaks no path."""

import json
import re
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from students import make_student

from fastlightgen.config import main
from fastlightgen.export import export
from fastlightgen.pipelines.origin import hub_id, licence, name_of

SMALL = {"height": 32, "width": 48, "num_frames": 9}


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """`exported(kind)`: the export `student` of a very small pipeline, in a folder of its own."""
    done = {}

    def get(kind: str):
        if kind not in done:
            root, source = tmp_path_factory.mktemp(kind), pipeline(kind)
            model = make_student(source, root / "model", source=str(source / "transformer"))
            words = [f"model={model}", f"pipeline={source}", f"out={root / 'student'}", "link=true", "progress=false"]
            main(export, "export", words)
            done[kind] = root / "student"
        return done[kind]

    return get


def program(text: str) -> str:
    """The program of a README, for a smaller clip."""
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for key, value in SMALL.items():
        code, changed = re.subn(rf"(?m)^    {key}=\d+,$", f"    {key}={value},", code)
        assert changed == 1
    return code


@pytest.mark.parametrize("kind", ["wan_t2v", "wan_i2v", "hunyuan_t2v"])
def test_the_program_runs(exported, tmp_path, monkeypatch, kind):
    """With stock diffusers and Pillow: no video library can be imported."""
    out = exported(kind)
    code = program((out / "README.md").read_text())
    for name in ("cv2", "imageio", "av", "torchvision", "fastlightgen"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(out.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save("first.png")
    exec(compile(code, "README.md", "exec"), {})
    with Image.open("clip.webp") as clip:
        assert (clip.n_frames, clip.size) == (9, (48, 32))
        clip.seek(8)
        assert len(np.unique(np.asarray(clip.convert("RGB")))) > 10
    assert ("load_image" in code) == (kind == "wan_i2v")


def test_sizes_are_those_of_the_family(exported):
    text = (exported("wan_i2v") / "README.md").read_text()
    assert "    height=480,\n    width=832,\n    num_frames=81,\n    num_inference_steps=4,\n" in text
    assert "duration=round(1000 / 16)" in text and "guidance_scale=1.0," in text
    text = (exported("hunyuan_t2v") / "README.md").read_text()
    assert "    height=720,\n    width=1280,\n    num_frames=129,\n" in text


def test_no_path_leaks(exported, pipeline):
    out, source = exported("wan_t2v"), pipeline("wan_t2v")
    for file in ("README.md", "fastlightgen.json", "transformer/fastlightgen.json", "model_index.json"):
        text = (out / file).read_text()
        assert str(source.parent) not in text and str(out.parent) not in text, file
    assert "| trained from | wan_t2v/transformer |" in (out / "README.md").read_text()


def head(folder) -> tuple[dict, str]:
    text = (folder / "README.md").read_text().split("---\n")[1]
    return yaml.safe_load(text), text


def test_a_head_without_known_origin(exported):
    found, text = head(exported("wan_i2v"))
    assert found == {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": ["fastlightgen", "video-generation", "distillation"],
        "base_model": "wan_i2v",
    }
    assert "# license: the teacher's folder names none" in text and "# base_model: this is the name" in text


def test_licence_and_teacher_of_a_download_cache(pipeline, tmp_path):
    """A folder as huggingface_hub keeps it, whose README has a licence of its own."""
    cache = tmp_path / "models--Some-Lab--Video-1.0"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / "0a1b2c").symlink_to(pipeline("wan_t2v"), target_is_directory=True)
    assert name_of(cache / "snapshots" / "0a1b2c" / "transformer") == "Some-Lab/Video-1.0"
    real = cache / "snapshots" / "3d4e5f"
    real.mkdir()
    for part in pipeline("wan_t2v").iterdir():
        (real / part.name).symlink_to(part)
    lines = ["license: other", "license_name: lab-licence", 'license_link: "LICENSE.md"', "tags: [video]"]
    (real / "README.md").write_text("\n".join(["---", *lines, "---", "", "# Video", "", "---", "license: mit", "---"]))
    model = make_student(real, tmp_path / "model", source=str(real))
    words = [f"model={model}", f"pipeline={real}", f"out={tmp_path / 'student'}", "link=true", "progress=false"]
    main(export, "export", words)
    found, text = head(tmp_path / "student")
    assert found["license"] == "other" and found["base_model"] == "Some-Lab/Video-1.0" and "#" not in text
    assert (found["license_name"], found["license_link"]) == ("lab-licence", "LICENSE.md")
    assert "| trained from | Some-Lab/Video-1.0 |" in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("---\nlicense: apache-2.0\n---\n# A", {"license": "apache-2.0"}),
        ("---\nlicense: apache-2.0\n", {}),  # no end
        ("# A\n---\nlicense: mit\n---\n", {}),  # not at the top
        ("---\nlicense: [\n---\n", {}),  # no YAML
        ("---\n- license\n---\n", {}),
        (None, {}),
    ],
)
def test_licences(tmp_path, text, wanted):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence(tmp_path) == wanted


@pytest.mark.parametrize("said", ["Lab/Video", "/data/Video", "Video", None])
def test_hub_id_of_a_pipeline(tmp_path, said):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "_name_or_path": said}))
    assert hub_id(tmp_path) == ("Lab/Video" if said == "Lab/Video" else None)
