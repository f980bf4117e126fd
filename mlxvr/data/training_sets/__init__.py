"""Read training sets as rows (`mlxvr.data.rows`): those of VideoAuto-R1's public mix as released, and mlxvr's own.

    rows, left_out = read_rows(Path("charades.json"), format="charades-sta", media_root=Path("Charades_v1_480"))

Each format is a function from one record to the fields of a row; its docstring lists the fields that it reads. These
are the fields of the annotation files in `IVUL-KAUST/VideoAuto-R1-Data`, as the public code reads them (arXiv
2601.05175). Rows hold only the question and its options: image placeholders, instructions to write a box and lettered
options within the question are removed where they are certain (`wording`), since mlxvr's prompt adds its own.
"""

from mlxvr.data.training_sets.training_set_registry import FORMATS, format_name, read_rows

__all__ = ["FORMATS", "format_name", "read_rows"]
