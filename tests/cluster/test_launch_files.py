"""The launch files start the right commands: bash runs them with stubs of srun and scontrol that log calls."""

import os
import subprocess
from pathlib import Path

import pytest

from fastlightgen import sweep
from fastlightgen.config import load

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
[ "$1" = show ] && echo node0 && echo node1
exit "${CODE:-0}"
"""


def calls(file: Path, folder: Path, **env: str) -> tuple[int, list[list[str]]]:
    """Run a launch file; return its exit code and the words of every srun and scontrol call."""
    for name in ("srun", "scontrol", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "USER": "u"}
    slurm |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    given = {"MODEL": str(folder), "DATA": str(folder), "RUN": str(folder / "run"), "CALLS": str(folder / "calls")}
    env = os.environ | slurm | given | env | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", file, folder / "run"], env=env)
    return done.returncode, [line.split() for line in (folder / "calls").read_text().splitlines()]


# iters, lr and critic_lr of Stage III
RECIPES = {"default": (3000, 2e-6, 4e-7), "paper": (1000, 5e-7, 5e-7)}


@pytest.mark.parametrize("preset", RECIPES)
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*-2x8h100.sbatch")), ids=lambda f: f.stem)
def test_both_presets_on_two_nodes(file, preset, tmp_path):
    code, made = calls(file, tmp_path, **{"PRESET": preset} if preset == "paper" else {})
    runs = [words for words in made if "torchrun" in words]
    assert code == 0 and len(runs) == 3
    settings = [load(words[words.index("fastlightgen.train") + 1 :]) for words in runs]
    assert [cfg.stage for cfg in settings] == ["1", "2", "3"]
    assert all("--nproc-per-node=8" in words and "--nnodes=2" in words for words in runs)
    prune, distill = settings[1:]
    for cfg in settings[1:]:
        assert (cfg.engine, cfg.zero, cfg.offload, cfg.dtype) == ("deepspeed", 3, "optimizer", "bfloat16")
        assert cfg.batch == 16 and cfg.checkpointing
    assert (prune.iters, prune.lr, prune.alpha, prune.p) == (4000, 1e-5, 1.0, 0.5)
    assert (distill.iters, distill.lr, distill.critic_lr) == RECIPES[preset]
    assert (distill.steps, distill.ratio, distill.beta2) == (4, 5, 0.25)
    assert (distill.beta1, distill.shift) == ((2.0, 7.0) if file.stem.startswith("hunyuanvideo-") else (3.5, 5.0))


def test_a_failed_stage_ends_the_job(tmp_path):
    code, made = calls(FOLDER / "wan2.1-i2v-14b-2x8h100.sbatch", tmp_path, CODE="3")
    assert code == 3 and len([words for words in made if "torchrun" in words]) == 1


def test_a_signal_reaches_the_ranks_and_queues_the_job_again(tmp_path):
    """While the stage runs, the stub of srun sends the script SIGUSR1, as Slurm does before the time limit."""
    stub = tmp_path / "bin"
    stub.mkdir()
    send = 'kill -USR1 $PPID && until grep -q pkill "$CALLS"; do sleep 0.02; done'
    (stub / "srun").write_text(STUB.replace("exit", f'[ "$1" = torchrun ] && {send}\nexit'))
    (stub / "srun").chmod(0o755)
    file = FOLDER / "hunyuanvideo-2x8h100.sbatch"
    script = tmp_path / "job"  # this PATH comes before the stubs of `calls`
    script.write_text(f"PATH={stub}:$PATH\n{file.read_text()}")
    code, made = calls(script, tmp_path)
    assert code == 75 and made[-1] == ["scontrol", "requeue", "7"]
    assert any("pkill" in words and "-USR1" in words for words in made)
    assert len([words for words in made if "torchrun" in words]) == 1


WORDS = ["steps=2,4", "seeds=3", "method=fastlightgen,dmd2"]


def test_a_sweep_as_an_array(tmp_path):
    file = FOLDER / "sweep.sbatch"
    script = tmp_path / "job"
    script.write_text(file.read_text().replace('"$@"', " ".join(WORDS)))
    code, [made] = calls(script, tmp_path, CODE="3")
    own, swept = sweep.settings(made[made.index("fastlightgen.sweep") + 1 :])
    assert code == 3 and own["at_once"] == "1" and own["seeds"] == "3" and own["run"] == str(tmp_path / "run")
    assert swept == {"steps": ["2", "4"], "method": ["fastlightgen", "dmd2"]}


def test_a_signal_ends_a_sweep_and_queues_its_task_again(tmp_path):
    """While the sweep runs, the stub of python sends the script SIGUSR1 and waits for the end."""
    stub = tmp_path / "bin"
    stub.mkdir()
    wait = "trap 'echo ended >> \"$CALLS\"; exit 130' TERM\nkill -USR1 $PPID\nwhile :; do sleep 0.02; done"
    (stub / "python").write_text(f"#!/bin/bash\n{wait}")
    (stub / "python").chmod(0o755)
    script = tmp_path / "job"
    script.write_text(f"PATH={stub}:$PATH\n{(FOLDER / 'sweep.sbatch').read_text()}")
    code, made = calls(script, tmp_path)
    assert code == 75 and made == [["ended"], ["scontrol", "requeue", "7_3"]]


def test_two_ranks_on_a_cpu(tmp_path):
    code, made = calls(FOLDER / "cpu-smoke.sh", tmp_path)
    settings = [load(words[words.index("fastlightgen.train") + 1 :]) for words in made]
    assert code == 0 and [(cfg.stage, cfg.zero, cfg.engine) for cfg in settings] == [
        (n, 3, "deepspeed") for n in ("1", "2", "3")
    ]
