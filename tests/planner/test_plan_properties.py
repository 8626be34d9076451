"""The planner for random runs: more of anything never costs less, and the answer comes at once."""

import time
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fastlightgen.config.plan import plan_root
from fastlightgen.models.families import network
from fastlightgen.models.folder.networks import config_of
from fastlightgen.planner.budget import budget
from fastlightgen.planner.remedies import remedies

SECONDS = 10  # of computing, for one plan: a hundred times what it takes
CONFIG = {name: config_of(name) for name in ("wan2.1-t2v-1.3b", "hunyuanvideo-t2v")}
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 60).map(lambda n: 2 * n), st.integers(1, 60).map(lambda n: 2 * n))


@st.composite
def runs(draw):
    """(configuration of a network, latent size, tokens of text, plan) of a run on one GPU, a cluster or a CPU."""
    stage, gpus = draw(st.sampled_from("0123")), draw(st.sampled_from([1, 2, 8, 64]))
    words = {"engine": "local" if gpus == 1 and draw(st.booleans()) else "deepspeed", "gpus": gpus}
    words |= {"gpu": draw(st.sampled_from(["h100", "4090", "cpu"])), "batch": gpus * draw(st.integers(1, 8))}
    if stage == "1":
        words |= {"memory": 1e6}  # less of it walks fewer candidates together, which takes less memory and more time
    else:
        words |= {"checkpointing": draw(st.booleans()), "iters": draw(st.integers(200, 10**9))}
    if words["engine"] == "deepspeed":
        words |= {"zero": draw(st.integers(1, 3))}
        words |= {"offload": draw(st.sampled_from(["none", "optimizer"]))}
    name = draw(st.sampled_from(sorted(CONFIG)))
    config = CONFIG[name] | {"num_layers": draw(st.integers(4, 40))}
    plan = plan_root(stage)(model=name, **words)
    return config, draw(SIZES), draw(st.integers(1, 600)), plan


def costs(config, latent, text, plan) -> tuple[float, ...]:
    b = budget(network(config, latent, text, True), plan)
    return b.peak, b.host_peak, b.flops * b.iters, b.calls, b.gpu_days


@tried(40)
@given(runs(), st.sampled_from(["frames", "height", "width", "text", "layers", "batch", "iters"]), st.integers(2, 5))
def test_more_never_costs_less(run, what, times):
    config, (frames, height, width), text, plan = run
    before = costs(config, (frames, height, width), text, plan)
    if what in ("batch", "iters"):
        if what not in vars(plan):
            return
        plan = replace(plan, **{what: min(vars(plan)[what] * times, 10**9)})
    frames, height, width = (n * (times if what == name else 1) for n, name in
                             ((frames, "frames"), (height, "height"), (width, "width")))  # fmt: skip
    text *= times if what == "text" else 1
    config = config | {"num_layers": config["num_layers"] + (times if what == "layers" else 0)}
    after = costs(config, (frames, height, width), text, plan)
    # sums of many parts in another order
    assert all(a >= b * (1 - 1e-12) for a, b in zip(after, before)), (what, before, after)


@tried(25)
@given(runs(), st.floats(1e6, 1e12))
def test_remedies_end_and_each_saves(run, room):
    config, latent, text, plan = run
    net = network(config, latent, text, True)
    began, last = time.process_time(), budget(net, plan).peak
    for change, after in remedies(net, plan, room):
        assert change and after.peak < last
        last = after.peak
    assert time.process_time() - began < SECONDS
