"""From examples to token ids: the tokenizer, the prompt, and the completion that is trained on.

The prompt is the one that mlxvr builds at inference (`mlxvr.model.prompt`), token for token; a test holds the two
together. It is written here again because training runs where neither MLX nor mlxvr's other needs are installed.

The tokenizer is a byte-level BPE with Qwen's pre-tokenization rule, trained on the world's own texts. Its merges never
cross punctuation, so `{`, `[`, `]` and `}` stay tokens of their own and an answer's span falls on token boundaries.
As in Qwen3, `<think>` and `</think>` are single tokens that are not special.
"""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .questions import KINDS, LETTERS, Example, make_example
from .world import COLORS, DIRECTIONS, SHAPES, SLOTS

SYSTEM_PROMPT = "\n".join(
    (
        "You are a helpful assistant.",
        "FIRST: Output your initial answer inside the first \\boxed{...} without any analysis or explanations. If you"
        " cannot determine the answer without reasoning, output \\boxed{Let's analyze the problem step by step.}"
        " instead.",
        "THEN: Think through the reasoning as an internal monologue enclosed within <think>...</think>.",
        "AT LAST: Output the final answer again inside \\boxed{...}. If you believe the previous answer was correct,"
        " repeat it; otherwise, correct it.",
        "Output format: \\boxed{...}<think>...</think>\\boxed{...}",
    )
)
_MARKS = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = ("<|endoftext|>", *(f"<|{mark}|>" for mark in _MARKS))
THINK = ("<think>", "</think>")
VOCABULARY = 768
IGNORED = -100  # the label of a token that is not learned

_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LEARNING_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s*[\r\n]+|\s+(?!\S)|\s+"  # punctuation marks one by one


def question_text(question: str, options: Sequence[str] | None, ask: str) -> str:
    """The text of the user's turn after the video, as VideoAuto-R1 words it for each kind of task."""
    listed = "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options or ()))
    if ask == "grounding":
        return (
            "Locate the start and end timestamps of the video segment corresponding to the description: "
            f"{question} Please provide the start and end timestamps (in seconds, precise to one decimal places) in "
            "the format \\boxed{[start, end]}."
        )
    if ask == "grounded_qa":
        return (
            f"Question: {question}\nOptions:\n{listed}\n"
            "Please answer the question, and then provide the video segment that best supports your answer. The start "
            "and end timestamps must be in seconds with exactly one decimal place.\n"
            "Output format: \\boxed{answer <> [start, end]}. For example: \\boxed{A <> [20.3, 30.8]}."
        )
    return (f"{question}\nOptions:\n{listed}" if options else question) + "\nPut your final answer in \\boxed{}."


def build_tokenizer(examples: int = 3000) -> Tokenizer:
    """Train the tokenizer on texts of the world (a few seconds)."""
    rng = random.Random(1)
    texts = [SYSTEM_PROMPT, "system\nuser\nassistant\n"] * 20
    for index in range(examples):
        example = make_example(rng, KINDS[index % len(KINDS)], rng.randint(7, 16), (1.0, 1.0))
        texts += [f"<{label} seconds>" for label in example.clock.labels]
        texts.append(question_text(example.question, example.options, example.ask))
        texts.append(completion_text(example, example.answer))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = _pre_tokenizer(_LEARNING_SPLIT)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            show_progress=False,
            special_tokens=[*SPECIAL, *THINK],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(_QWEN_SPLIT)
    return _with_plain_think(tokenizer)


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _with_plain_think(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with `<think>` and `</think>` as added tokens that decoding does not skip."""
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in THINK
    return Tokenizer.from_str(json.dumps(data))


def completion_text(example: Example, first: str) -> str:
    """The assistant's turn with `first` in the first box and the truth in the second."""
    return f"\\boxed{{{first}}}<think>\n{''.join(example.trace).strip()}\n</think>\\boxed{{{example.answer}}}"


@dataclass(frozen=True)
class Row:
    """One training sequence. `labels` hold what each token should have been (`IGNORED`: not learned).

    `labels[i]` belongs to `ids[i]` itself; shifting is the loss's business. `first` is the span of the first answer.
    """

    ids: list[int]
    labels: list[int]
    prefix: int
    first: tuple[int, int]


class Codec:
    """Encodes examples with one tokenizer, remembering the pieces that it has met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()
        self.special = {name: tokenizer.token_to_id(name) for name in (*SPECIAL, *THINK)}
        self.encode = functools.lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prefix(self, labels: Sequence[str], tokens_per_pair: int) -> list[int]:
        """System turn and video: everything that is the same for each question on a clip."""
        ids = list(self.encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"))
        pads = [self.special["<|video_pad|>"]] * tokens_per_pair
        for label in labels:
            ids += self.encode(f"<{label} seconds>")
            ids += [self.special["<|vision_start|>"], *pads, self.special["<|vision_end|>"]]
        return ids

    def question(self, example: Example) -> tuple[int, ...]:
        """What follows the video, up to the assistant's first token."""
        text = question_text(example.question, example.options, example.ask)
        return self._encode(f"{text}<|im_end|>\n<|im_start|>assistant\n")

    def prompt(self, example: Example, tokens_per_pair: int) -> list[int]:
        """The whole prompt of an example."""
        return [*self.prefix(example.clock.labels, tokens_per_pair), *self.question(example)]

    def row(
        self, rng: random.Random, example: Example, tokens_per_pair: int, *, guess: float = 1.0, guess_span: float = 0.5
    ) -> Row:
        """A training sequence whose first answer is often a guess where it is fed back, though its label is the truth.

        What is learned for the first box is then the honest distribution over answers, and the second box can't copy
        it. `guess` and `guess_span` are the shares of rows with a guess, for words and letters and for times; after a
        wrong digit the rest of a span can't be learned, so spans need rows that are fed the truth.
        """
        ids = self.prefix(example.clock.labels, tokens_per_pair)
        prefix = len(ids)
        ids += self.question(example)
        labels = [IGNORED] * len(ids)
        opening = self.encode("\\boxed{")
        truth, fed = self.encode(example.answer), self.encode(example.answer)
        if rng.random() < (guess if example.ask == "qa" else guess_span):
            fed = self.encode(rng.choice(example.guesses))
        begin = len(ids) + len(opening)
        rest = [*self.encode("}"), self.special["<think>"], *self.encode("\n")]
        for number, piece in enumerate(example.trace):
            rest += self.encode(piece if number else piece.lstrip())
        rest += [*self.encode("\n"), self.special["</think>"], *opening, *truth, *self.encode("}")]
        rest.append(self.special["<|im_end|>"])
        ids += [*opening, *fed, *rest]
        labels += [*opening, *_labels_of_fed(fed, truth), *rest]
        return Row(ids, labels, prefix, (begin, begin + len(fed)))

    def drill(self, rng: random.Random, example: Example, tokens_per_pair: int) -> Row:
        """Practice in reading options: words in random order, each followed by its letter; only letters are learned."""
        ids = self.prefix(example.clock.labels, tokens_per_pair)
        prefix = len(ids)
        words = rng.sample((*COLORS, *SHAPES, *DIRECTIONS, "middle"), len(LETTERS))
        if rng.random() < 0.3:
            words = [*rng.sample(_SWAP_WORDS, 3), *words[:3]]
            rng.shuffle(words)
        listed = "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, words))
        ids += self._encode(f"Give the letter of each word.\nOptions:\n{listed}<|im_end|>\n<|im_start|>assistant\n")
        labels = [IGNORED] * len(ids)
        first = (0, 0)
        for index in rng.sample(range(len(words)), len(words)):
            word, letter = self.encode(f" {words[index]}"), self.encode(LETTERS[index])
            ids += [*word, *letter]
            labels += [*[IGNORED] * len(word), *letter]
            first = (len(ids) - 1, len(ids))
        return Row(ids, labels, prefix, first)


_SWAP_WORDS = [f"{a} and {b}" for a, b in ((SLOTS[0], SLOTS[1]), (SLOTS[1], SLOTS[2]), (SLOTS[0], SLOTS[2]))]


def _labels_of_fed(fed: Sequence[int], truth: Sequence[int]) -> list[int]:
    """The truth up to the first token where the fed answer leaves it; after that nothing can be learned."""
    if fed == truth:
        return list(truth)
    agree = next((i for i, (a, b) in enumerate(zip(fed, truth)) if a != b), min(len(fed), len(truth)))
    labels = [*truth[: agree + 1], *[IGNORED] * len(fed)]
    return labels[: len(fed)]
