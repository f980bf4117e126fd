"""Which file a user's text means, and which files of a folder are the user's.

Systems leave files of their own beside a user's: macOS writes `._clip.mp4` beside `clip.mp4` on drives that are not its
own, and `.DS_Store` into every folder that Finder has shown; Windows writes `Thumbs.db`; an archive packed on a Mac
unpacks into `__MACOSX`. Their names match the patterns of the files beside them, and their content is something else.
So every listing of a folder goes through `list_visible` (or says `list_all`, where hidden files count).

A location may be a path, a path that begins with `~`, or a `file:` URL (RFC 8089). Unicode writes some letters in two
ways (NFC and NFD, UAX 15) that look alike and are different bytes: Macs take both for one name, Linux does not, and
data sets move between the two.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mlxvr.errors import MediaError

__all__ = [
    "PICTURE_SUFFIXES",
    "explain_missing",
    "list_all",
    "list_frames",
    "list_visible",
    "local_path",
    "natural_key",
    "parse_location",
]

_SYSTEM_NAMES = frozenset({"__macosx", "desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"})
PICTURE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}")  # one letter would be a drive of Windows
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*[;,]", re.ASCII)
_SHOWN_CHARACTERS = 200  # of a location in a message; some are pictures spelt out in base64


def list_visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Entries of a folder that match a glob pattern, sorted by name, without hidden ones and those of the system.

    In a pattern with several parts no part that matched may be hidden.
    """
    return sorted(path for path in folder.glob(pattern) if not _is_hidden(path.relative_to(folder)))


def list_all(folder: Path) -> list[Path]:
    """Every entry of a folder, hidden ones too, sorted by name."""
    return sorted(folder.iterdir())


def list_frames(folder: Path) -> list[Path]:
    """The pictures in a folder, by their suffix, in natural order: 1, 2, .., 10."""
    pictures = (path for path in list_visible(folder) if path.suffix.lower() in PICTURE_SUFFIXES and not path.is_dir())
    return sorted(pictures, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts numbers within names by their value: `f2.png` before `f10.png`.

    Names that differ in leading zeros alone are sorted as texts.
    """
    parts = re.split(r"([0-9]+)", name.casefold())  # text, number, text, ..
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)], name


def parse_location(location: str | os.PathLike[str]) -> Path:
    """Return the path that a location means, whether it exists or not.

    Args:
        location: a path; `~` and `~user` at its beginning are home folders, unless a file has that very name; or a
            `file:` URL, percent-decoded.

    Raises `MediaError` for a URL of another scheme or of another machine, and for a text that cannot be a path.
    """
    text = os.fsdecode(location)
    if not text:
        raise MediaError("the path is empty: give the path of a video or an image")
    if "\0" in text:
        raise MediaError(f"{_shown(text)} holds a zero byte, which no path may: check the path")
    path = Path(text)
    if _exists(path):
        return path
    if _DATA_URL.match(text):
        raise MediaError(f"{_shown(text)} is the data of a file, not a path: write it to a file, or give a PIL image")
    if text[:5].lower() == "file:":
        return _from_file_url(text)
    if (match := _SCHEME.match(text)) and not _exists(Path(f"{match[1]}:")):
        url = f"{match[1]}://{text[match.end() :]}"  # `pathlib` has taken one of the slashes away
        raise MediaError(f"{_shown(url)} is a URL, and only local files are read: download it first")
    if text.startswith("~"):
        try:
            return path.expanduser()
        except RuntimeError:  # there is no such user
            return path
    return path


def local_path(location: str | os.PathLike[str]) -> Path:
    """Return the file that a location means: `parse_location`, in the spelling that the disk has.

    Where no file has the name as it is written, this is the file that has it in another Unicode normal form, or else
    the only file in the folder whose name differs in the kind of its spaces alone (macOS writes a narrow space before
    the PM in a screenshot's name, and pasting makes it a plain space).
    """
    path = parse_location(location)
    if _exists(path):
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    if form := next((form for form in forms if _exists(form)), None):
        return form
    if any(character.isspace() for character in path.name):
        alike = [entry for entry in _siblings(path) if _plain_spaces(entry.name) == _plain_spaces(path.name)]
        if len(alike) == 1:
            return alike[0]
    return path


def explain_missing(path: Path) -> str:
    """Say what is wrong with a path that does not exist and what to do; a message's end that follows the path."""
    if path.is_symlink():
        return f"is a link to {_shown(os.readlink(path))}, which does not exist: check where it points"
    if not path.name.startswith(".") and _exists(path.with_name(f".{path.name}.icloud")):
        return "is in iCloud and has not been downloaded to this Mac: open it in Finder once, or run `brctl download`"
    text = str(path)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and _exists(Path(text[1:-1])):
        return "does not exist, but the path without the quotes does: leave them out"
    if "\\" in text and _exists(Path(re.sub(r"\\(.)", r"\1", text))):
        return "does not exist, but the path without the backslashes does: leave them out"
    if near := _near_name(path):
        return f"does not exist: is {near!r} meant, in the same folder?"
    return "does not exist: check the path"


def _from_file_url(text: str) -> Path:
    rest = text[len("file:") :]
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise MediaError(
                f"{_shown(text)} is a file of the machine {host!r}: copy it here, or write file:///path for a local one"
            )
        rest = slash + rest
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(rest))))


def _near_name(path: Path) -> str:
    """The name in the path's folder that is most like its own; "" if none is."""
    folded = {_fold(entry.name): entry.name for entry in _siblings(path)}
    near = difflib.get_close_matches(_fold(path.name), folded, 1, cutoff=0.85)
    return folded[near[0]] if near else ""


def _siblings(path: Path) -> list[Path]:
    try:
        return list_visible(path.parent)
    except OSError:
        return []


def _plain_spaces(name: str) -> str:
    """Return a name in one normal form with plain spaces."""
    return "".join(" " if character.isspace() else character for character in unicodedata.normalize("NFC", name))


def _fold(name: str) -> str:
    """Return a name without differences in letter case, normal form and kinds of white space."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part.casefold() in _SYSTEM_NAMES for part in _parts(path))


def _parts(path: Path) -> Iterator[str]:
    return (part for part in path.parts if part != "..")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
