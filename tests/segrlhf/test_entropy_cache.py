import math
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from segrlhf import entropy_cache
from segrlhf.data.batch import SIDES
from segrlhf.entropy_cache import EntropyCache, Pairs, cache_directory, pair_sizes
from segrlhf.errors import DiskFullError, NonFiniteError, UserError
from segrlhf.models.packing import PackingConfig
from segrlhf.runtime import files


def forbid(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(entropy_cache, "load_causal_lm", loaded)


def test_entropies_are_those_of_each_response_alone(build_cache, pairs, tiny_lm):
    cache = build_cache(options=PackingConfig(max_tokens_per_batch=150))
    assert len(cache) == len(pairs)
    for i in (0, 7, len(pairs) - 1):
        for side, entropy in zip(SIDES, cache[i], strict=True):
            prompt, response = pairs[i]["prompt_ids"], pairs[i][f"{side}_ids"]
            with torch.no_grad():
                logits = tiny_lm(torch.tensor([prompt + response])).logits[0]
            # Logits at a position are the distribution of the token after it.
            of_response = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            expected = -(of_response.exp() * of_response).sum(-1)
            assert entropy.shape == (len(response),)
            np.testing.assert_allclose(entropy, expected, atol=2e-5)


def test_reading_a_finished_cache_needs_no_model(build_cache, monkeypatch):
    first = build_cache()
    forbid(monkeypatch)
    again = build_cache()
    assert again.directory == first.directory
    np.testing.assert_array_equal(again.response(3), first.response(3))


def test_a_build_that_was_cut_off_resumes_where_it_was(build_cache, monkeypatch, pairs):
    """And ends with the numbers of one that was not, to the bit."""
    options, real, read = PackingConfig(max_tokens_per_batch=150), entropy_cache.entropies, []

    def cut_off(*arguments):
        for number, found in enumerate(real(*arguments)):
            if number == 11:
                raise KeyboardInterrupt
            read.append(found[:2])
            yield found

    def rest(*arguments):
        for found in real(*arguments):
            read.append(found[:2])
            yield found

    monkeypatch.setattr(entropy_cache, "entropies", cut_off)
    with pytest.raises(KeyboardInterrupt):
        build_cache(options=options)
    monkeypatch.setattr(entropy_cache, "entropies", rest)
    cache = build_cache(options=options)
    assert cache.check(pair_sizes(pairs).responses.reshape(-1)) == []
    assert set(read) == {(pair, side) for pair in range(len(pairs)) for side in range(2)}
    assert len(read) < 2 * len(pairs) + 11  # what was cut off is read again, no more
    numbers = cache.stream(0, 2 * len(pairs))[0].numpy().copy()
    shutil.rmtree(cache.directory)
    again = build_cache(options=options)
    np.testing.assert_array_equal(again.stream(0, 2 * len(pairs))[0], numbers)


def test_a_response_that_was_half_written_is_computed_again(build_cache, pairs):
    """Killed after the numbers and before their checksum."""
    cache = build_cache()
    expected = np.array(cache.response(5))
    checksums = np.load(cache.directory / "checksums.npy")
    checksums[5] = 0
    np.save(cache.directory / "checksums.npy", checksums)
    numbers = np.load(cache.directory / "entropy.npy")
    numbers[cache._offsets[5] :][:2] = 7.0
    np.save(cache.directory / "entropy.npy", numbers)
    assert EntropyCache(cache.directory).check(pair_sizes(pairs).responses.reshape(-1)) == [5]
    again = build_cache()
    assert again.directory == cache.directory
    np.testing.assert_allclose(again.response(5), expected, atol=1e-6)
    assert len(list(cache.directory.parent.glob("*damaged*"))) == 0


def test_the_key_follows_model_tokenizer_template_and_data(
    tiny_lm, tiny_lm_dir, tokenizer, chat_tokenizer, pairs, tmp_path
):
    def key(model=tiny_lm_dir, tokenizer=tokenizer, pairs=pairs):
        return cache_directory(str(model), tokenizer, pairs, cache_dir=tmp_path)

    other = LlamaForCausalLM(tiny_lm.config)
    other.load_state_dict(tiny_lm.state_dict())
    other.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    assert key() == key(model=tmp_path / "same")
    reordered = pairs.select([*range(1, len(pairs)), 0])
    different = [
        key(),
        key(model=tmp_path / "other"),
        key(tokenizer=chat_tokenizer),
        key(pairs=reordered),
        key(pairs=pairs.select(range(3))),
    ]
    assert len(set(different)) == len(different)


def test_non_finite_entropy_names_the_row(build_cache, tiny_lm, pairs, tmp_path):
    broken = LlamaForCausalLM(tiny_lm.config)
    broken.load_state_dict(tiny_lm.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight[pairs[1]["rejected_ids"][-2]] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteError, match=r"got nan at token \d+ of the response of row \d+ \("):
        build_cache(model=tmp_path / "broken")


def one_number(value):
    def change(numbers):
        numbers[len(numbers) // 2] = value
        return numbers

    return change


# File of the cache -> what may have become of its array.
DAMAGE = {
    "entropy.npy": {
        "negated": np.negative,
        "of another type": lambda x: x.astype(np.float64),
        "of another byte order": lambda x: x.astype(">f4"),
        "of another shape": lambda x: x[None],
        "too short": lambda x: x[:-1],
        "too long": lambda x: np.append(x, np.float32(1)),
        "in another order": lambda x: x[::-1].copy(),
        "all zero": np.zeros_like,
        **{f"with {value}": one_number(value) for value in (math.nan, math.inf, -1.0, 0.125)},
    },
    "offsets.npy": {
        "shifted": lambda x: np.concatenate([x[:1], x[1:-1] + 1, x[-1:]]),
        "falling": lambda x: x[::-1].copy(),
        "of fewer responses": lambda x: x[:-2],
        "of another type": lambda x: x.astype(np.int32),
        "empty": lambda x: x[:0],
    },
    "checksums.npy": {
        "of another type": lambda x: x.astype(np.float64),
        "of fewer responses": lambda x: x[:-1],
        "with another number": one_number(17),
    },
}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        *(
            pytest.param(name, change, id=f"{name} {how}")
            for name, changes in DAMAGE.items()
            for how, change in changes.items()
        ),
        *((name, None) for name in (*DAMAGE, "meta.json")),
    ],
)
def test_a_damaged_cache_is_set_aside_and_built_again(file, change, build_cache, capsys, pairs):
    cache = build_cache()
    expected = np.array(cache._entropy)
    path = cache.directory / file
    if change is not None:
        np.save(path, change(np.load(path)))
    for half in (False, True) if change is None else (False,):  # gone, then cut off
        if half:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif change is None:
            path.unlink()
        again = build_cache()
        assert again.directory == cache.directory
        np.testing.assert_allclose(again._entropy, expected, atol=1e-6)
        said = capsys.readouterr().out
        number = 1 + half
        aside = cache.directory.with_name(f"{cache.directory.name}.damaged-{number}")
        assert "entropy cache: expected" in said
        assert f"set aside as {aside} and is built again" in said
        assert aside.is_dir()


@pytest.mark.parametrize(
    "meta", ['{"format": 1, "pairs": 24}', '{"complete": true}', "[]", "7", '"x', "\x00"]
)
def test_a_cache_of_another_format_is_not_read(meta, build_cache):
    cache = build_cache()
    (cache.directory / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"entropy cache: expected meta\.json, .* in .*, got .*"):
        EntropyCache(cache.directory)


def test_weights_must_be_safetensors(build_cache, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"expected \*\.safetensors weights, got none in .*bare"):
        build_cache(model=tmp_path / "bare")


def test_pairs_carry_their_number_and_entropies(build_cache, pairs):
    cache = build_cache()
    row = Pairs(pairs, cache)[4]
    assert row["row"] == 4
    np.testing.assert_array_equal(row["rejected_entropy"], cache[4][1])
    assert "chosen_entropy" not in Pairs(pairs)[4]


def test_a_disk_that_fills_up_leaves_no_cache(tmp_path):
    """A limit on the size of files stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DiskFullError, match="disk full while saving the entropy cache in"):
            EntropyCache.create(tmp_path / "cache" / "key", np.full(20, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").iterdir())


def test_a_small_disk_is_no_bus_error(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of 1 MiB cannot be mounted here: that needs root")
    code = (
        "import sys, pathlib, numpy; from segrlhf.entropy_cache import EntropyCache\n"
        "EntropyCache.create(pathlib.Path(sys.argv[1], 'key'), numpy.full(20, 100_000))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "DiskFullError: disk full while saving the entropy cache" in done.stderr
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_what_a_killed_build_left_is_cleared(build_cache, tmp_path):
    key = build_cache().directory
    left = files.temporary_path(key, "new")
    other = files.temporary_path(key.with_name("another"), "new")  # perhaps being built
    for path in (left, other):
        path.mkdir()
    build_cache()
    assert (left.exists(), other.exists()) == (False, True)
