"""Draw the README's picture from a finished run: python docs/picture.py runs/demo docs/demo.gif."""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

COLUMNS = {  # titles; {name} stands for the number of blocks of that model
    "real": "real",
    "teacher": "teacher\n50 steps, guided",
    "teacher-few": "teacher\n4 steps, guided",
    "pruned": "{pruned} of {teacher} blocks\nuntrained, 4 steps",
    "stage2-few": "after Stage II\n4 steps",
    "student": "student\n4 steps, {student} blocks",
}
ROWS, SIDE, GAP, HEAD = 4, 100, 6, 40  # a side of 100 shows each pixel of a clip as 5 x 5


def main(run: Path, out: Path) -> None:
    clips = {name: load_file(run / "evaluate" / f"{name}.safetensors")["video"] for name in COLUMNS}
    records = {name: json.loads((run / "evaluate" / f"{name}.json").read_text()) for name in COLUMNS if name != "real"}
    blocks = {name: record["num_blocks"] for name, record in records.items()}
    titles = {name: title.format(**blocks) for name, title in COLUMNS.items()}
    pictures = []
    for frame in range(next(iter(clips.values())).shape[1]):
        page = Image.new("RGB", (len(COLUMNS) * (SIDE + GAP) - GAP, HEAD + ROWS * (SIDE + GAP) - GAP), "white")
        draw = ImageDraw.Draw(page)
        for column, (name, title) in enumerate(titles.items()):
            left = column * (SIDE + GAP)
            middle = (left + SIDE / 2, HEAD / 2)
            draw.multiline_text(middle, title, "black", ImageFont.load_default(12), anchor="mm", align="center")
            for row in range(ROWS):
                small = Image.fromarray(clips[name][row, frame])
                page.paste(small.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, HEAD + row * (SIDE + GAP)))
        pictures.append(page.quantize(128, dither=Image.Dither.NONE))
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=180, loop=0, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
