"""MVBench: 20 tasks of temporal understanding with 200 questions each.

Files, as `OpenGVLab/MVBench` has them. The annotations are

    json/<task>.json              a list of {"video", "question", "candidates", "answer" (a candidate's text)}, and
                                  "start" and "end" where only a part of the video is meant

and the videos are in one folder per task (`_FOLDERS`), beside json/, in video/, or in data0613/ within either, in one
of two layouts, which may be mixed:

- Cut: the Hub's `video` revision, which lmms-eval's `mvbench` tasks read. A name may contain the part's times, as in
  `star/Charades_segment/USNP1_1.3_15.4.mp4`. Such a clip is shown whole.
- Uncut: the first release, which the authors' own script reads: `star/Charades_v1_480/USNP1.mp4` with `start` and
  `end`; and for Episodic Reasoning `tvqa/frames_fps3_hq/<clip>/00001.jpg ..`, folders of frames at 3 per second.

`task` is the task. Ids are `<task>-<number>`, numbered from 0 in the order of the file. The videos of Fine-grained Pose
(NTU RGB+D) are not in the release and have to be added as `nturgbd/`. Tasks whose file is missing are listed as
skipped.
"""

import math
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.option_letters import letter_of
from mlxvr.data.tables import as_list, as_text
from mlxvr.errors import DataError
from mlxvr.storage.paths import list_visible

__all__ = ["read"]

_ROOTS = (".", "video", "data0613", "video/data0613")
# (cut, uncut): the folders of a task's videos in the two layouts; only tasks of segments have parts.
_FOLDERS: dict[str, tuple[str, str]] = {
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "action_count": ("", "perception/videos"),
    "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
    "action_prediction": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_sequence": ("star/Charades_segment", "star/Charades_v1_480"),
    "character_order": ("", "perception/videos"),
    "counterfactual_inference": ("", "clevrer/video_validation"),
    "egocentric_navigation": ("", "vlnqa"),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq"),
    "fine_grained_action": ("", "Moments_in_Time_Raw/videos"),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "moving_attribute": ("", "clevrer/video_validation"),
    "moving_count": ("", "clevrer/video_validation"),
    "moving_direction": ("", "clevrer/video_validation"),
    "object_existence": ("", "clevrer/video_validation"),
    "object_interaction": ("star/Charades_segment", "star/Charades_v1_480"),
    "object_shuffle": ("", "perception/videos"),
    "scene_transition": ("", "scene_qa/video"),
    "state_change": ("", "perception/videos"),
    "unexpected_action": ("", "FunQA_test/test"),
}
_FRAMES_FPS = 3.0  # of the folders of frames


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the questions, task by task."""
    paths = [path for path in folder.files("json/*.json", "*.json") if path.stem in _FOLDERS]
    if not paths:
        raise DataError(
            f"{folder.root} holds none of MVBench's tasks, such as json/action_count.json: unpack them there"
        )
    for task in sorted(_FOLDERS.keys() - {path.stem for path in paths}):
        yield Entry(f"{task}.json", {}, "", None, "the task's file is missing")
    for path in paths:
        for number, (line, record) in enumerate(folder.table(path)):
            options = [as_text(option) for option in as_list(record.get("candidates"))]
            row = {
                "id": f"{path.stem}-{number}",
                "question": record.get("question"),
                "options": options,
                "answer": letter_of(as_text(record.get("answer")), options),
                "task": path.stem,
            }
            name = as_text(record.get("video"))
            cut, uncut = _FOLDERS[path.stem]
            video = _find_cut(folder, cut, name, record) if cut else None
            if video is None:
                video = folder.find(name, [f"{root}/{uncut}" for root in _ROOTS], frames=True)
                if cut.endswith("_segment"):
                    row |= {"start": record.get("start"), "end": record.get("end")}
                if video is not None and video.is_dir():
                    row["frames_fps"] = _FRAMES_FPS
            yield Entry(line, row, f"{uncut}/{name}", video)


def _find_cut(folder: Folder, place: str, name: str, record: dict[str, Any]) -> Path | None:
    """Return the clip that was cut to the record's part, named after the video or after the video and the times."""
    folders = [f"{root}/{place}" for root in _ROOTS]
    if video := folder.find(name, folders):
        return video
    part = record.get("start"), record.get("end")
    stem = name.rpartition(".")[0] or name
    if None in part or "/" in stem or stem in ("", ".", ".."):
        return None
    for subfolder in folders:
        for path in list_visible(folder.root / subfolder, f"{escape(stem)}_*_*.*"):
            if _same_times(path.stem.removeprefix(f"{stem}_"), part):
                return path
    return None


def _same_times(text: str, part: tuple[Any, Any]) -> bool:
    try:
        return all(math.isclose(float(time), float(end), abs_tol=1e-3) for time, end in zip(text.split("_"), part))
    except (TypeError, ValueError):
        return False
