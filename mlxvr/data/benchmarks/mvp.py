r"""MVP, minimal video pairs: each pair has one question, two similar videos and two opposite answers.

Files, as `facebook/minimal_video_pairs` has them and lmms-eval's `mvp` tasks read them:

    <subset>/mini-00000-of-00001.parquet, full-00000-of-00001.parquet
        subset: human_object_interactions, intuitive_physics, robot_object_interactions, temporal_reasoning
        video_id (<pair>_<1 or 2>), video_path, question, candidates (a list, or text of one), answer (its text),
        source (the data set that the video is from)
    videos/<video_path>           by the authors' scripts, one folder per source

`task` is the subset, `category` the source, `pair` the id without the last part. A pair counts if both answers are
right.

VideoAuto-R1's evaluator starts the model's turn with `\boxed{Answer:` on this benchmark and takes the confidence from
the answer's last token alone; rows have that text as `response_prefix`.
"""

from collections.abc import Iterator

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.option_letters import letter_of
from mlxvr.data.tables import as_list, as_text

__all__ = ["read"]

_SUBSETS = ("human_object_interactions", "intuitive_physics", "robot_object_interactions", "temporal_reasoning")
_VIDEOS = ("videos", ".")
_OPENING = r"\boxed{Answer:"


def read(folder: Folder, *, subtitles: bool, split: str) -> Iterator[Entry]:
    """Yield the questions of a split, "mini" or "full"."""
    for subset in _SUBSETS:
        for path in folder.files(f"{subset}/{split}-*.parquet", f"{subset}/{split}/*.parquet"):
            for line, record in folder.table(path):
                name, video = as_text(record.get("video_id")), as_text(record.get("video_path")).lstrip("/")
                options = [as_text(option) for option in as_list(record.get("candidates"))]
                row = {
                    "id": f"{subset}/{name}",
                    "question": record.get("question"),
                    "options": options,
                    "answer": letter_of(as_text(record.get("answer")), options),
                    "task": subset,
                    "category": record.get("source"),
                    "pair": f"{subset}/{name.rpartition('_')[0]}",
                    "response_prefix": _OPENING,
                }
                yield Entry(line, row, video, folder.find(video, _VIDEOS))
