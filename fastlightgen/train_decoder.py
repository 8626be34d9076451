"""train stage=decoder: the stage's folder, engine and loop, in one process."""

from dataclasses import asdict
from typing import Any

import torch

from fastlightgen.config import after_stage, compute_type, numbers, unset_type, with_type
from fastlightgen.decoder.folder import read_vae
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.local import LocalEngine, pick_device
from fastlightgen.engine.loop import train as train_loop
from fastlightgen.engine.writers import check_installed
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.parallel.threads import set_threads
from fastlightgen.stages import decoder


def train_decoder(cfg: Any) -> None:
    """Run or continue the stage; do nothing if it is complete."""
    check_installed(cfg)
    if ranks.launched() > 1:
        raise ValueError(f"stage=decoder: runs in one process, {ranks.launched()} were launched; launch one")
    line, device = set_threads(cfg.threads), pick_device(cfg.device)
    if device.type == "cpu":
        say(line)
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down
    cfg = with_type(cfg, compute_type(cfg.dtype, device.type == "cuda", real=True))
    more = decoder.inputs(cfg)
    config, decisive = asdict(cfg) | more, [*numbers(cfg), *more]
    folder = StageFolder(cfg.run, "decoder", config, decisive, cfg.overwrite, auto_type=bool(unset_type(cfg)))
    try:
        if folder.complete:
            read_vae(folder.result)  # raises if it is damaged
            say(f"stage decoder: {folder.result} exists, nothing to do (overwrite=true starts anew)")
            return
        stage = decoder.build(cfg, folder.path, device)
        train_loop(stage, LocalEngine(device, cfg.dtype, cfg.batch, cfg.micro_batch), folder, cfg)
        say(f"stage decoder: {folder.result}")
        say(f"next: {after_stage(cfg)}")
    finally:
        folder.close()
