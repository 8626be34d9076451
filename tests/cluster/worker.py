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
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from case_stages import BATCH, CPU, batches, built_with, make, new_stage
from gathers import count_gathers, gathers
from helpers import BLOCKS, KEPT, config, empty_sweep, small_wan

from fastlightgen.engine import shards
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.log import read_metrics
from fastlightgen.engine.loop import Stopped, train
from fastlightgen.engine.scores import Scores
from fastlightgen.models.float8 import Float8Linear
from fastlightgen.models.folder.weights import load_model
from fastlightgen.ops import float8
from fastlightgen.parallel import ranks
from fastlightgen.parallel.clock import clock
from fastlightgen.stages.build import Builder
from fastlightgen.stages.scores import evaluation_set
from fastlightgen.stages.sweep import score_sets
from fastlightgen.world.source import ShapesSource

CLIPS, TIMES = 3, 2  # of Stage I


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
