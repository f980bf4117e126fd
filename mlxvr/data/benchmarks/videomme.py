"""Video-MME: 2,700 questions about 900 videos, with subtitles for most of them.

Files, as `lmms-lab/Video-MME` has them and lmms-eval's `videomme` task reads them:

    videomme/test-00000-of-00001.parquet
        question_id, videoID, duration (short, medium, long), domain, sub_category, task_type,
        question, options ("A. ..", four of them), answer (a letter)
    data/<videoID>.mp4            from videos_chunked_*.zip; also .MP4, .mkv
    subtitle/<videoID>.srt        from subtitle.zip

`task` is the task type, `category` the duration, by which the paper groups its results.

Subtitles: the public prompt puts `This video's subtitles are listed below:` and the lines before the question, or
`No subtitles available`. Departure: the public prompt keeps only the lines of the sampled frames, which are known only
once a model is chosen; here all lines are kept, as in its variant for models with a long context.
"""

from collections.abc import Iterator

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.benchmarks.subtitles import NO_SUBTITLES, read_srt
from mlxvr.data.option_letters import strip_letters
from mlxvr.data.tables import as_list, as_text

__all__ = ["read"]

_VIDEOS = ("data", "videos", "video", ".")
_SUBTITLES = ("subtitle", "subtitles")


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the questions."""
    for path in folder.files("videomme/test-*.parquet", "test-*.parquet"):
        for line, record in folder.table(path):
            video = as_text(record.get("videoID"))
            row = {
                "id": record.get("question_id"),
                "question": record.get("question"),
                "options": strip_letters([as_text(option) for option in as_list(record.get("options"))]),
                "answer": record.get("answer"),
                "task": record.get("task_type"),
                "category": record.get("duration"),
            }
            if subtitles:
                file = folder.find(f"{video}.srt", _SUBTITLES)
                row["subtitles"] = (read_srt(file) if file else "") or NO_SUBTITLES
            yield Entry(line, row, video, folder.find(video, _VIDEOS))
