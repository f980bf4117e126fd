"""The synthetic world of examples/shellgame: scenes, questions, tokens, clips, and the training forward pass."""

import itertools
import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from shellgame import clips, drawing, questions, tokens, world

EXTENT = (1.25, 1.0)


def _examples(count, seed=0, kinds=questions.KINDS):
    rng = random.Random(seed)
    for index in range(count):
        extent = rng.choice(((1.0, 1.0), EXTENT, (1.0, 1.25), (16 / 9, 1.0)))
        yield questions.make_example(rng, kinds[index % len(kinds)], rng.randint(7, 16), extent)


# ---- time


@pytest.mark.parametrize(
    ("rate", "frames", "count", "labels"),
    [
        # 24 fps, 193 frames = 8.04 s -> 16.08 -> 16 frames, 192 / 15 = 12.8 frames apart: 0, 13, 26, 38, ...
        ("24", 193, 16, ["0.3", "1.3", "2.4", "3.5", "4.5", "5.6", "6.7", "7.7"]),
        # 10 fps, 75 frames = 7.5 s -> 15 -> 14 frames, 74 / 13 apart: 0, 6, 11, 17, 23, 28, ...
        ("10", 75, 14, ["0.3", "1.4", "2.5", "3.7", "4.8", "6.0", "7.1"]),
    ],
)
def test_sampled_times_by_hand(rate, frames, count, labels):
    clock = world.Clock(Fraction(rate), frames)
    assert len(clock.sampled()) == count
    assert list(clock.labels) == labels


def test_sampling_is_the_librarys():
    from mlxvr.media.sampling import frame_indices

    rng = random.Random(0)
    for _ in range(200):
        clock = world.make_clock(rng, rng.randint(7, 16))
        expected = frame_indices(clock.frames, float(clock.rate), fps=2.0)
        np.testing.assert_array_equal(clock.sampled(), expected)


# ---- scenes


def _follow_ball(scene):
    """The ball's slot at the end, by watching where the cups are instead of reading the list of swaps."""
    end = scene.swaps[-1].end if scene.swaps else 1.0
    step = np.arange(0.0, end + 0.1, 0.01)
    places = scene.places(step)
    ball = places[0, -1, 0]
    at_rest = scene.places(np.array([0.0]))[1:, 0, 0]
    np.testing.assert_allclose(np.abs(np.diff(places, axis=1)).max(), 0, atol=0.06)  # nothing jumps
    return int(np.abs(np.sort(at_rest) - ball).argmin())


def test_the_ball_travels_with_its_cup():
    rng = random.Random(1)
    for swaps in range(8):
        for _ in range(6):
            clock = world.make_clock(rng, 16)
            scene = world.make_shell_game(rng, clock, EXTENT, swaps=swaps)
            assert _follow_ball(scene) == scene.final_slot()
            assert not scene.swaps or scene.swaps[-1].end <= clock.duration


def test_every_swap_and_every_rest_is_sampled():
    for example in _examples(150, kinds=("final_cup", "count")):
        seen = [swap.seen(example.clock.times) for swap in example.scene.swaps]
        assert all(s.any() for s in seen)
        for before, after in itertools.pairwise(seen):
            assert after.nonzero()[0][0] - before.nonzero()[0][-1] >= 2, "a frame at rest lies between two swaps"


def test_sprites_stay_in_the_picture():
    for example in _examples(120):
        places = example.scene.places(example.clock.times)
        seen = places[..., 0] > world.HIDDEN
        inside = (places >= 0) & (places <= np.asarray(example.extent))
        if example.kind not in ("visible", "grounded_color"):
            assert inside[seen].all()


def test_held_out_sequences_are_never_trained_on():
    from shellgame import pool

    bucket = pool.Bucket(128, 128, 12, ((1.0, 1.0),))
    rng = random.Random(2)
    lengths = set()
    for _ in range(400):
        _, example = pool.training_example(rng, bucket)
        if isinstance(example.scene, world.ShellGame):
            pairs = [swap.slots for swap in example.scene.swaps]
            assert not world.sequence_held_out(pairs)
            lengths.add(len(pairs))
    assert lengths == set(range(world.TRAINED_SWAPS + 1))
    for swaps in range(2, 6):  # and there are some to hold out, of every length
        held = [world.sequence_held_out(s) for s in itertools.product(world.SWAPS, repeat=swaps)]
        assert 0.08 < np.mean(held) < 0.25
    scene = world.make_shell_game(rng, world.make_clock(rng, 12), EXTENT, swaps=3, held_out=True)
    assert world.sequence_held_out([swap.slots for swap in scene.swaps])


# ---- questions


def test_a_chain_leads_to_its_answer():
    """Reads the chain as text, follows its swaps, and comes to the answer."""
    slot = {name: index for index, name in enumerate(world.SLOTS)}
    for example in _examples(120, kinds=("final_cup",)):
        text = "".join(example.trace)
        ball = slot[re.search(r"ball is under the (\w+) cup", text)[1]]
        steps = re.findall(r"At ([\d.]+) seconds (\w+) and (\w+) swap, ball under (\w+)\.", text)
        assert len(steps) == example.swaps
        for label, first, second, under in steps:
            assert label in example.clock.labels
            pair = {slot[first], slot[second]}
            ball = (pair - {ball}).pop() if ball in pair else ball
            assert ball == slot[under]
        said = [float(label) for label, *_ in steps]
        assert said == sorted(set(said))
        for label, swap in zip(said, example.scene.swaps):
            assert swap.start - 0.6 < label < swap.end + 0.6
        answer = example.options[questions.LETTERS.index(example.answer)] if example.options else example.answer
        assert answer == world.SLOTS[ball]


def test_answers_about_time_are_labels_around_the_event():
    for example in _examples(60, kinds=("visible",)):
        first, last = (float(t) for t in example.answer[1:-1].split(", "))
        assert abs(first - example.scene.start) < 1.25
        assert abs(last - example.scene.end) < 1.25
        assert {f"{first:.1f}", f"{last:.1f}"} <= set(example.clock.labels)


def test_answers_are_among_the_options_and_spread_over_the_letters():
    letters = []
    for example in _examples(600):
        if example.options:
            letter = example.answer[0]
            assert questions.LETTERS.index(letter) < len(example.options)
            assert len(set(example.options)) == len(example.options)
            letters.append(letter)
    counts = [letters.count(letter) / len(letters) for letter in "ABC"]
    assert min(counts) > 0.2


def test_the_same_seed_asks_the_same():
    assert [e.question + e.answer for e in _examples(40)] == [e.question + e.answer for e in _examples(40)]


# ---- tokens


@pytest.fixture(scope="module")
def codec():
    return tokens.Codec(tokens.build_tokenizer(400))


@pytest.fixture(scope="module")
def chat(codec, tmp_path_factory):
    """The library's tokenizer and prompt builder on a folder with this tokenizer and the shipped template."""
    from shellgame import checkpoint

    from mlxvr.model.tokenizer import ChatTokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    codec.tokenizer.save(str(path))
    return ChatTokenizer(path, chat_template=checkpoint.CHAT_TEMPLATE, eos_ids=[codec.special["<|im_end|>"]])


def test_prompts_are_the_librarys(codec, chat):
    from mlxvr.media.patches import VisionInput
    from mlxvr.model.families.base import family_of
    from mlxvr.model.prompt import build_prompt

    config = {
        "model_type": "qwen3_vl",
        "image_token_id": codec.special["<|image_pad|>"],
        "video_token_id": codec.special["<|video_pad|>"],
        "vision_start_token_id": codec.special["<|vision_start|>"],
        "vision_end_token_id": codec.special["<|vision_end|>"],
        "text_config": {"max_position_embeddings": 8192},
        "vision_config": {"spatial_merge_size": 2},
    }
    for example in _examples(2 * len(questions.KINDS)):
        times = example.clock.times
        video = VisionInput(
            kind="video",
            patches=np.zeros((len(times) // 2 * 80, 3 * 2 * 16 * 16), np.uint8),
            grid=(len(times) // 2, 8, 10),
            seconds=tuple(times.reshape(-1, 2).mean(1)),
            second_per_grid=1.0,
        )
        prompt = build_prompt(
            chat, family_of(config), config, [video], example.question, options=example.options, kind=example.ask
        )
        assert prompt.ids.tolist() == codec.prompt(example, 20)
        assert prompt.prefix_length == len(codec.prefix(example.clock.labels, 20))


def test_pieces_encode_as_the_whole(codec):
    rng = random.Random(3)
    for example in _examples(60, seed=3):
        row = codec.row(rng, example, 16, guess=0, guess_span=0)
        completion = tokens.completion_text(example, example.answer) + "<|im_end|>"
        whole = codec.tokenizer.encode(completion, add_special_tokens=False).ids
        assert row.ids == codec.prompt(example, 16) + whole
        assert row.labels == [tokens.IGNORED] * len(codec.prompt(example, 16)) + whole
        assert codec.tokenizer.decode(row.ids[slice(*row.first)]) == example.answer


def test_a_fed_guess_keeps_the_true_label(codec):
    rng, wrong = random.Random(4), 0
    for example in _examples(100, seed=4, kinds=("direction", "visible")):
        row = codec.row(rng, example, 16, guess=1, guess_span=1)
        truth = codec.encode(example.answer)
        fed, labels = row.ids[slice(*row.first)], row.labels[slice(*row.first)]
        assert labels[0] == truth[0]
        same = next((i for i, (a, b) in enumerate(zip(fed, truth)) if a != b), len(fed))
        assert labels[: same + 1] == list(truth[: same + 1])[: len(labels)]
        assert all(label == tokens.IGNORED for label in labels[same + 1 :])
        wrong += fed != list(truth)
    assert wrong > 50


def test_brackets_are_tokens_of_their_own(codec):
    ids = codec.encode("\\boxed{[0.3, 11.9]}<think>")
    pieces = [codec.tokenizer.id_to_token(i) for i in ids]
    assert pieces[:4] == ["\\", "boxed", "{", "["]
    assert pieces[-3:] == ["]", "}", "<think>"]
    assert codec.tokenizer.decode([codec.special["<think>"]], skip_special_tokens=True) == "<think>"


def test_perception_chains_are_long_enough_to_save(codec):
    """With three perception questions to one of tracking, answering directly must be able to halve the tokens."""
    rng = random.Random(5)

    def mean_tokens(kinds):
        rows = [(codec.row(rng, e, 16, guess=0, guess_span=0), e) for e in _examples(200, seed=5, kinds=kinds)]
        lengths = [(len(r.ids) - len(codec.prompt(e, 16)), r.first[1] + 1 - len(codec.prompt(e, 16))) for r, e in rows]
        return np.mean(lengths, axis=0)

    perception, tracking = mean_tokens(questions.PERCEPTION), mean_tokens(("final_cup",))
    always = 3 * perception[0] + tracking[0]
    auto = 3 * perception[1] + tracking[0]
    assert always / auto > 2.3


# ---- clips


def test_a_written_clip_shows_its_scene(tmp_path):
    """Every decoded frame is the frame of its own time: nearer to it than to any other that looks different."""
    import av

    rng = random.Random(6)
    example = questions.make_example(rng, "direction", 7, (1.0, 1.0))
    spec = clips.ClipSpec(example.scene, example.clock, (128, 128), crf=26, keyframes=48, seed=9)
    clips.write_clip(tmp_path / "clip.mp4", spec)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == example.clock.rate
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(frames) == example.clock.frames
    painter = drawing.Painter(example.scene, drawing.make_look(random.Random(9), len(example.scene.sprites)), 128, 128)
    drawn = np.stack([painter.frame(t) for t in drawing.frame_times(example.clock)]).astype(np.float32)
    for index in range(0, len(frames), 9):
        errors = np.abs(drawn[::3] - frames[index]).mean((1, 2, 3))
        own = np.abs(drawn[index] - frames[index]).mean()
        assert own < 6
        assert own <= errors.min() + 0.05


def test_sets_are_seeded_and_cover_every_group():
    first, again = (list(clips.held_out_set(0, 16)) for _ in range(2))
    assert [records for *_, records in first] == [records for *_, records in again]
    assert {record["group"] for *_, records in first for record in records} == set(questions.GROUPS)
    other = list(clips.held_out_set(1, 16))
    assert [records for *_, records in first] != [records for *_, records in other]
    for *_, records in clips.held_out_set(0, 48):
        for record in records:
            if record["group"] == "longer games":
                assert record["swaps"] > world.TRAINED_SWAPS


def test_training_clips_hold_no_sequence_that_is_held_out():
    """Neither do they repeat held-out clips: another seed of the same number is another set."""
    first, again = (list(clips.training_set(3, 80)) for _ in range(2))
    assert first == again
    assert list(clips.training_set(4, 80)) != first
    shorter = list(clips.training_set(3, 16))
    assert shorter == first[:16], "a longer set begins as a shorter one"

    held_out = list(clips.held_out_set(3, 80))
    scenes = [spec.scene for _, spec, _ in held_out]
    assert all(spec.scene not in scenes for _, spec, _ in first)
    assert not {name for name, *_ in first} & {name for name, *_ in held_out}, "both fit into one folder"

    sequences = [
        [swap.slots for swap in spec.scene.swaps]
        for seed in range(5)
        for _, spec, _ in clips.training_set(seed, 80)
        if isinstance(spec.scene, world.ShellGame)
    ]
    assert {len(pairs) for pairs in sequences} == set(range(world.TRAINED_SWAPS + 1))
    assert not any(world.sequence_held_out(pairs) for pairs in sequences)
    groups = {record["group"] for *_, records in first for record in records}
    assert groups == {"perception", "counting", "easy", "tracking"}


def test_reworded_sets_ask_the_same_in_other_words():
    first, again, shorter = (list(clips.reworded_set(3, count)) for count in (24, 24, 8))
    assert first == again
    assert shorter == first[:8]
    trained = {words for wordings in questions.WORDINGS.values() for words in wordings}
    for _, spec, records in first:
        assert [record["about"] for record in records] == ["direction", "shape"]
        for record in records:
            assert record["question"] in questions.REWORDED[record["about"]]
            assert record["question"] not in trained
        shown = records[1]["options"]
        answer = shown[questions.LETTERS.index(records[1]["answer"])] if shown else records[1]["answer"]
        assert answer == spec.scene.mover.outline

    held_out = list(clips.reworded_held_out_set(3, 24))
    assert not [spec for _, spec, _ in held_out if spec in [one for _, one, _ in first]]
    groups = [record["group"] for *_, records in held_out for record in records]
    assert {name: groups.count(name) for name in groups} == {
        "reworded": 12, "perception": 6, "kept back": 12, "tracking": 6,
    }  # fmt: skip
    for *_, records in held_out:
        for record in records:
            if record["group"] == "kept back":
                assert record["question"] in questions.KEPT_BACK[record["about"]]
                assert record["question"] not in {*questions.REWORDED[record["about"]], *trained}


def test_the_sets_of_the_command_line(tmp_path):
    for name, make in (("training", clips.training_set), ("held-out", clips.held_out_set)):
        assert clips.main([str(tmp_path / name), "--set", name, "--count", "1", "--seed", "5"]) == 0
        lines = (tmp_path / name / "clips.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in lines]
        assert written == [record for *_, records in make(5, 1) for record in records]
        assert all((tmp_path / name / record["video"]).stat().st_size for record in written)


# ---- what only training needs


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width", "extent"), [(128, 128, (1.0, 1.0)), (96, 160, (16 / 9, 1.0))])
def test_training_patches_look_like_decoded_video(codec, tmp_path, height, width, extent):
    torch = pytest.importorskip("torch")
    from shellgame import pool, rendering

    from mlxvr.media import load_vision
    from mlxvr.media.spec import VisionSpec

    rng = random.Random(7)
    example = questions.make_example(rng, "final_cup", 8, extent)
    size = (256, 256) if height == width else (360, 640)
    spec = clips.ClipSpec(example.scene, example.clock, size, crf=26, keyframes=48, seed=3)
    clips.write_clip(tmp_path / "clip.mp4", spec)
    half = (0.5, 0.5, 0.5)
    limits = VisionSpec(patch_size=16, merge_size=2, mean=half, std=half, frame_min_tokens=16, frame_max_tokens=20)
    video = load_vision(tmp_path / "clip.mp4", limits)
    assert video.grid == (8, height // 16, width // 16)
    decoded = torch.from_numpy(video.patches.astype(np.float32)).reshape(1, 8, -1, 3, 2, 16, 16)

    one = pool.Pool(pool.Bucket(height, width, 8, (extent,)), 1, 1200)
    one.write(0, codec, rng, "final_cup", example, 0.0)
    row = {name: torch.from_numpy(array.copy()) for name, array in one.arrays.items()}
    look = drawing.make_look(random.Random(3), 4)
    light = rendering.plain_lighting(row["color"].long())
    shifted = [np.add(world.COLORS[s.color], d) for s, d in zip(example.scene.sprites, look.shifts)]
    painted = rendering.paint(
        *rendering.pixel_centres(height, width, "cpu"),
        row["places"].float(), row["radius"], row["outline"], row["scale"],
        torch.tensor(np.stack(shifted)[None], dtype=torch.float32),
        torch.tensor([look.background]), torch.tensor([look.slope]),
        1.2 * light.softness, 2 * light.chroma_softness, light.gain, light.offset, light.noise,
        torch.zeros_like(decoded),
    )  # fmt: skip
    error = ((painted + 1) * 127.5 - decoded).abs()
    assert error.mean() < 3  # levels of 255
    assert (error > 40).float().mean() < 0.002


@pytest.mark.parity
def test_fast_forward_equals_transformers(codec):
    torch = pytest.importorskip("torch")
    from shellgame import torch_model
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    size = torch_model.Size(hidden=64, layers=2, vision_hidden=32, vision_layers=2)
    config = torch_model.make_config(size, codec.size, codec.special)
    module = Qwen3VLForConditionalGeneration(config).float().eval()
    for parameter in module.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    video_token = codec.special["<|video_pad|>"]
    fast = torch_model.FastQwen3VL(module, size, video_token, dtype=torch.float32, compiler=lambda f: f)
    rng = random.Random(8)
    for height, width, extent in ((128, 128, (1.0, 1.0)), (96, 160, (16 / 9, 1.0)), (160, 128, (1.0, 1.25))):
        pair = [questions.make_example(rng, kind, 7, extent) for kind in ("final_cup", "direction")]
        rows = [codec.row(rng, e, height * width // 1024).ids for e in pair]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
        patches = torch.rand(2, 7, height * width // 256, 3, 2, 16, 16) * 2 - 1
        with torch.no_grad():
            found = fast.logits(ids, patches, torch_model.Layout(height, width, "cpu"), 50)
            for index, row in enumerate(rows):
                alone = ids[index : index + 1, : len(row)]
                expected = module(
                    input_ids=alone,
                    mm_token_type_ids=(alone == video_token).int() * 2,
                    pixel_values_videos=patches[index].reshape(-1, 1536),
                    video_grid_thw=torch.tensor([[7, height // 16, width // 16]]),
                ).logits[0, 50:-1]
                difference = (found[index, : len(row) - 51] - expected).norm() / expected.norm()
                assert difference < 1e-5


@pytest.mark.parity
def test_muon_orthogonalises():
    torch = pytest.importorskip("torch")
    from shellgame import muon

    torch.manual_seed(0)
    for shape in ((3, 8, 24), (2, 24, 8)):
        found = muon.orthogonalise(torch.randn(shape)).float()
        values = torch.linalg.svdvals(found)
        assert (values > 0.6).all()
        assert (values < 1.3).all()
