"""The embeddable API on random checkpoints of both families: reuse, threads, cancelling, closing, saving.

The oracle for a question on a used clip is the same question on a clip that was just opened, whose prompt is computed
from nothing; what that computes is compared with transformers in test_network.
"""

import asyncio
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.errors import Cancelled, CheckpointError, ConfigError, MediaError, OutOfMemoryError
from mlxvr.media import load_vision
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from tests.checkpoints import overflow_float16, write_checkpoint
from tests.clips import write_clip
from tests.test_network import write_adapter

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
MODEST = {"fps": 2.0, "video_tokens": 64}


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=90, fps=30, size=(160, 112))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def reasoner(request, folders):
    with mlxvr.load(folders[request.param]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def demo():
    with mlxvr.load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def qwen3(folders):
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        yield loaded


def assert_same(one, other):
    assert one.token_ids == other.token_ids
    np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-4)


def test_a_follow_up_equals_a_fresh_prompt(reasoner, clip_path):
    asked = {"mode": "think", "max_tokens": 24}
    used = reasoner.open(clip_path, **MODEST)
    first = used.ask("What is the first thing that happens here?", **asked)
    second = used.ask("Which?", options=["left", "right"], **asked)
    third = used.ask("the box is open", kind="grounding", **asked)
    again = used.ask("What is the first thing that happens here?", **asked)
    assert_same(again, first)
    assert_same(second, reasoner.ask(clip_path, "Which?", options=["left", "right"], **MODEST, **asked))
    assert_same(third, reasoner.ask(clip_path, "the box is open", kind="grounding", **MODEST, **asked))
    assert first.usage.cached_tokens == 0
    assert first.usage.media_seconds > 0
    assert first.usage.vision_seconds > 0
    for later in (second, third, again):
        assert later.usage.cached_tokens > later.usage.video_tokens > 0
        assert later.usage.media_seconds == later.usage.vision_seconds == 0


def test_a_small_prefill_step_gives_the_same_answer(folders, clip_path):
    answers = []
    for step in (7, 2048):
        with mlxvr.load(folders["qwen3_vl"], prefill_step_size=step) as loaded:
            answers.append(loaded.ask(clip_path, "What?", mode="think", max_tokens=24, **MODEST))
    assert_same(*answers)


def test_the_modes_generate_one_sequence(demo):
    """With a model that closes its boxes: each mode stops where it should, in the same tokens."""
    clip = demo.open(demo_folder() / "clips" / "clip00.mp4")
    question = {"question": "After all swaps, where is the ball?", "options": ["left", "right", "middle"]}
    long = clip.ask(**question, mode="think")
    assert long.reasoned
    assert long.second is not None
    direct = clip.ask(**question, mode="direct")
    sure, unsure = clip.ask(**question, threshold=0.0), clip.ask(**question, threshold=1.0)
    assert direct.token_ids == sure.token_ids == long.token_ids[: direct.usage.first_answer_tokens]
    assert len(direct.token_ids) < len(long.token_ids)
    assert unsure.token_ids == long.token_ids
    assert (direct.reasoned, sure.reasoned, unsure.reasoned) == (False, False, True)


def test_usage_counts_what_was_done(qwen3, clip_path):
    clip = qwen3.open(clip_path, **MODEST)
    answer = clip.ask("What?", mode="think", max_tokens=9)
    t, h, w = clip.grid
    assert len(clip.seconds) == t == 3  # 90 frames at 30 fps, 2 a second: 6 frames, in pairs
    assert answer.usage.video_tokens == t * h * w // 4
    assert answer.usage.first_answer_tokens + answer.usage.reasoning_tokens == len(answer.token_ids) == 9
    assert len(answer.token_logprobs) == 9
    assert answer.usage.prompt_tokens > answer.usage.video_tokens
    assert answer.usage.peak_memory_bytes > 0
    assert "token_limit" in answer.problems
    assert max(answer.token_logprobs) <= 0
    json.dumps(answer.to_dict())


def test_leaving_a_stream_keeps_the_clip_usable(reasoner, clip_path):
    clip = reasoner.open(clip_path, **MODEST)
    events = clip.stream("What?", mode="think", max_tokens=2000)
    events.close()
    asked = {"mode": "think", "max_tokens": 16}
    assert_same(clip.ask("Which?", **asked), reasoner.ask(clip_path, "Which?", **MODEST, **asked))


def test_any_thread_may_ask(reasoner, clip_path):
    clip = reasoner.open(clip_path, **MODEST)
    alone = {n: clip.ask(f"Number {n}?", mode="think", max_tokens=8).token_ids for n in range(6)}
    together = {}
    threads = [
        threading.Thread(
            target=lambda n=n: together.update({n: clip.ask(f"Number {n}?", mode="think", max_tokens=8).token_ids})
        )
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_cancel_stops_a_long_answer_and_the_clip_goes_on(qwen3, clip_path):
    clip = qwen3.open(clip_path, **MODEST)
    before = clip.ask("What?", mode="think", max_tokens=8)
    # Hot sampling on random weights: it would take thousands of tokens to end by itself.
    events = clip.stream("What?", mode="think", max_tokens=100_000, temperature=5.0, seed=1)
    time.sleep(0.1)
    qwen3.cancel()
    with pytest.raises(Cancelled):
        list(events)
    assert_same(clip.ask("What?", mode="think", max_tokens=8), before)


def test_a_stream_that_nobody_reads_does_not_run_on(qwen3, clip_path):
    """Closed or dropped before its first event: a question of 4,000 tokens holds nobody up."""
    asked = {"mode": "think", "max_tokens": 4000, "temperature": 5.0, "seed": 1}
    clip = qwen3.open(clip_path, **MODEST)
    expected = clip.ask("Which?", mode="think", max_tokens=8)
    started = time.perf_counter()
    clip.ask("What?", **{**asked, "max_tokens": 100})
    hundred = time.perf_counter() - started
    for leave in (lambda stream: stream.close(), lambda stream: None):
        started = time.perf_counter()
        leave(clip.stream("What?", **asked))
        assert_same(clip.ask("Which?", mode="think", max_tokens=8), expected)
        assert time.perf_counter() - started < 10 * hundred  # the whole answer takes 40


def test_an_event_loop_asks_on_a_thread_and_stops_one_question(qwen3, clip_path):
    clip = qwen3.open(clip_path, **MODEST)
    expected = clip.ask("Which?", mode="think", max_tokens=8)

    async def run():
        endless = clip.stream("What?", mode="think", max_tokens=100_000, temperature=5.0, seed=1)
        reading = asyncio.create_task(asyncio.to_thread(list, endless))
        asking = asyncio.create_task(asyncio.to_thread(clip.ask, "Which?", mode="think", max_tokens=8))
        await asyncio.sleep(0.1)
        assert not reading.done()
        assert not asking.done()  # it waits for the one before
        await asyncio.to_thread(endless.close)
        with pytest.raises(Cancelled):
            await reading
        return await asking

    assert_same(asyncio.run(asyncio.wait_for(run(), 60)), expected)


def test_two_models_on_two_threads_answer_as_each_does_alone(folders, clip_path):
    """200 questions; two threads that evaluate at once would crash the process on Metal and CUDA."""
    questions = [f"What is number {number}?" for number in range(10)]
    asked = {"mode": "think", "max_tokens": 3}
    expected, together = {}, {}
    for family in FAMILIES:
        with mlxvr.load(folders[family]) as loaded:
            clip = loaded.open(clip_path, **MODEST)
            expected[family] = [clip.ask(question, **asked).token_ids for question in questions]

    def work(loaded, family):
        clip = loaded.open(clip_path, **MODEST)
        together[family] = [[clip.ask(question, **asked).token_ids for question in questions] for _ in range(10)]

    with mlxvr.load(folders[FAMILIES[0]]) as first, mlxvr.load(folders[FAMILIES[1]]) as second:
        threads = [threading.Thread(target=work, args=pair) for pair in zip((first, second), FAMILIES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for family in FAMILIES:
        assert together[family] == [expected[family]] * 10


def test_closing_one_reasoner_leaves_the_other_at_work(folders, clip_path):
    asked = {"mode": "think", "max_tokens": 60, "temperature": 5.0, "seed": 1}
    with mlxvr.load(folders["qwen3_vl"]) as first:
        clip = first.open(clip_path, **MODEST)
        expected = clip.ask("What?", **asked)
        for end in (mlxvr.Reasoner.cancel, mlxvr.Reasoner.close):
            with mlxvr.load(folders["qwen2_5_vl"]) as second:
                theirs = second.open(clip_path, **MODEST).stream("What?", **{**asked, "max_tokens": 100_000})
                mine = clip.stream("What?", **asked)
                end(second)
                with pytest.raises(Cancelled):
                    list(theirs)
                *_, answer = mine
                assert_same(answer, expected)


@pytest.mark.slow
def test_loading_asking_and_closing_a_hundred_times_leaves_nothing():
    """Memory is flat and no thread is left: MLX's streams and compiled functions belong to threads."""
    script = """
import gc, json, sys, threading
import mlx.core as mx
import mlxvr
import numpy as np

picture = np.full((64, 64, 3), 100, np.uint8)
figures = []
for cycle in range(100):
    with mlxvr.load(dtype="float32") as reasoner:
        answer = reasoner.open(picture).ask("What is the colour?", mode="direct", max_tokens=8)
    del reasoner
    gc.collect()
    if cycle == 0:
        gc.freeze()  # what was imported is not looked through in each cycle
    pages = int(open("/proc/self/statm").read().split()[1]) if sys.platform == "linux" else 0
    figures.append((mx.get_active_memory(), mx.get_cache_memory(), threading.active_count(), answer.text, pages * 4096))
print(json.dumps(figures))
"""
    # glibc gives new threads one of many heaps in turn, and each keeps what it once had: with one heap leaks show alone
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    active, cached, threads, texts, resident = zip(*figures)
    assert set(threads) == {1}
    assert max(cached) < 1024
    assert len(set(texts)) == 1
    assert max(active) == active[0] < 10_000
    assert resident[-1] - resident[19] < 20 * 2**20  # the weights are 8 MB; a leak of one cycle in thirty would show


def test_sampling_is_repeatable_and_confidence_untempered(qwen3, clip_path):
    clip = qwen3.open(clip_path, **MODEST)
    asked = {"mode": "think", "max_tokens": 12}
    drawn = clip.ask("What?", temperature=1.5, seed=3, **asked)
    assert_same(drawn, clip.ask("What?", temperature=1.5, seed=3, **asked))
    assert clip.ask("What?", temperature=1.5, seed=4, **asked).token_ids != drawn.token_ids
    greedy = clip.ask("What?", **asked)
    nearly = clip.ask("What?", temperature=1e-4, seed=0, **asked)
    assert_same(nearly, greedy)  # the log-probabilities too: they are read at temperature 1


def test_what_is_asked_of_decoding_reaches_it(qwen3, clip_path, monkeypatch):
    """Sampling, its seed, the bits of keys and values, the end of the context."""
    given = {}

    def decode(network, logits, cache, position, *, max_tokens, sampler, **others):
        given.update(max_tokens=max_tokens, sampler=sampler, bits=getattr(cache[0], "bits", None))
        return (token for token in ())

    clip = qwen3.open(clip_path, **MODEST)
    monkeypatch.setattr("mlxvr.model.decode.decode", decode)
    clip.ask("What?", temperature=0.5, top_p=0.25, seed=3, max_tokens=9)
    assert (given["max_tokens"], given["bits"]) == (9, None)
    assert (given["sampler"].temperature, given["sampler"].top_p) == (0.5, 0.25)
    clip.ask("What?", max_tokens=10**9)
    room = qwen3._network.context_length - clip.ask("What?").usage.prompt_tokens
    assert given["sampler"] is None
    clip.ask("What?", max_tokens=10**9)
    assert given["max_tokens"] == room
    monkeypatch.setattr(qwen3, "kv_bits", 4)
    qwen3.open(clip_path, **MODEST).ask("What?")
    assert given["bits"] == 4


def test_reading_frames_can_be_cancelled(qwen3, clip_path, monkeypatch):
    def read(source, spec, selection, hooks):
        assert not hooks.should_stop()
        qwen3.cancel()
        assert hooks.should_stop()
        raise Cancelled("reading")

    with monkeypatch.context() as patch:
        patch.setattr("mlxvr.reasoner.reasoner.load_vision", read)
        with pytest.raises(Cancelled, match="reading"):
            qwen3.open(clip_path, **MODEST)
    assert qwen3.open(clip_path, **MODEST).grid[0] == 3


def test_a_reasoner_and_its_clips_say_what_they_are(folders, clip_path, saved_clip, caplog):
    with mlxvr.load(folders["qwen3_vl"], kv_bits=4) as loaded, caplog.at_level("DEBUG", "mlxvr.reasoner"):
        assert repr(loaded) == f"<Reasoner {folders['qwen3_vl']} (qwen3_vl), threshold 0.98>"
        clip = loaded.open(clip_path, **MODEST)
        assert clip.path == clip_path
        # 90 frames at 30 a second, 2 a second: 0, 17.8, 35.6, 53.4, 71.2, 89, in pairs
        assert repr(clip) == f"<Clip {clip_path}: 3 pairs of frames from 0.30 to 2.67 s, asked of {loaded!r}>"
        image = loaded.open(np.zeros((56, 56, 3), np.uint8))
        assert (image.path, repr(image)) == (None, f"<Clip an image, asked of {loaded!r}>")
        assert repr(loaded.open(None)) == f"<Clip text alone, asked of {loaded!r}>"
        assert repr(loaded.restore(saved_clip)).startswith(f"<Clip restored from {saved_clip}: 3 pairs of frames")
        caplog.clear()
        for _ in range(2):
            answer = clip.ask("What?", max_tokens=3)
    said = caplog.messages
    assert said[0].startswith(f"first prompt of {answer.usage.prompt_tokens} tokens, 0 of them reused, in ")
    assert said[1] == "confidence None at threshold 0.98, mode auto: went on to the end after 3 tokens"
    assert said[2].startswith(
        f"prompt of {answer.usage.prompt_tokens} tokens, {answer.usage.cached_tokens} of them reused"
    )
    assert repr(loaded) == f"<Reasoner {folders['qwen3_vl']}, closed>"


def test_close_ends_everything(folders, clip_path):
    loaded = mlxvr.load(folders["qwen3_vl"])
    clip = loaded.open(clip_path, **MODEST)
    clip.ask("What?", max_tokens=4)
    loaded.close()
    loaded.close()
    for use in (
        lambda: clip.ask("What?"),
        lambda: loaded.open(clip_path),
        lambda: loaded.ask(clip_path, "What?"),
        lambda: clip.save("nowhere"),
    ):
        with pytest.raises(ConfigError, match="closed"):
            use()
    clip.close()


def test_close_gives_the_memory_back_while_clips_are_still_held(folders, clip_path):
    import mlx.core as mx

    gc.collect()
    before = mx.get_active_memory()
    loaded = mlxvr.load(folders["qwen3_vl"])
    weights = mx.get_active_memory() - before
    clips = [loaded.open(clip_path, **MODEST) for _ in range(2)]
    for clip in clips:
        clip.ask("What?", max_tokens=4)
    gc.collect()
    held = mx.get_active_memory() - before
    loaded.close()
    assert weights > 100_000
    assert held > weights + 100_000
    assert mx.get_active_memory() - before < weights / 20
    assert mx.get_cache_memory() < 4096  # a GPU's backend keeps some words of its own
    assert clips[0].grid == clips[1].grid  # the clips are there; what they computed is gone


def test_a_forgotten_reasoner_gives_its_memory_back(folders, clip_path):
    import mlx.core as mx

    gc.collect()
    before = mx.get_active_memory()
    loaded = mlxvr.load(folders["qwen3_vl"])
    loaded.ask(clip_path, "What?", max_tokens=4, **MODEST)
    ended = loaded._worker._queue.ended
    del loaded
    gc.collect()
    assert ended.wait(10)
    assert mx.get_active_memory() - before < 10_000


def test_a_saved_clip_needs_no_video(folders, clip_path, tmp_path):
    file = tmp_path / "clip.safetensors"
    asked = {"mode": "think", "max_tokens": 16}
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        clip.save(file)
        expected = clip.ask("What?", **asked)
    with mlxvr.load(folders["qwen3_vl"], dtype="float32") as loaded:  # the folder's own dtype, said aloud
        restored = loaded.restore(file)
        answer = restored.ask("What?", **asked)
        assert_same(answer, expected)
        assert answer.usage.cached_tokens > 0
        assert (restored.grid, restored.seconds) == (clip.grid, clip.seconds)
        restored.close()
        assert_same(restored.ask("What?", **asked), expected)  # read again
        restored.close()
        file.unlink()
        with pytest.raises(ConfigError, match=r"clip\.safetensors cannot be read"):
            restored.ask("What?", **asked)


@pytest.fixture(scope="module")
def saved_clip(folders, clip_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "clip.safetensors"
    with mlxvr.load(folders["qwen3_vl"], kv_bits=4) as loaded:
        loaded.open(clip_path, **MODEST).save(file)
    return file


def other_limits(folder):
    (folder / "mlxvr.json").write_text(json.dumps({"frame_limits": {"video_tokens": 77, "fps": 1.5}}))


@pytest.mark.parametrize(
    ("options", "change", "names"),
    [
        ({"kv_bits": 8}, None, r"another kv_bits \(4 in the file, 8 here\):"),
        ({}, None, r"another kv_bits \(4 in the file, none here\):"),
        ({"kv_bits": 4, "dtype": "bfloat16"}, None, r"another dtype \(float32 in the file, bfloat16 here\):"),
        (
            {"kv_bits": 4},
            other_limits,
            r"another fps \(2.0 in the file, 1.5 here\), video_tokens \(\d+ in .* 77 here\):",
        ),
        ({"kv_bits": 4, "adapter": True}, None, r"another adapter:"),
    ],
)
def test_a_saved_clip_is_refused_where_its_keys_would_be_others(folders, saved_clip, tmp_path, options, change, names):
    folder = folders["qwen3_vl"]
    if change is not None:
        folder = shutil.copytree(folder, tmp_path / "model")
        change(folder)
    if "adapter" in options:
        options = options | {"adapter": write_adapter(tmp_path / "adapter", load_model(folder))}
    with mlxvr.load(folder, **options) as loaded, pytest.raises(ConfigError, match=names):
        loaded.restore(saved_clip)


def test_a_saved_clip_of_another_model_or_system_prompt_is_refused(folders, saved_clip):
    with mlxvr.load(folders["qwen2_5_vl"]) as loaded, pytest.raises(ConfigError, match=r"another model, .*kv_bits"):
        loaded.restore(saved_clip)
    with mlxvr.load(folders["qwen3_vl"], kv_bits=4) as loaded:
        loaded.system_prompt = "Be brief."
        with pytest.raises(ConfigError, match=r"another system_prompt \(.* in the file, Be brief. here\)"):
            loaded.restore(saved_clip)


def test_a_system_prompt_that_changes_is_refused_by_an_open_clip(qwen3, clip_path):
    clip = qwen3.open(clip_path, **MODEST)
    clip.ask("What?", max_tokens=2)
    own = qwen3.system_prompt
    try:
        qwen3.system_prompt = "Be brief."
        with pytest.raises(ConfigError, match="open the clip again"):
            clip.ask("What?", max_tokens=2)
    finally:
        qwen3.system_prompt = own
    clip.ask("What?", max_tokens=2)


def test_a_damaged_saved_clip_is_one_clear_line(folders, saved_clip, tmp_path):
    import mlx.core as mx

    arrays, notes = mx.load(str(saved_clip), return_metadata=True)
    damages = {
        "junk": b"junk",
        "empty": b"",
        "cut": saved_clip.read_bytes()[:-1000],
        "cut in its header": saved_clip.read_bytes()[:100],
    }
    variants = {
        "without an array": ({name: array for name, array in arrays.items() if name != "1.values.2"}, notes),
        "without ids": (arrays, {name: note for name, note in notes.items() if name != "ids"}),
        "no JSON": (arrays, {**notes, "settings": "{"}),
        "another shape": (arrays, {**notes, "media": "3"}),
        "fewer ids": (arrays, {**notes, "ids": "[1, 2]"}),
        "fewer layers": (arrays, {**notes, "mlxvr_cache": json.dumps(json.loads(notes["mlxvr_cache"])[:-1])}),
        "a short layer": ({**arrays, "1.keys.0": arrays["1.keys.0"][:, :, :5]}, notes),
        "no cache": (arrays, {}),
    }
    with mlxvr.load(folders["qwen3_vl"], kv_bits=4) as loaded:
        for name, data in damages.items():
            (tmp_path / name).write_bytes(data)
        for name, (tensors, metadata) in variants.items():
            mx.save_safetensors(str(tmp_path / "part.safetensors"), tensors, metadata)
            (tmp_path / "part.safetensors").rename(tmp_path / name)
        for name in (*damages, *variants, "missing"):
            with pytest.raises(ConfigError, match=name) as error:
                loaded.restore(tmp_path / name)
            assert "\n" not in str(error.value)
        assert loaded.restore(saved_clip).grid


@pytest.mark.parametrize("restored", [False, True])
def test_a_failed_evaluation_does_not_poison_a_clip(folders, clip_path, saved_clip, monkeypatch, tmp_path, restored):
    """The cache is extended before it is evaluated: when that fails, its arrays hold work that fails again."""
    import mlx.core as mx

    asked = {"mode": "think", "max_tokens": 8}
    embed = VideoModel.embed

    cut = tmp_path / "cut.npy"
    mx.save(str(cut), mx.zeros(1000))
    cut.write_bytes(cut.read_bytes()[:-400])

    def unreadable(model, *args, **kwargs):
        """Something that fails when it is evaluated, and again each time."""
        return embed(model, *args, **kwargs) + mx.load(str(cut)).sum()

    def too_large(mlp, x):
        raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes")  # as MLX words it

    with mlxvr.load(folders["qwen3_vl"], kv_bits=4) as loaded:
        clip = loaded.restore(saved_clip) if restored else loaded.open(clip_path, **MODEST)
        expected = clip.ask("Which?", **asked)
        mlp = type(loaded._network.layers[0].mlp)
        for owner, name, failing, error in (
            (VideoModel, "embed", unreadable, RuntimeError),
            (mlp, "__call__", too_large, OutOfMemoryError),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with pytest.raises(error):
                    clip.ask("What is it that happens at the very end of all this?", **asked)
            assert_same(clip.ask("Which?", **asked), expected)
        held = mx.get_active_memory()
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "__call__", too_large)
            with pytest.raises(OutOfMemoryError) as kept:
                clip.ask("What?", **asked)
        assert mx.get_active_memory() < held  # though the error is still held
        del kept


def test_the_vision_tower_and_the_prefill_can_be_stopped(folders, clip_path, monkeypatch):
    """Through a reasoner, between chunks; what the stop leaves half done is not used."""
    asked = {"mode": "think", "max_tokens": 8}
    with mlxvr.load(folders["qwen3_vl"], prefill_step_size=16) as loaded:
        expected = loaded.ask(clip_path, "What?", **MODEST, **asked)
        monkeypatch.setitem(VideoModel.encode.__kwdefaults__, "patches_at_once", 1)  # a temporal patch at a time
        for stage in ("vision", "prefill"):
            seen = []

            def stop(name, done, total, stage=stage, seen=seen):
                seen.append((name, done, total))
                if name == stage and done < total:
                    loaded.cancel()

            clip = loaded.open(clip_path, **MODEST, progress=stop)
            with pytest.raises(Cancelled):
                clip.ask("What?", **asked)
            name, done, total = seen[-1]
            assert name == stage
            assert 0 < done < total  # it went no further
            if stage == "prefill":
                assert done == 16  # the step size reached it
            seen.clear()
            clip._progress = None
            assert_same(clip.ask("What?", **asked), expected)


def test_the_question_after_the_clip_can_be_stopped(folders, clip_path):
    """A follow-up question is read in steps as well."""
    with mlxvr.load(folders["qwen3_vl"], prefill_step_size=16) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        expected = clip.ask("What?", max_tokens=4)
        calls = []
        hidden = VideoModel.hidden

        def counted(model, ids, *args, **kwargs):
            calls.append(ids.shape[1])
            if len(calls) == 2:
                loaded.cancel()
            return hidden(model, ids, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoModel, "hidden", counted)
            with pytest.raises(Cancelled):
                clip.ask("And what else is there to be seen? " * 10, max_tokens=4)
        assert calls == [16, 16]
        assert_same(clip.ask("What?", max_tokens=4), expected)


def test_reading_a_clips_frames_can_be_stopped(qwen3, clip_path, monkeypatch):
    def stopped_as_it_begins(*args, **kwargs):
        qwen3.cancel()
        return load_vision(*args, **kwargs)

    monkeypatch.setattr("mlxvr.reasoner.reasoner.load_vision", stopped_as_it_begins)
    with pytest.raises(Cancelled):
        qwen3.open(clip_path, **MODEST)
    monkeypatch.undo()
    assert qwen3.open(clip_path, **MODEST).grid


def test_open_clips_keep_their_keys_within_a_budget(folders, clip_path):
    """The clip that was asked longest ago gives its own back, and is read anew when it is asked again."""
    import mlx.core as mx

    asked = {"mode": "think", "max_tokens": 4}
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        clips = [loaded.open(clip_path, **MODEST) for _ in range(5)]
        before = mx.get_active_memory()
        expected = clips[0].ask("What?", **asked)
        one = mx.get_active_memory() - before
        loaded.cache_budget = int(2.5 * one)
        held = []
        for turn in range(2):
            for number, clip in enumerate(clips):
                answer = clip.ask("What?", **asked)
                assert_same(answer, expected)
                assert (answer.usage.cached_tokens > 0) == (turn == 0 and number == 0)
                held.append(mx.get_active_memory() - before)
        assert max(held) < 2.5 * one
        assert min(held[1:]) > 1.5 * one
        # the two that were asked last still have theirs; the one before is gone
        assert clips[4].ask("What?", **asked).usage.cached_tokens > 0
        assert clips[3].ask("What?", **asked).usage.cached_tokens > 0
        assert clips[2].ask("What?", **asked).usage.cached_tokens == 0
        loaded.cache_budget = 0  # one clip may always be asked
        assert_same(clips[0].ask("What?", **asked), expected)
        assert mx.get_active_memory() - before < 1.5 * one


def test_an_evicted_clip_that_was_restored_is_read_from_its_file_again(folders, clip_path, tmp_path):
    file = tmp_path / "clip.safetensors"
    asked = {"mode": "think", "max_tokens": 4}
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        expected = clip.ask("What?", **asked)
        clip.save(file)
        restored = loaded.restore(file)
        loaded.cache_budget = 0
        for asking in (clip, restored, clip, restored):
            assert_same(asking.ask("What?", **asked), expected)


def test_what_does_not_fit_is_refused_before_it_is_tried(folders, clip_path):
    import mlx.core as mx

    with pytest.raises(OutOfMemoryError, match=r"weights take 0\.\d GB.*fewer bits"):
        mlxvr.load(folders["qwen3_vl"], memory_limit=0.0001)
    asked = {"mode": "think", "max_tokens": 4}
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        gc.collect()
        expected = clip.ask("What?", **asked)
        clip.close()
        free = mx.get_active_memory()
        for limit, advice in (
            (free + 5_500_000, r"use max_tokens=1024"),
            (free + 50_000, r"kv_bits|video_tokens|fewer bits per weight"),
        ):
            loaded._cache.limit = limit
            mx.reset_peak_memory()
            with pytest.raises(
                OutOfMemoryError, match=rf"needs about .* MB beside what is loaded .* are free: .*{advice}"
            ):
                clip.ask("What?", max_tokens=3000, mode="think")
            assert mx.get_peak_memory() <= free  # nothing was tried
        loaded._cache.limit = free + 50_000_000
        assert_same(clip.ask("What?", **asked), expected)


def test_a_prompt_is_read_in_smaller_steps_where_memory_is_short(folders, clip_path):
    import mlx.core as mx

    asked = {"mode": "think", "max_tokens": 4}
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        steps = []
        hidden = VideoModel.hidden

        def counted(model, ids, *args, **kwargs):
            steps.append(ids.shape[1])
            return hidden(model, ids, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(VideoModel, "hidden", counted)
            expected = loaded.ask(clip_path, "What?", **MODEST, **asked)
            roomy = max(steps)
            steps.clear()
            clip = loaded.open(clip_path, **MODEST)
            loaded._cache.limit = mx.get_active_memory() + 4_400_000
            assert_same(clip.ask("What?", **asked), expected)
        assert max(steps) < roomy


def test_quantized_keys_and_values(folders, clip_path):
    asked = {"mode": "think", "max_tokens": 8}
    with mlxvr.load(folders["qwen3_vl"], kv_bits=8) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        coarse = clip.ask("What?", **asked)
        assert_same(clip.ask("What?", **asked), coarse)
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        exact = loaded.ask(clip_path, "What?", **MODEST, **asked)
    assert abs(coarse.token_logprobs[0] - exact.token_logprobs[0]) < 0.05
    with pytest.raises(ConfigError, match="kv_bits 5"):
        mlxvr.load(folders["qwen3_vl"], kv_bits=5)


def test_the_dtype_can_be_chosen(folders, clip_path):
    asked = {"mode": "think", "max_tokens": 8}
    found = {}
    for dtype in (None, "float32", "bfloat16"):
        with mlxvr.load(folders["qwen3_vl"], dtype=dtype) as loaded:
            found[dtype] = loaded.ask(clip_path, "What?", **MODEST, **asked)
    assert_same(found[None], found["float32"])  # the folder's own
    assert found["bfloat16"].token_logprobs[0] != found["float32"].token_logprobs[0]
    assert abs(found["bfloat16"].token_logprobs[0] - found["float32"].token_logprobs[0]) < 0.05
    with pytest.raises(ConfigError, match="float8"):
        mlxvr.load(folders["qwen3_vl"], dtype="float8")


def test_images_and_lists_of_frames(reasoner):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 96, 96, 3), dtype=np.uint8)
    image = reasoner.open(frames[0])
    assert image.seconds == ()
    assert image.ask("What?", max_tokens=4).usage.video_tokens == np.prod(image.grid) // 4
    clip = reasoner.open(list(frames), fps=2.0)
    assert clip.grid[0] == 3
    assert clip.seconds == (0.25, 1.25, 2.25)
    assert_same(clip.ask("What?", max_tokens=4), reasoner.open(frames, fps=2.0).ask("What?", max_tokens=4))


def test_own_frames_have_the_times_that_they_are_given(reasoner, tmp_path):
    pixels = np.zeros((4, 56, 56, 3), np.uint8)
    assert reasoner.open(pixels, timestamps=[10, 11, 12, 15]).seconds == (10.5, 13.5)
    assert reasoner.open(pixels, timestamps=[10, 11, 12, 15], start=11.5).seconds == (13.5,)
    for number, frame in enumerate(pixels, start=8):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    assert reasoner.open(tmp_path, fps=4.0).seconds == (0.125, 0.625)
    with pytest.raises(ConfigError, match="fps and timestamps"):
        reasoner.open(pixels, fps=2.0, timestamps=[0, 1, 2, 3])


@pytest.mark.parametrize("option", ["image_tokens", "video_tokens"])
def test_an_image_takes_no_more_tokens_than_it_may(reasoner, option):
    photo = np.zeros((300, 400, 3), np.uint8)
    whole = reasoner.open(photo)
    small = reasoner.open(photo, **{option: 40})
    assert np.prod(whole.grid) // 4 > 100
    assert 20 < np.prod(small.grid) // 4 <= 40


def test_the_threshold_is_the_flags_else_the_folders_else_the_recipes(folders, clip_path, tmp_path):
    with mlxvr.load(folders["qwen2_5_vl"]) as loaded:
        assert loaded.threshold == 0.97
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        assert loaded.threshold == 0.98
        assert loaded.ask(clip_path, "What?", max_tokens=2, **MODEST).threshold == 0.98
    own = write_checkpoint(tmp_path / "own", "qwen3_vl")
    settings = {"threshold": 0.6, "frame_limits": {"video_tokens": 32, "fps": 1.0}, "task_thresholds": {"count": 0.8}}
    (own / "mlxvr.json").write_text(json.dumps(settings))
    with mlxvr.load(own) as loaded:
        assert loaded.ask(clip_path, "What?", max_tokens=2).threshold == 0.6
        assert loaded.task_thresholds == {"count": 0.8}
        assert loaded.ask(clip_path, "What?", max_tokens=2, threshold=0.2).threshold == 0.2
        assert (loaded.spec.video_tokens, loaded.spec.fps) == (32, 1.0)
    for wrong in ("0.5", 1.5, True):
        (own / "mlxvr.json").write_text(json.dumps({"threshold": wrong}))
        with pytest.raises(CheckpointError, match="threshold"):
            mlxvr.load(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_float16_cannot_hold_is_refused_by_name(family, tmp_path):
    """Real weights whose activations end beyond 65,504: no answer, and no reasoning for want of a confidence."""
    folder = write_checkpoint(tmp_path / "m", family, dtype="BF16", weights=overflow_float16)
    with mlxvr.load(folder, dtype="float16") as loaded:
        clip = loaded.open(None)
        for mode in ("auto", "direct", "think"):
            with pytest.raises(ConfigError, match=r"float16 overflowed .*: use --dtype bfloat16 or float32"):
                clip.ask("What?", mode=mode, max_tokens=8)
    for dtype in ("bfloat16", "float32"):
        with mlxvr.load(folder, dtype=dtype) as loaded:
            answer = loaded.open(None).ask("What?", max_tokens=8)
            assert np.isfinite(answer.token_logprobs).all()


def test_visual_placeholders_are_never_answered(folders):
    """By a model that likes nothing better, whatever it is sampled at."""
    with mlxvr.load(folders["qwen3_vl"]) as loaded:
        network = loaded._network
        push = np.zeros(512, np.float32)
        push[sorted(network.suppress_tokens)] = 40.0
        whole = network.logits
        network.logits = lambda hidden: whole(hidden) + mx.array(push)
        for temperature in (0.0, 1.0):
            answer = loaded.open(None).ask("What?", mode="think", max_tokens=12, temperature=temperature, seed=0)
            assert not network.suppress_tokens & set(answer.token_ids)
            assert "_pad|>" not in loaded.detokenize(answer.token_ids)
            assert max(answer.token_logprobs) < -20  # under the model's own distribution they have nearly nothing


def test_a_prompt_that_does_not_fit_is_refused_and_loses_nothing(tmp_path, clip_path):
    folder = write_checkpoint(tmp_path / "short", "qwen3_vl", text={"max_position_embeddings": 512})
    with mlxvr.load(folder) as loaded:
        clip = loaded.open(clip_path, **MODEST)
        answer = clip.ask("What?", mode="think", max_tokens=4096)
        assert answer.usage.prompt_tokens + len(answer.token_ids) <= 512
        with pytest.raises(ConfigError, match=r"context is 512"):
            clip.ask("What? " * 200)
        assert_same(clip.ask("What?", mode="think", max_tokens=4096), answer)


def test_wrong_values_are_refused(qwen3, clip_path, tmp_path):
    clip = qwen3.open(clip_path, **MODEST)
    for wrong in ({"mode": "perhaps"}, {"kind": "poem"}, {"threshold": 2.0}, {"max_tokens": 0}, {"options": [""]}):
        with pytest.raises(ConfigError):
            clip.ask("What?", **wrong)
    with pytest.raises(ConfigError):
        clip.ask(" ")
    for wrong in ({"fps": -1.0}, {"max_frames": 0}, {"video_tokens": 0}, {"start": 3.0, "end": 1.0}, {"frames": 0}):
        with pytest.raises(ConfigError):
            qwen3.open(clip_path, **wrong)
    with pytest.raises(MediaError):
        qwen3.open(tmp_path / "missing.mp4")
    with pytest.raises(ConfigError, match="prefill_step_size"):
        mlxvr.load(prefill_step_size=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": "high"}, "threshold 'high' is no number"),
        ({"threshold": True}, "threshold True is no number"),
        ({"max_tokens": 2.5}, "max_tokens 2.5 is no whole number"),
        ({"max_tokens": True}, "max_tokens True is no whole number"),
        ({"temperature": "1"}, "temperature '1' is no number"),
        ({"temperature": None}, "temperature None is no number"),
        ({"top_p": None}, "top_p None is no number"),
        ({"seed": -1, "temperature": 1.0}, "seed -1 cannot be used"),
        ({"seed": 1.0}, "seed 1.0 cannot be used"),
        ({"seed": 2**64}, "seed 18446744073709551616 cannot be used"),
        ({"options": [1, 2]}, "option 1 is 1, no text"),
        ({"options": ["a", None]}, "option 2 is None, no text"),
        ({"options": 7}, "options 7 are no list of texts"),
        ({"options": "ab"}, "options 'ab' are no list of texts"),
        ({"response_prefix": 3}, "response_prefix 3 is no text"),
        ({"mode": 3}, "mode 3 is unknown"),
        ({"kind": ["qa"]}, r"kind \['qa'\] is unknown"),
        ({"optons": ["a"]}, "there is no option 'optons': did you mean 'options'?"),
        ({"xyz": 1}, "there is no option 'xyz': use some of .*options, kind, mode"),
    ],
)
def test_wrong_types_are_config_errors_that_name_the_argument(qwen3, clip_path, wrong, says):
    clip = qwen3.open(None)
    for ask in (clip.ask, clip.stream, lambda question, **options: qwen3.ask(None, question, **options)):
        with pytest.raises(ConfigError, match=says):
            ask("What?", **wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"frames": "8"}, "frames is '8'"),
        ({"frames": 2.5}, "frames is 2.5"),
        ({"start": "0:05"}, "start is '0:05': give seconds"),
        ({"end": [1]}, r"end is \[1\]: give seconds"),
        ({"fps": "2"}, "fps is '2'"),
        ({"max_frames": 2.5}, "max_frames is 2.5"),
        ({"video_tokens": True}, "video_tokens is True"),
    ],
)
def test_wrong_types_of_a_clip_are_config_errors(qwen3, clip_path, wrong, says):
    for read in (qwen3.open, lambda source, **options: qwen3.ask(source, "What?", **options)):
        with pytest.raises(ConfigError, match=says):
            read(clip_path, **wrong)


def test_misspelt_options_of_opening_and_asking_are_told_apart(qwen3, clip_path):
    with pytest.raises(ConfigError, match=r"there is no option 'fsp': did you mean 'fps'"):
        qwen3.ask(clip_path, "What?", fsp=3)
    for wrong, says in (
        ({"model": 3}, "model is 3: give the path of a folder or a Hub id"),
        ({"adapter": 3}, "adapter is 3: give the path of a folder"),
        ({"kv_bits": "4"}, "kv_bits '4' is not supported"),
        ({"dtype": 3}, "dtype 3 is unknown"),
        ({"prefill_step_size": "7"}, "prefill_step_size '7' is no whole number"),
        ({"revision": "v1"}, "revision 'v1' is of a Hub id"),
    ):
        with pytest.raises(ConfigError, match=says):
            mlxvr.load(**wrong)


def test_numbers_of_numpy_are_numbers(qwen3):
    options = {"threshold": np.float32(0.5), "max_tokens": np.int64(2), "seed": np.uint32(3), "top_p": np.float64(1)}
    assert len(qwen3.open(None).ask("What?", **options).token_ids) == 2


def test_an_answer_is_plain_data(qwen3, clip_path):
    answer = qwen3.ask(clip_path, "What?", max_tokens=4, **MODEST)
    fields = answer.to_dict()
    assert set(fields) == {field.name for field in dataclasses.fields(mlxvr.Answer)} | {"hit_limit"}
    assert fields["hit_limit"] is True
    assert fields["usage"]["generated_tokens"] == 4
    assert fields["usage"]["total_seconds"] == answer.usage.total_seconds > 0
    assert {"text", "confidence", "reasoned", "first", "reasoning", "second", "threshold", "usage"} <= set(
        answer.to_dict()
    )
