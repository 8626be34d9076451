"""Latent caches: what is written is what is read, training from one equals training from its clips, damage is named."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlightgen.data.cache import Cache, write_cache
from fastlightgen.data.source import CacheSource, ShapesSource, open_source

SHARDS, PER_SHARD = 3, 5
CLIPS = SHARDS * PER_SHARD


def fields(batch) -> dict[str, torch.Tensor]:
    return {"latents": batch.x0, "text": batch.cond.text, "text_len": batch.cond.text_len, "image": batch.cond.image}


@pytest.fixture
def folder(tmp_path):
    """A cache of the first clips of the built-in world, with its empty prompt."""
    source = ShapesSource(0)
    null = source.batch(0, 1).null
    shards = [fields(source.batch(step, PER_SHARD)) for step in range(SHARDS)]
    write_cache(
        tmp_path / "cache", shards, {"text": null.text[0], "text_len": null.text_len[0]}, world="shapes", frames=8
    )
    return tmp_path / "cache"


def test_round_trip(folder):
    cache, source = Cache(folder), ShapesSource(0)
    wanted = fields(source.batch(0, CLIPS))
    assert len(cache) == CLIPS and cache.description == {"world": "shapes", "frames": 8}
    order = [14, 0, 7, 7, 3]
    got = cache.read(order)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value[order])
    assert not [p for p in folder.iterdir() if "tmp" in p.name]


def test_fields_keep_their_types(tmp_path):
    latents = torch.randn(3, 2, 1, 2, 2).bfloat16()
    write_cache(
        tmp_path / "c", [{"latents": latents, "pooled": torch.arange(6.0).view(3, 2)}], {"pooled": torch.zeros(2)}
    )
    got = Cache(tmp_path / "c").read([2, 1])
    assert got["latents"].dtype == torch.bfloat16 and torch.equal(got["latents"], latents[[2, 1]])
    assert got["pooled"].tolist() == [[4.0, 5.0], [2.0, 3.0]]


def test_batches_are_the_clips_of_the_world(folder):
    source = open_source(str(folder), seed=3)
    world = fields(ShapesSource(0).batch(0, CLIPS))
    batch = source.batch(2, 4)
    empty = ShapesSource(0).batch(0, 4).null
    assert torch.equal(batch.null.text, empty.text) and torch.equal(batch.null.text_len, empty.text_len)
    assert torch.equal(batch.null.image, batch.cond.image)  # the null prompt keeps the first frame
    for i in range(4):
        place = [n for n in range(CLIPS) if torch.equal(world["latents"][n], batch.x0[i])]
        assert len(place) == 1
        assert all(torch.equal(fields(batch)[key][i], world[key][place[0]]) for key in world)
    again = CacheSource(Cache(folder), seed=3).batch(2, 4)
    assert torch.equal(again.x0, batch.x0)
    assert not torch.equal(CacheSource(Cache(folder), seed=4).batch(2, 4).x0, batch.x0)


def test_every_epoch_shows_every_clip_once_and_never_a_held_out_one(folder):
    source = CacheSource(Cache(folder), seed=0)
    world = fields(ShapesSource(0).batch(0, CLIPS))["latents"].flatten(1)
    train = CLIPS - 1  # a tenth, at least one, is held out

    def number(x):
        return int((world == x.flatten()).all(1).nonzero())

    seen = [number(x) for step in range(12) for x in source.batch(step, 7).x0]
    assert len(seen) == 6 * train
    epochs = [seen[e * train : (e + 1) * train] for e in range(6)]
    assert all(Counter(e) == Counter(range(train)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 6
    assert [number(x) for x in source.held_out(0, 3).x0] == [train] * 3


def test_a_batch_larger_than_an_epoch(folder):
    source = CacheSource(Cache(folder), seed=0)
    whole = torch.cat([source.batch(step, 7).x0 for step in range(6)])
    assert torch.equal(source.batch(0, 42).x0, whole)


def test_digest_follows_the_content(folder, tmp_path):
    shards = [fields(ShapesSource(0).batch(step, PER_SHARD)) for step in range(SHARDS)]
    null = {"text": ShapesSource(0).batch(0, 1).null.text[0]}
    write_cache(tmp_path / "same", shards, null, world="shapes", frames=8)
    shards[1]["latents"][2, 0, 0, 0, 0] += 1
    write_cache(tmp_path / "other", shards, null, world="shapes", frames=8)
    digests = [Cache(f).digest for f in (folder, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]


def test_a_cache_is_not_overwritten(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="already holds a latent cache; choose another folder"):
        write_cache(folder, [], {})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_an_interrupted_write_is_no_cache_and_can_be_repeated(tmp_path):
    def shards():
        yield fields(ShapesSource(0).batch(0, 2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path, shards(), {})
    with pytest.raises(ValueError, match="index.json: not a latent cache"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match="neither `shapes` nor a folder with a latent cache"):
        open_source(str(tmp_path), 0)
    write_cache(tmp_path, [fields(ShapesSource(0).batch(0, 2))], {"text": torch.zeros(16, 48)})
    assert len(Cache(tmp_path)) == 2


@pytest.mark.parametrize("how", ["truncated", "missing", "shorter than the index says"])
def test_a_damaged_shard_is_named(folder, how):
    shard = folder / "shard-00001.safetensors"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "missing":
        shard.unlink()
    else:
        save_file({k: v[:2] for k, v in load_file(shard).items()}, shard)
    cache = Cache(folder)
    assert len(cache.read([0, 14])["latents"]) == 2  # the other shards can still be read
    with pytest.raises(ValueError, match="shard-00001.safetensors: damaged or missing .*; make the cache again"):
        cache.read([0, 9])


def test_a_damaged_null_prompt_is_named(folder):
    (folder / "null.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="null.safetensors: cannot be read"):
        Cache(folder)


def test_foreign_fields_are_refused(tmp_path):
    write_cache(tmp_path / "a", [{"latents": torch.zeros(2, 1, 1, 2, 2), "audio": torch.zeros(2, 3)}], {})
    with pytest.raises(
        ValueError, match=r"fields \['audio', 'latents'\]; wanted latents and fields among latents, text"
    ):
        Cache(tmp_path / "a").read([0])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"shards": [{"file": "../secret.safetensors", "clips": 1}]}, "names files outside its folder"),
        ({"shards": [{"file": "/etc/passwd", "clips": 1}]}, "names files outside its folder"),
        ({"shards": [{"file": "..", "clips": 1}]}, "names files outside its folder"),
        ({"shards": [{"clips": 1}]}, "not a latent cache"),
        ({"shards": [{"file": "a", "clips": "many"}]}, "not a latent cache"),
        ({"shards": 3}, "not a latent cache"),
        ({"description": None}, "not a latent cache"),
        ({"format": 3}, "cache format 3, this version reads 1 and 2"),
    ],
)
def test_a_bad_index_is_named(folder, change, said):
    index = json.loads((folder / "index.json").read_text()) | change
    if change.get("description", 0) is None:
        del index["description"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=said) as error:
        Cache(folder)
    assert str(folder) in str(error.value)


def test_too_few_clips(tmp_path):
    write_cache(tmp_path / "one", [fields(ShapesSource(0).batch(0, 1))], {"text": torch.zeros(16, 48)})
    with pytest.raises(ValueError, match="1 clips; at least 2 are needed"):
        CacheSource(Cache(tmp_path / "one"), 0)
