"""Training sets as others released them, read as rows (`mlxvr.data.rows`): VideoAuto-R1's public mix, and our own.

    rows, left_out = read_rows(Path("charades.json"), format="charades-sta", media_root=Path("Charades_v1_480"))

Each format is a function from one record to the fields of a row; its docstring says which fields it reads. They are
those of the annotation files in `IVUL-KAUST/VideoAuto-R1-Data`, as the public code reads them (arXiv 2601.05175).
Rows carry question and options only: placeholders of pictures, words that ask for a box and lettered options within the
question are taken out where they are certain (`wording`), since our prompt says the same in its own way.
"""

from mlxvr.data.training_sets.training_set_registry import FORMATS, format_name, read_rows

__all__ = ["FORMATS", "format_name", "read_rows"]
