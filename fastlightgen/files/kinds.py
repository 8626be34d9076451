"""The shape of every kind of file that is read. Keys that are not named here may hold anything: nothing reads them."""

from fastlightgen.files.schema import (
    anything,
    either,
    flag,
    inside,
    items,
    like,
    maybe,
    name,
    number,
    one_of,
    record,
    table,
    text,
    whole,
)

BLOCKS, STEPS, CLIPS = 10_000, 100_000, 100_000_000  # more than any network, sampler, data set has
BLOCK = whole(0, BLOCKS)
KEPT = items(BLOCK, most=BLOCKS, least=1, rising=True)
NAME, FILE = name(1_000), name()
SAMPLERS = ("ode", "stochastic")
GUIDANCE = number(-1_000, 1_000)
WIDTHS = items(whole(1, 10_000_000), most=2, least=2)  # of the width-pruned network and of its teacher
SIZE = like(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", "HEIGHTxWIDTHxFRAMES")
PLAIN = number(finite=False)  # a measured number; a run that diverged logs nan

# fastlightgen.json beside weights
CARD = record(
    {},
    {
        "family": maybe(NAME),
        "stage": maybe(either(whole(0, 3), one_of("decoder"))),
        "num_blocks": whole(1, BLOCKS),
        "kept_blocks": maybe(KEPT),
        "pruned_path": maybe(KEPT),
        "ladder": maybe(items(number(0, 1, above=True), most=1_000, least=1, falling=True)),
        "shift": maybe(number(0, 1_000, above=True)),
        "guidance": maybe(GUIDANCE),
        "steps": maybe(whole(1, STEPS)),
        "sampler": maybe(one_of(*SAMPLERS)),
        "source": maybe(text()),
        "lora_rank": whole(1, 10_000),  # the teacher with merged adapters of this rank
        "world": maybe(whole(1, 1_000)),
        "expert": one_of("high", "low"),  # of a model with two networks
        "boundary": number(0, 1, above=True),
        "silent": table(items(BLOCK, most=BLOCKS, least=1)),  # block -> its silenced heads
        "f3": record({}),
        "widths": record({"heads": WIDTHS, "ffn": WIDTHS}),
        "clips": record({"size": SIZE, "fps": number(0, 1_000, above=True)}),
    },
)

# attention.json of method=f3: a row for each block, a number for each head
ATTENTION = record({"mass": items(items(number(0, 1.01), most=BLOCKS, least=1), most=BLOCKS, least=1)})

# importance.json of Stage I; one that a user wrote by hand may hold the needed keys alone
UNIT = {"name": NAME, "index": BLOCK, "score": number(), "stderr": PLAIN}
CHOICE = {"kept": KEPT, "pruned": items(BLOCK, most=BLOCKS)}
IMPORTANCE = record({**CHOICE, "units": items(anything, most=BLOCKS, least=1)})
RANKING = record(  # that Stage I wrote
    {
        **CHOICE,
        "units": items(record(UNIT), most=BLOCKS, least=1),
        "baseline_score": number(),
        "num_samples": whole(0, CLIPS),
        "search": NAME,
        "score_kind": NAME,
    },
    {"data_hash": NAME, "world": maybe(whole(1, 1_000))},
)

# the cache of latents: index.json, encode.json, parts/N.json, the metadata of a shard
HASH = text(64)
SHARD = record(
    {"file": FILE, "clips": whole(1, CLIPS)},
    {"size": items(whole(1, 1_000_000), most=4), "sha256": HASH, "head": HASH},
)
SHARDS = items(SHARD)
INDEX = record({"format": whole(0, 1_000), "shards": items(SHARD, least=1), "description": record({})}, {"null": HASH})
PART = record({"shards": SHARDS, "skipped": items(record({}))})
SAMPLE = record({}, {"file": text(), "source": text(), "caption": text(1_000_000), "crc32": whole(0, 2**32)})
SAMPLES = record({}, {"samples": items(SAMPLE), "prompt": text(1_000_000), "description": record({})})
ENCODE = record(
    {"min_dover": number(), "rows": whole(0, CLIPS), "list": HASH, "shard": whole(1, CLIPS)},
    {"earlier": items(whole(0, CLIPS)), "first": whole(0, CLIPS), "added": items(whole(0, CLIPS))},
)

# config.json of a network; the family compares the keys further
CONFIG = record({}, {"_class_name": maybe(NAME), "architectures": items(NAME)})

# model_index.json: a component is [library, class]; other entries are plain settings
COMPONENT = items(maybe(NAME), most=2, least=2)
PIPELINE = record({"_class_name": NAME}, rest=either(COMPONENT, text(), flag, number(), maybe(record({}))))

# guider/guider_config.json of a pipeline
GUIDER = record({}, {"guidance_scale": GUIDANCE})

# manifest.json of an export
MANIFEST = record({"files": table(record({"size": whole(), "sum": whole(0, 2**32)}))})

# model.safetensors.index.json
WEIGHT_MAP = record({"weight_map": table(FILE, most=1_000_000)})

# a line of a list of prompts
PROMPT = record({"prompt": text(100_000)}, {"image": maybe(text(4_000))}, rest=lambda value: "is no key of a prompt")

# VBench-I2V: its list of prompts, and a result file: dimension -> [score, ..., a record per video]
VBENCH_PROMPTS = items(
    record({"prompt_en": name(250), "dimension": items(NAME, most=100, least=1), "image_name": FILE}), least=1
)
VBENCH_SCORE = number(0, 1)


def VBENCH_RESULTS(value: object) -> str:
    """The score of a dimension stands first in its list; the rest, a record per video, is not read."""
    found = table(items(anything, most=10, least=1), most=100)(value)
    if found or not isinstance(value, dict):
        return found
    wrongs = ((key, VBENCH_SCORE(result[0])) for key, result in value.items())
    return next((inside(key, inside(0, said)) for key, said in wrongs if said), "")


# a run folder: state.json of a checkpoint, lines of logs
STATE = record(
    {"step": whole(0), "files": items(FILE, most=100_000), "count": table(whole(0))},
    {"engine": NAME, "ranks": whole(1, 1_000_000), "check": whole(0, 2**32)},
)
STEP = {"step": whole(0)}
RUN = record({}, {f"stage{n}": record({}) for n in range(4)} | {"hardware": table(text())})  # config.yaml
BEST = record({**STEP, "updates": whole(0), "score": PLAIN})  # metadata of best.safetensors
DATA = record({"data": NAME})  # metadata of scores.safetensors
LOGGED = record(STEP)  # any line of a log
METRICS = record(STEP, rest=either(text(), flag, maybe(PLAIN)))
ALARMS = record({**STEP, "alarm": NAME, "good": whole(0), "value": PLAIN, "usual": PLAIN})

COST = record({"seconds": number(0)})  # what a training or an evaluation of a sweep took

# scores.json beside a shipped model
SHIPPED = record(
    {
        "records": items(
            record(
                {"plan": record({}), "seed": whole(0), "clips": whole(1, CLIPS), "noises": whole(1, CLIPS)},
                {"values": FILE, "attributes": table(maybe(PLAIN))},
            )
        )
    },
    {"world": whole(1, 1_000)},
)

# evaluate's NAME.json and speed.json
SAMPLER = record({"kind": NAME, "steps": whole(1, STEPS), "guidance": GUIDANCE, "evaluations": whole(1, 100 * STEPS)})
SHOWN = items(record({"caption": text(100_000), "has_first": flag}), most=10_000)
PAIRED = table(record({"verdict": NAME}))
SPEED = record(
    {
        "theory": number(0, above=True),
        "measured": number(0),
        "theory_formula": text(),
        "batch": whole(1, CLIPS),
        "teacher_seconds": number(0),
        "student_seconds": number(0),
    },
    {"measured_range": items(number(0), most=2, least=2)},
)
SCORED = {
    "title": text(),
    "clips": whole(0, CLIPS),
    "scores": table(maybe(PLAIN)),
    "shown": SHOWN,
    "attributes": table(maybe(PLAIN)),
}
MADE = {  # by a network
    "sampler": SAMPLER,
    "num_params": whole(0, 10**15),
    "num_blocks": whole(1, BLOCKS),
    "kept_blocks": maybe(items(BLOCK, most=BLOCKS)),
}
EXTRA = {
    "name": NAME,
    "intervals": table(items(PLAIN, most=2, least=2)),
    "against_teacher": PAIRED,
    "against": table(PAIRED),
    "speed": SPEED,
    "note": text(),
    "seconds_per_clip": number(0),
    "batch": whole(1, CLIPS),
    "world": whole(1, 1_000),
    "seed": whole(0),
}
REAL, NETWORK = record(SCORED, EXTRA), record({**SCORED, **MADE}, EXTRA)


def EVALUATION(value: object) -> str:
    """The record of a model, perhaps with that of its teacher inside, or of real clips."""
    if not isinstance(value, dict):
        return REAL(value)
    own = {key: part for key, part in value.items() if key != "teacher"}
    if found := (NETWORK if "sampler" in value else REAL)(own):
        return found
    found = EVALUATION(value["teacher"]) if "teacher" in value else ""
    return inside("teacher", found) if found else ""


# what `evaluate videos=` and `evaluate data=CACHE` write
RANGES = table(items(PLAIN, most=2, least=2))
FOOTAGE = record(
    {
        "title": text(),
        "videos": text(),
        "real": text(),
        "clips": whole(0, CLIPS),
        "real_clips": whole(0, CLIPS),
        "size": items(whole(1, 1_000_000), most=3, least=3),
        "fps": number(0, 1_000, above=True),
        "scores": table(maybe(PLAIN)),
        "real_scores": table(maybe(PLAIN)),
        "intervals": RANGES,
        "unusual": items(record({"clip": text(), "score": NAME, "value": PLAIN, "real": PLAIN}), most=10_000),
    },
    {"network": maybe(text())},
)
OF_LATENTS = {"title": text(), "scores": table(maybe(PLAIN)), "intervals": RANGES, "seconds_per_clip": number(0)}
ON_CACHE = {**OF_LATENTS, "data": text(), "clips": whole(0, CLIPS)}
MORE = {
    "teacher": record(OF_LATENTS),
    "against_teacher": PAIRED,
    "model": text(),
    "data_hash": text(),
    "seed": whole(0),
}
LATENTS = record(ON_CACHE, MORE)
SWEPT = record({**ON_CACHE, "sampler": SAMPLER, "num_blocks": whole(1, BLOCKS)}, MORE)  # of a sweep, never older
