"""`python -m mlxvr.generate`: ask questions about a video.

stdout carries the result, stderr the progress. With no arguments it asks the bundled checkpoint two questions about a
bundled clip: one that it can answer at a glance, and one that it has to think about.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mlxvr.answering.events import Answer, Event, FirstAnswer, ReasoningDelta
from mlxvr.answering.loop import AskRequest, Mode
from mlxvr.checkpoint.bundled import demo_folder, is_demo_model
from mlxvr.checkpoint.defaults import Defaults
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.cli.parser import VerbParser, add_settings, parsed_settings, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.errors import ConfigError
from mlxvr.media.container import check_file
from mlxvr.media.frame_options import FrameOptions
from mlxvr.media.sequence import folder_frames
from mlxvr.reasoner.load_options import LoadOptions
from mlxvr.reasoner.reasoner import find_folder, load_with
from mlxvr.storage.paths import local_path

__all__ = ["main", "make_parser"]

_BAR_WIDTH = 20
_PROBLEMS = {  # `mlxvr.answering.transcript.Transcript.problems` for people
    "no_box": "no answer box",
    "no_first_box": "it reasoned before it gave a first answer",
    "unterminated_box": "an answer box is not closed",
    "empty_box": "an answer box is empty",
    "repeated_box": "more boxes than answers",
    "no_think": "no reasoning",
    "unterminated_think": "the reasoning does not end",
    "empty_think": "the reasoning is empty",
    "repeated_think": "more than one piece of reasoning",
    "no_second_box": "no second answer",
    "extra_text": "text beside answers and reasoning",
    "token_limit": "cut off at the limit of tokens (--max-tokens)",
}


def make_parser() -> VerbParser:
    """The verb's options."""
    parser = VerbParser(
        "mlxvr generate",
        "Ask questions about a video. The model answers directly, and reasons only when its answer is not sure enough.",
        epilog="With no arguments: two questions about a bundled clip, to the bundled demo checkpoint.",
    )
    add_settings(parser, LoadOptions, {"model": "which model"})
    titles = {"question": "what to ask", "sampling": "when to think"}
    ask = add_settings(parser, AskRequest, titles)["question"]
    ask.add_argument(
        "--video",
        metavar="F",
        action="append",
        help="a video, an image or a folder of frames (default, for the demo model only: a bundled clip)",
    )
    ask.add_argument(
        "--prompt", metavar="Q", action="append", help="the question; repeat it to ask more about the same clip"
    )
    ask.add_argument("--option", metavar="O", action="append", help="a choice of a multiple-choice question; repeat it")
    add_settings(parser, FrameOptions, {"frames": "which frames (defaults come from the checkpoint)"})
    run = parser.add_argument_group("output")
    run.add_argument(
        "--show-settings",
        action="store_true",
        help="print each effective value and where it comes from, and ask nothing",
    )
    run.add_argument("--json", action="store_true", help="print one JSON object: the answer, or {answers: [..]}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit code."""
    return run_verb(make_parser(), _generate, argv)


def _generate(args: argparse.Namespace) -> int:
    if args.show_settings:
        return _show_settings(args)
    if args.threshold is not None and args.mode != "auto":
        print(f"without effect: --threshold, as --mode {args.mode} does not ask how sure it is", file=sys.stderr)
    video, requests = _what_to_ask(args)
    (folder_frames if video.is_dir() else check_file)(video)  # raises before the model is loaded
    load_options = LoadOptions(**parsed_settings(args, LoadOptions))
    frame_options = FrameOptions(**parsed_settings(args, FrameOptions))
    answers = []
    with (
        ProgressBar() as progress,
        load_with(load_options, progress) as reasoner,
        reasoner.open_with(video, frame_options, progress) as clip,
    ):
        if video.is_dir() and frame_options.fps is None:
            rate = f"{reasoner.spec.fps:g}"
            print(f"frames of a folder: read as {rate} a second; --fps says another rate", file=sys.stderr)
        for number, request in enumerate(requests):
            events = clip.stream_with(request)
            if args.json:
                *_, answer = events
                assert isinstance(answer, Answer), "a stream ends with its Answer"
                answers.append(answer)
                continue
            if number:
                print()
            _print_answer(request, events, progress, sys.stdout)
        source = {"model": args.model, "video": str(video), "grid": clip.grid, "seconds": clip.seconds}
    if args.json:
        fields = [
            {**source, "question": request.text, "options": request.options, "kind": request.kind, **answer.to_dict()}
            for request, answer in zip(requests, answers)
        ]
        print(json.dumps(fields[0] if len(fields) == 1 else {"answers": fields}, ensure_ascii=False))
    return 0


def _show_settings(args: argparse.Namespace) -> int:
    """Print the settings that a question would have, without loading weights."""
    with ProgressBar() as progress:
        folder = ModelFolder.open(find_folder(args.model, revision=args.revision, progress=progress))
    limits = FrameOptions(**parsed_settings(args, FrameOptions)).overrides
    defaults = Defaults.of(folder).with_flags(threshold=args.threshold, **limits)
    rows = [(setting.name, setting.value, setting.source) for setting in defaults.settings()]
    usual = make_parser().parse_args([])
    for name in ("mode", "max_tokens", "temperature", "top_p", "seed", "kv_bits", "prefill_step_size", "dtype"):
        value = getattr(args, name)
        source = "flag" if value != getattr(usual, name) else "built-in"
        rows.append((name, value, source) if name != "dtype" or value else (name, "as on disk", "checkpoint"))
    if args.json:
        settings = {name: {"value": value, "source": source} for name, value, source in rows}
        print(json.dumps({"model": str(folder.path), "settings": settings}, ensure_ascii=False))
        return 0
    shown = [(name, str(value).splitlines() or ["(empty)"], source) for name, value, source in rows]
    wide = min(40, max(len(line) for _, lines, _ in shown for line in lines[:1]))
    for name, lines, source in shown:
        first = lines[0] if len(lines) == 1 and len(lines[0]) <= wide else f"{lines[0][: wide - 2]} .."
        print(f"{name:18} {first:{wide}}  {source}")
    return 0


def _what_to_ask(args: argparse.Namespace) -> tuple[Path, list[AskRequest]]:
    """The clip and the questions; the bundled ones where the command line names none."""
    if args.video is not None and not args.prompt:
        raise ConfigError("no question: ask one with --prompt 'What happens at the end?'")
    if args.video is None and args.prompt:
        raise ConfigError("no clip to ask about: name one with --video FILE")
    asking = parsed_settings(args, AskRequest)
    if args.prompt:
        if len(args.video) > 1:
            raise ConfigError(f"--video is given {len(args.video)} times: one clip is asked about at a time, keep one")
        return local_path(args.video[0]), [AskRequest(prompt, args.option, **asking) for prompt in args.prompt]
    if not is_demo_model(args.model):
        raise ConfigError("no clip and no question for this model: add --video FILE --prompt 'What happens?'")
    folder = demo_folder()
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = [row for row in rows if row["video"] == rows[0]["video"]][:2]
    questions = [{**asking, "text": row["question"], "options": row["options"], "kind": row["kind"]} for row in shown]
    return folder / shown[0]["video"], [AskRequest(**question) for question in questions]


def _print_answer(request: AskRequest, events: Iterator[Event], progress: ProgressBar, out: TextIO) -> None:
    """Print a question and its answer as they come."""
    print(f"question    {request.text}", file=out)
    for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", request.options or ()):
        print(f"            {letter}. {option}", file=out)
    reasoning = False
    for event in events:
        progress.clear()
        if isinstance(event, FirstAnswer):
            print(f"first       {event.text}", file=out)
            print(f"confidence  {_gauge(event, request.mode)}", file=out, flush=True)
        elif isinstance(event, ReasoningDelta):
            text = event.text if reasoning else "reasoning   " + event.text.lstrip()
            print(text, end="", file=out, flush=True)
            reasoning = True
        elif isinstance(event, Answer):
            if reasoning:
                print(file=out)
            print(f"answer      {event.text or '(none)'}", file=out)
            print(f"            {_cost(event)}", file=out, flush=True)


def _gauge(first: FirstAnswer, mode: Mode) -> str:
    """Confidence against the threshold, so that a person sees at a glance why it did or did not think."""
    sure = first.confidence is not None and first.confidence >= first.threshold
    verdict = ", no need to think" if sure else ", so it thinks"
    if mode == "direct":
        verdict = "" if sure else "; --mode direct takes it all the same"
    elif mode == "think" and sure:
        verdict = "; --mode think reasons all the same"
    if first.confidence is None:
        return f"none: it would not answer directly{verdict}"
    filled = round(first.confidence * _BAR_WIDTH)
    bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
    sign = "≥" if sure else "<"
    return f"{first.confidence:.3f} {bar} {sign} {first.threshold:.3f}: {'sure' if sure else 'not sure'}{verdict}"


def _cost(answer: Answer) -> str:
    """One line on how the answer was reached and what it took."""
    usage = answer.usage
    how = "after reasoning" if answer.reasoned else "directly"
    parts = [
        f"{how}: {usage.generated_tokens} tokens in {usage.total_seconds:.2f} s",
        f"prompt {usage.prompt_tokens} tokens ({usage.video_tokens} of video, {usage.cached_tokens} reused)",
        f"peak memory {usage.peak_memory_bytes / 2**20:,.0f} MiB",
    ]
    if answer.problems:
        parts.append("output format: " + ", ".join(_PROBLEMS[problem] for problem in answer.problems))
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
