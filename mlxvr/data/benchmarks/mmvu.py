"""MMVU, validation: the multiple-choice questions about expert videos of 27 subjects.

Files, as `yale-nlp/MMVU` and `lmms-lab/MMVU` have them and lmms-eval's `mmvu_val` task reads them:

    validation.json (or validation-00000-of-00001.parquet)
        id, question_type (multiple-choice, open-ended), question, choices {"A": .. "E": ..}, answer (a letter),
        video (an address that ends in videos/<Subject>/<n>.mp4) or video_path (videos/<Subject>/<n>.mp4)
    videos/<Subject>/<n>.mp4

`task` is the subject, `category` its discipline, as lmms-eval groups them. Open-ended questions are left out: their
public grade comes from a language model.
"""

from collections.abc import Iterator, Mapping

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.tables import as_text

__all__ = ["read"]

_DISCIPLINES = {
    "Science": "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science Neurobiology Electromagnetism "
    "Thermodynamics Mechanics",
    "Engineering": "Civil_Engineering Electrical_Engineering Mechanical_Engineering Biomedical_Engineering "
    "Electronics_and_Communication Computer_Science",
    "Healthcare": "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry",
    "Humanities_and_Social_Science": "Art Literature History Law Economics Management",
}
_DISCIPLINE_OF = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects.split()}


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the multiple-choice questions."""
    for path in folder.files("validation.json", "validation-*.parquet", "data/validation-*.parquet"):
        for line, record in folder.table(path):
            if record.get("question_type") == "open-ended":
                continue
            video = as_text(record.get("video_path") or record.get("video"))
            video = f"videos/{video.rpartition('videos/')[2]}"
            subject = video.split("/")[-2]
            choices = record.get("choices")
            listed = [as_text(choices.get(letter)) for letter in "ABCDE"] if isinstance(choices, Mapping) else []
            while listed and not listed[-1]:
                listed.pop()
            row = {
                "id": record.get("id"),
                "question": record.get("question"),
                "options": listed,
                "answer": record.get("answer"),
                "task": subject,
                "category": _DISCIPLINE_OF.get(subject, ""),
            }
            yield Entry(line, row, video, folder.find(video, (".",)))
