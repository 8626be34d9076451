"""Latent caches: reading returns the written clips, training equals training from clips, damage is named."""

import json
import zlib
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlightgen.data.cache import Cache, write_cache
from fastlightgen.data.source import CacheSource
from fastlightgen.world.source import ShapesSource, open_source

SHARDS, PER_SHARD = 3, 5
CLIPS = SHARDS * PER_SHARD


def fields(batch) -> dict[str, torch.Tensor]:
    return {"latents": batch.x0, "text": batch.cond.text, "text_len": batch.cond.text_len, "image": batch.cond.image}


@pytest.fixture
def folder(tmp_path):
    """A cache of the first clips of the built-in world, with the empty prompt as null prompt."""
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
    train = CLIPS - 1  # a tenth, but at least one, is held out

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
    null = ShapesSource(0).batch(0, 1).null
    null = {"text": null.text[0], "text_len": null.text_len[0]}
    write_cache(tmp_path / "same", shards, null, world="shapes", frames=8)
    shards[1]["latents"][2, 0, 0, 0, 0] += 1
    write_cache(tmp_path / "other", shards, null, world="shapes", frames=8)
    digests = [Cache(f).digest for f in (folder, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]
    write_cache(tmp_path / "third", shards[:1], {"text": null["text"] + 1}, world="shapes", frames=8)
    write_cache(tmp_path / "fourth", shards[:1], null, world="shapes", frames=8)
    assert Cache(tmp_path / "third").digest != Cache(tmp_path / "fourth").digest  # another null prompt is other data


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "null.safetensors"])
def test_a_file_of_another_cache_is_refused(folder, tmp_path, name):
    """Same description, same sizes, other clips and prompt: the checksums in the index tell."""
    source = ShapesSource(1)
    null = {"text": torch.ones(16, 48), "text_len": torch.tensor(16)}
    shards = [fields(source.batch(step, PER_SHARD)) for step in range(SHARDS)]
    write_cache(tmp_path / "other", shards, null, world="shapes", frames=8)
    (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ValueError, match=f"{name}: .*of another cache.*make the cache again"):
        Cache(folder).read([PER_SHARD])


def test_a_shard_counts_once_and_holds_what_the_index_says(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"shards": index["shards"][:1] * 2}))
    with pytest.raises(ValueError, match="names a shard twice"):
        Cache(folder)
    index["shards"][0]["clips"] = 10**8
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="says that shard-00000.safetensors holds 100000000 clips, but it has"):
        Cache(folder)


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
    with pytest.raises(ValueError, match="index.json: not found; give the folder of a latent cache"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match="neither `shapes` nor a folder with a latent cache"):
        open_source(str(tmp_path), 0)
    with pytest.raises(ValueError, match="negative=official: the built-in world has no official negative prompt"):
        open_source("shapes", 0, "official")
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
    if how == "missing":
        with pytest.raises(ValueError, match="shard-00001.safetensors: not found; make the cache again"):
            Cache(folder)
        return
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
        ({"shards": [{"clips": 1}]}, "give the folder of a latent cache"),
        ({"shards": [{"file": "a", "clips": "many"}]}, "give the folder of a latent cache"),
        ({"shards": 3}, "give the folder of a latent cache"),
        ({"description": None}, "give the folder of a latent cache"),
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
    with pytest.raises(ValueError, match="1 clips; at least 2 of equal size are needed"):
        CacheSource(Cache(tmp_path / "one"), 0)


@pytest.fixture
def mixed(tmp_path):
    """A cache with 8 clips of one size, whose first latents are 0..7, and 3 of another size, 100..102."""

    def shard(first, count, *size):
        latents = torch.zeros(count, 1, 2, *size)
        latents[:, 0, 0, 0, 0] = torch.arange(first, first + count)
        return {"latents": latents, "text": torch.zeros(count, 1, 4)}

    shards = [shard(0, 5, 2, 4), shard(100, 3, 4, 2), shard(5, 3, 2, 4)]
    write_cache(tmp_path / "mixed", shards, {"text": torch.ones(1, 4)})
    return tmp_path / "mixed"


def test_batches_never_mix_sizes_and_show_every_clip(mixed):
    source = CacheSource(Cache(mixed), seed=0)
    drawn = [source.batch(step, 2).x0 for step in range(60)]
    seen = Counter(int(v) for x in drawn for v in x[:, 0, 0, 0, 0])
    # A cycle has 3.5 -> 4 batches of the 7 clips and 1.5 -> 2 of the 3: 40 and 20 of 60 steps, spread evenly over clips
    assert sum(x.shape[-2:] == (2, 4) for x in drawn) == 40
    assert set(seen) == {*range(7), 100, 101, 102}
    assert {seen[i] for i in range(7)} <= {11, 12} and {seen[i] for i in (100, 101, 102)} <= {13, 14}
    assert [int(x) for x in source.held_out(0, 3).x0[:, 0, 0, 0, 0]] == [7, 7, 7]
    again = CacheSource(Cache(mixed), seed=0)
    for step in (59, 3, 17):  # batches depend on the step alone
        assert torch.equal(again.batch(step, 2).x0, drawn[step])


def test_texts_are_filled_up(tmp_path):
    shards = [{"latents": torch.zeros(1, 1, 1, 2, 2), "text": torch.ones(1, n, 3)} for n in (2, 4)]
    write_cache(tmp_path / "c", shards, {"text": torch.ones(1, 3)}, text_tokens=5)
    cache = Cache(tmp_path / "c")
    assert cache.read([0, 1])["text"].sum((1, 2)).tolist() == [6.0, 12.0]
    assert cache.read([0])["text"].shape == (1, 5, 3) and cache.null["text"].shape == (5, 3)


def test_one_flipped_bit_is_named_once(folder):
    """Checksums are verified when a clip is first read; the crc of clip 6 is computed here by hand."""
    shard = folder / "shard-00001.safetensors"
    tensors = load_file(shard)
    cache = Cache(folder)
    crc = 0
    for key in sorted(tensors):
        crc = zlib.crc32(tensors[key][1].numpy().tobytes(), crc)
    assert cache.sample(6)["crc32"] == crc
    content = bytearray(shard.read_bytes())
    content[content.index(tensors["latents"][1].numpy().tobytes()) + 40] ^= 1
    shard.write_bytes(content)
    assert len(cache.read([5, 7])["latents"]) == 2
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: clip 1 is damaged \(its checksum is wrong\)"):
        cache.read([6])


def test_a_cache_of_the_first_format_can_be_read(tmp_path):
    """A cache in format 1, which had no sizes and no metadata, can still be read."""
    save_file(
        {"latents": torch.arange(8.0).view(2, 1, 1, 2, 2), "text": torch.ones(2, 1, 4)}, tmp_path / "s.safetensors"
    )
    save_file({"text": torch.zeros(1, 4)}, tmp_path / "null.safetensors")
    index = {"format": 1, "description": {}, "shards": [{"file": "s.safetensors", "clips": 2, "sha256": "-"}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    source = open_source(str(tmp_path), 0)
    assert source.batch(0, 1).x0.flatten().tolist() == [0, 1, 2, 3]
    assert source.held_out(0, 1).x0.flatten().tolist() == [4, 5, 6, 7]
    assert source.cache.groups() == [[0, 1]]
