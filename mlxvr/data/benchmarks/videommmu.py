"""VideoMMMU: 900 questions about 300 lectures, 300 for each of perception, comprehension and adaptation.

Files, as `lmms-lab/VideoMMMU` has them and lmms-eval's `video_mmmu` tasks read them:

    Perception/test-00000-of-00001.parquet, and the same for Comprehension and Adaptation
        id (validation_Art_12), question, options (empty: open-ended), answer, question_type
    Art/<id>.mp4, Business/, Engineering/, Humanities/, Medicine/, Science/     from the zips of these names

`task` is the subject in the id, `category` the track. A lecture has a question in each track, so ids are `Track/id`.

Adaptation asks about a picture at the end of the video. Its questions begin with the sentences that lmms-eval puts
there, without the one that asks for the answer alone. Open-ended answers are numbers or formulas: kind `math`.
"""

from collections.abc import Iterator

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.option_letters import strip_letters
from mlxvr.data.tables import as_list, as_text

__all__ = ["read"]

_TRACKS = ("Perception", "Comprehension", "Adaptation")
_VIDEOS = ("Art", "Business", "Engineering", "Humanities", "Medicine", "Science", "videos", ".")
_APPLY = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {} question. "
    "The image for this question is at the end of the video.\n"
)


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the questions, track by track."""
    for track in _TRACKS:
        for path in folder.files(f"{track}/test-*.parquet", f"{track}/test/*.parquet"):
            for line, record in folder.table(path):
                video = as_text(record.get("id"))
                options = strip_letters([as_text(option) for option in as_list(record.get("options"))])
                opening = _APPLY.format("multi-choice" if options else "open-ended") if track == "Adaptation" else ""
                row = {
                    "id": f"{track}/{video}",
                    "question": opening + as_text(record.get("question")),
                    "options": options,
                    "answer": record.get("answer"),
                    "kind": "exact_match" if options else "math",
                    "task": "_".join(video.split("_")[1:-1]),
                    "category": track,
                }
                yield Entry(line, row, video, folder.find(video, _VIDEOS))
