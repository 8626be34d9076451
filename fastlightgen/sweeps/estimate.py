"""What a sweep will train and evaluate, and how long that takes on this machine."""

from collections.abc import Sequence

from fastlightgen.data.source import Source
from fastlightgen.data.version import check_latents
from fastlightgen.engine.local import pick_device
from fastlightgen.metrics.intervals import MIN_CLIPS
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import trained_folder
from fastlightgen.models.folder.weights import config_of, read_card
from fastlightgen.page.summary import count
from fastlightgen.planner.walk import Route, walk
from fastlightgen.stages.earlier import cost_of, operations, span, speed_of
from fastlightgen.sweeps.points import STAGES, Point, unique
from fastlightgen.sweeps.work import lacking
from fastlightgen.world.source import open_source

STEPS = 50  # of a teacher whose card names none
SHOWN = 20  # points of a list
START = 5.0  # seconds until a process computes: imports, building the networks
RATIO = 0.3  # share of the blocks that the estimate takes as dropped if no Stage I is part of a point


def plan(points: Sequence[Point], evaluate: bool, at_once: int) -> list[str]:
    """What is to do, point by point, and how long it takes at the speed of this machine."""
    parts = unique(points)
    todo = lacking(points, evaluate)
    left = [part for part in unique(todo) if not part.done]
    each = ", ".join(f"{sum(p.stage == n for p in left)} of stage {n}" for n in STAGES)
    lines = [f"{count(len(points), 'model')}; {len(left)} of {count(len(parts), 'training')} are left: {each}"]
    scored = list({point.scores: point for point in todo if evaluate and point.scorable}.values())
    if evaluate:
        lines[0] += f"; {count(len(scored), 'evaluation')}"
    names = list(dict.fromkeys(point.name for point in points))
    lines += [f"  {name}" for name in names[:SHOWN]]
    lines += [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    configs = [part.cfg for part in [*left, *parts]]
    if (left or scored) and configs:
        source = open_source(configs[0].data, configs[0].seed, configs[0].negative)
        for model in dict.fromkeys(cfg.model for cfg in configs):
            check_latents(config_of(trained_folder(model)), source.description)
        found = speed_of(configs[0], source, pick_device(configs[0].device))
        dropped = [RATIO if part.dropped is None else part.dropped for part in left]
        trained = sum(operations(part.cfg, source, share) for part, share in zip(left, dropped, strict=True))
        sampled = sum(sampling(point, source) for point in scored)
        if found is None:
            lines.append(f"  {(trained + sampled) / 1e15:.3g} PFLOP; no time, because this GPU's peak is not known")
            return lines
        speed, how = found
        training, scoring = trained / speed + START * len(left), sampled / speed + START * len(scored)
        times = f"{span(training)} of training and {span(scoring)} of evaluation, {at_once} at a time"
        lines.append(f"  {times}; estimated from the operations, at {how}, and {START:g} s per process")
    return lines


def sampling(point: Point, source: Source) -> float:
    """Operations of sampling the clips that a point is scored on."""
    folder = trained_folder(point.start)
    net: Network = cost_of(config_of(folder), source.largest())
    given = dict(word.split("=", 1) for word in point.plan)
    clips = int(min(int(given.get("clips", MIN_CLIPS)), source.num_held_out))
    last = point.parts[-1] if point.parts else None
    share = 1.0 - (last.dropped or 0.0 if last else 0.0)
    if last and last.stage == "3":
        steps, predictions = last.cfg.steps, 1
    else:
        steps = int(given.get("steps", 0)) or read_card(folder).get("steps") or STEPS
        guided = getattr(last.cfg, "guided", 1.0) != 1 if last else False  # in the weights
        predictions = 1 if guided else 2
    return clips * steps * predictions * share * walk(net, [Route()]).flops
