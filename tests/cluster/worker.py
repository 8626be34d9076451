"""The program of every rank of a test: it runs all cases in one process group; rank 0 writes the results.

python -m torch.distributed.run --nproc-per-node 2 worker.py CASES.json RESULTS.json
"""

import gc
import json
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gathers import count_gathers, gathers
from helpers import BLOCKS, KEPT, PRUNED, config, crop, empty_sweep, small_hunyuan, small_wan

from fastlightgen.config import load, method_for
from fastlightgen.data.source import Batch
from fastlightgen.engine import shards
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.log import read_metrics
from fastlightgen.engine.loop import Stopped, train
from fastlightgen.engine.scores import Scores
from fastlightgen.models.float8 import Float8Linear
from fastlightgen.models.folder.weights import load_model
from fastlightgen.models.lora import attach_lora
from fastlightgen.ops import float8
from fastlightgen.parallel import ranks
from fastlightgen.parallel.clock import clock
from fastlightgen.rng import generator, rows
from fastlightgen.stages import distill, prune, teacher
from fastlightgen.stages.build import Builder
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.scores import evaluation_set
from fastlightgen.stages.sweep import score_sets
from fastlightgen.stages.teacher import Teacher
from fastlightgen.world.source import ShapesSource

BATCH = 4
CLIPS, TIMES = 3, 2  # of Stage I
CPU = torch.device("cpu")


REPLACE = {"image_condition_type": "token_replace", "in_channels": 12}
NETWORKS = {
    "wan": small_wan,
    "hunyuan": partial(small_hunyuan, 2, 2),
    "hunyuan token replace": partial(small_hunyuan, 2, 2, **REPLACE),
}


def clips(batch: Batch, family: str, size: int) -> Batch:
    """Crop every clip to a corner; for token_replace its first frame becomes the image."""
    batch = crop(batch, size)
    if "replace" not in family:
        return batch
    return Batch(batch.x0, *(replace(c, image=batch.x0[:, :, :1]) for c in (batch.cond, batch.null)))


def batches(step: int, family: str = "wan", size: int = 4) -> Batch:
    return clips(ShapesSource(0).batch(step, BATCH, rows(BATCH)), family, size)


def configured(case: dict):
    """Return the configuration of a case."""
    return config(case["stage"], f"batch={BATCH}", "iters=100", "warmup=0", "lr=1e-3", *case.get("words", []))


def make(number: int, words: list[str], family: str = "wan", size: int = 4):
    """Return a stage whose networks have a few thousand parameters."""
    network, made = NETWORKS[family], partial(batches, family=family, size=size)
    cfg = configured({"stage": number, "words": words})
    if number == 0:
        return Teacher(cfg, network(), made, {})
    if number == 2:
        net = network()
        net.checkpointing = cfg.checkpointing
        return Prune(cfg, net, PRUNED, made, lambda: clips(ShapesSource(0).held_out(0, 4), family, size), {})
    teacher = network(seed=1).requires_grad_(False)
    student = network(seed=1).prune(KEPT)
    lora = cfg.fake_mode == "lora"
    fake = teacher if lora else network(seed=1).prune(KEPT)
    trained = attach_lora(teacher, cfg.lora_rank, generator(0, 7)) if lora else fake
    return Distill(cfg, Networks(student, teacher, KEPT, fake, KEPT if lora else None, trained, lora, None), made, {})


def make_engine(case: dict):
    if ranks.size() == 1:
        return LocalEngine(CPU, "float32", BATCH, case.get("micro_batch", 0))
    from fastlightgen.engine.deepspeed import DeepSpeedEngine

    class Engine(DeepSpeedEngine):
        """Without prefetch and reuse, by which DeepSpeed would keep all blocks of a small network gathered."""

        def _config(self, *args) -> dict:
            config = super()._config(*args)
            config["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
            return config

    keys = {"batch": BATCH, "micro_batch": 0, "zero": 3, "offload": "none", "dtype": "float32"}
    keys |= {"sequence_parallel": 1, "timeout": 900, "seed": 0}
    return Engine(CPU, SimpleNamespace(**{k: case.get(k, v) for k, v in keys.items()}))


def steps(stage, engine, first: int, last: int) -> list[dict[str, float]]:
    out = []
    for step in range(first, last):
        out += [engine.apply(update, step) for update in stage.updates(step)]
        stage.check(step + 1)
    return out


def run(case: dict) -> dict:
    """Run a case and return the records of its updates, or Stage I's table, and the gathers of blocks."""
    gathered = Counter()
    engine = make_engine(case)
    if case["stage"] == 1:
        model = small_wan()
        engine.place(model)
        count_gathers(gathered)
        if "save" in case:
            return interrupted_scores(model, Path(case["save"]))
        table = scored(model, empty_sweep(BLOCKS, CLIPS * TIMES))
        return {"table": table.tolist(), "gathers": gathers(gathered, [model])}
    if "load" in case:
        return loaded(case)
    if "late" in case:
        return waited(case)
    if "run" in case:
        return logged(case)
    if "start" in case:
        return started(case)
    stage = new_stage(case)
    engine.prepare(stage)
    stage.begin()
    count_gathers(gathered)
    last = case.get("steps", 4)
    if "save" not in case:
        records = steps(stage, engine, 0, last)
        nets = {id(n): n for n in (*(r.host or r.net for r in stage.roles.values()), *stage.frozen)}
        return {
            "records": records,
            "gathers": gathers(gathered, list(nets.values())),
            "float8": [up_to_date(n) for n in nets.values()],
        }
    # Save in the middle and go on; then let a second engine continue from the checkpoint.
    folder, middle = Path(case["save"]), last // 2
    records = steps(stage, engine, 0, middle)
    saving = engine.save(folder, middle, keep=2, every=0)  # written while the next steps run
    records += steps(stage, engine, middle, last)
    records.append(engine.measures())
    saving.wait()
    engine.finish()
    stage.save(folder / "whole", engine.save_model)
    stage, engine = new_stage(case), make_engine(case)
    engine.prepare(stage)
    stage.begin()
    assert engine.load(folder) == middle
    again = [*steps(stage, engine, middle, last), engine.measures()]
    engine.finish()
    stage.save(folder / "continued", engine.save_model)
    return {"records": records, "again": again}


@torch.no_grad()
def up_to_date(net) -> list[bool]:
    """Of each weight that a network keeps in float8: whether it is the weight as it is now."""
    kept = [m for m in net.modules() if isinstance(m, Float8Linear) and m.keeps]
    return [torch.equal(m.quantised()[0].float(), float8.quantised(m.weight)[0].float()) for m in kept]


def scored(model, sweep, memory: float = 4.0) -> torch.Tensor:
    """Return Stage I's table: each block skipped alone, 3 clips in batches of 2 at 2 times each."""
    samples = list(evaluation_set(config(1, f"clips={CLIPS}", f"timesteps={TIMES}", "batch=2"), batches))
    keeps = [[j for j in range(BLOCKS) if j != i] for i in range(BLOCKS)]
    return score_sets(model, samples, keeps, "elbo", memory, sweep)


def interrupted_scores(model, folder: Path) -> dict:
    """Measure the table once undisturbed, and once interrupted and continued; with little memory: a walk per block.

    The last rank gets a signal in its third walk. Returns both tables, the message, and the walks that were left to do.
    """
    folder.mkdir(exist_ok=True)
    whole = scored(model, empty_sweep(BLOCKS, CLIPS * TIMES), memory=1e-9)
    signals: list[str] = []
    walks: list[int] = []

    def walked(*_) -> None:
        walks.append(1)
        if len(walks) == 3 and ranks.rank() == ranks.size() - 1:
            signals.append("SIGTERM")

    model.register_forward_hook(walked)
    place = SimpleNamespace(scores=folder / "scores.safetensors")
    message = ""
    try:
        with Scores(place, "shapes", signals, False, False).sweep(BLOCKS, CLIPS * TIMES, "skip") as sweep:
            scored(model, sweep, memory=1e-9)
    except Stopped as stop:
        message = str(stop)
    if ranks.rank() == 0:
        shutil.copy(place.scores, folder / "interrupted.safetensors")
    walks.clear()
    with Scores(place, "shapes", [], False, False).sweep(BLOCKS, CLIPS * TIMES, "skip") as sweep:
        again = scored(model, sweep, memory=1e-9)
    return {"whole": whole.tolist(), "again": again.tolist(), "message": message, "walks": len(walks)}


def waited(case: dict) -> dict:
    """Return the clock of a step in which rank 1 is late after block 1, so that rank 0 waits in DeepSpeed's gather.

    Rank 1 sleeps after rank 0 has begun to wait, so that rank 0 waits for the full time even on a busy machine.
    """
    store = torch.distributed.distributed_c10d._get_default_store()

    def signal_when_waiting() -> None:
        while "collectives" not in clock.open:
            time.sleep(0.001)
        store.set("waiting", "1")

    def late(*_) -> None:
        store.get("waiting")  # blocks until rank 0 has set the key
        time.sleep(case["late"])

    def early(*_) -> None:
        threading.Thread(target=signal_when_waiting).start()

    stage, engine = make(case["stage"], case.get("words", [])), make_engine(case)
    engine.prepare(stage)
    steps(stage, engine, 0, 1)
    stage.net.blocks[1].register_forward_hook(late if ranks.rank() else early)
    clock.restart()
    with clock.step():
        steps(stage, engine, 1, 2)
    return clock.read()


def loaded(case: dict) -> dict:
    """Load a network under zero=3; return the bytes kept by each rank, and whether the gathered weights are right."""
    words = ["engine=deepspeed", "zero=3", *case["words"]]
    cfg = config(case["stage"], *words)
    net = Builder(cfg, ShapesSource(0), CPU).load(case["load"])
    whole = load_model(case["load"], dtype=getattr(torch, cfg.dtype))
    same = []
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        left = p.untyped_storage().nbytes()
        with shards.gathered_weight(p) as value:
            same.append(left == 0 and value.dtype == q.dtype and torch.equal(value, q))
    kept = ranks.gathered(sum(p.ds_tensor.untyped_storage().nbytes() for p in net.parameters()))
    total = sum(p.untyped_storage().nbytes() for p in whole.parameters())
    return {"same": not ranks.anyone(not all(same)), "parameters": len(same), "kept": kept, "total": total}


def started(case: dict) -> dict:
    """Build a stage from files in bfloat16; return per role whether masters, weights and average are the files' values.

    Then train it, and return the realised shares of the movement at the last step. start=rounded: without the values of
    the files, so that the masters start at bfloat16 values.
    """
    stage, engine = new_stage(case), make_engine(case)
    expected = {}
    for name, role in stage.roles.items():
        whole = load_model(case["files"])
        expected[name] = (whole.prune(KEPT) if case["stage"] == 3 else whole).state_dict()
        if case["start"] == "rounded":
            role.file_values = None
    engine.prepare(stage)
    found = {}
    for name, role in stage.roles.items():
        trained = {key: p for key, p in role.net.named_parameters() if p.requires_grad}
        values = torch.cat([expected[name][key].flatten() for key in trained])
        masters = torch.cat([shards.get(p).flatten() for p in trained.values()])
        weights = []
        for p in trained.values():
            with shards.gathered_weight(p) as weight:
                weights.append(weight.detach().flatten().clone())
        found[name] = {
            "masters": torch.equal(masters, values),
            "weights": not ranks.anyone(not torch.equal(torch.cat(weights), values.bfloat16())),
            "on_grid": (masters == masters.bfloat16().float()).float().mean().item(),
        }
        if role.ema:
            with shards.swapped(engine.state.engines[name].optimizer, engine.state.averages[name]):
                average = torch.cat([shards.get(p).flatten() for p in trained.values()])
            found[name]["average"] = torch.equal(average, values)
    before = engine.measures()
    steps(stage, engine, 0, case["steps"])
    return {"found": found, "before": before, "after": engine.measures()}


def logged(case: dict) -> dict:
    """Run the training loop on a stage from files; return the lines of its log."""
    stage, engine, cfg = new_stage(case), make_engine(case), built_with(case)
    train(stage, engine, StageFolder(case["run"], case["stage"], {"seed": cfg.seed}, []), cfg)
    return {"lines": read_metrics(Path(case["run"]) / f"stage{case['stage']}" / "metrics.jsonl")}


def new_stage(case: dict):
    """Return the stage of a case: built from its files, or with networks of its own."""
    if "method" in case:
        return rival(case)
    if "files" not in case:
        return make(case["stage"], case.get("words", []), case.get("family", "wan"), case.get("size", 4))
    cfg = built_with(case)
    return BUILDS[case["stage"]](cfg, Cropped(cfg, ShapesSource(0), CPU))


def rival(case: dict):
    """Return a stage of another method, built from model folders as the train command does."""
    engine = [] if ranks.size() == 1 else ["engine=deepspeed", f"zero={case.get('zero', 3)}"]
    words = [f"stage={case['stage']}", "run=unused", f"method={case['method']}", f"batch={BATCH}", "shift=3"]
    words += ["iters=100", "warmup=0", "dtype=float32", "lr=1e-3"]
    given = dict(w.split("=", 1) for w in [*words, *engine, *case["words"]])
    cfg = load([f"{k}={v}" for k, v in given.items()])
    return method_for(cfg).build(cfg, Cropped(cfg, ShapesSource(0), CPU))


class Cropped(Builder):
    """Gives a stage small clips."""

    def batches(self, step: int) -> Batch:
        return batches(step)


def built_with(case: dict):
    """Return the configuration of a case that is built from files."""
    words = ["engine=deepspeed", f"dtype={case['dtype']}", f"zero={case['zero']}", *case["words"]]
    return configured(case | {"words": words})


BUILDS = {0: teacher.build, 2: prune.build, 3: distill.build}


def leave_out_logs() -> None:
    """Leave out what DeepSpeed does for messages and profilers, also where nobody reads them: a quarter of its time."""
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False
    torch.nn.Parameter.__repr__ = object.__repr__  # every engine formats all weights for a message that it drops


def main(cases: Path, results: Path) -> None:
    torch.set_num_threads(1)
    leave_out_logs()
    ranks.join(CPU, 900)
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine, and would look through torch each time
    done = {name: run(case) for name, case in json.loads(cases.read_text()).items()}
    if ranks.rank() == 0:
        results.write_text(json.dumps(done))
    ranks.leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
