"""A small terminal of our own, which reads what was written to it."""

import io
import re


class Screen(io.StringIO):
    """A terminal of some columns: `lines()` is what it shows after everything that was written."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def lines(self, columns):
        cells, row, column = {}, 0, 0
        for part in re.findall(r"\x1b\[\??[\d;]*[a-zA-Z]|.", self.getvalue(), re.DOTALL):
            if part == "\n":
                row, column = row + 1, 0
            elif part == "\r":
                column = 0
            elif part == "\x1b[2K":
                cells = {at: char for at, char in cells.items() if at[0] != row}
            elif part.startswith("\x1b") and part.endswith("A"):
                row = max(0, row - int(part[2:-1]))
            elif part.startswith("\x1b"):
                assert part.endswith("m") or part.startswith("\x1b[?25"), f"{part!r} is not known to this terminal"
            else:
                if column == columns:
                    row, column = row + 1, 0
                cells[row, column] = part
                column += 1
        shown = ["".join(cells.get((at, place), " ") for place in range(columns)).rstrip() for at in range(row + 1)]
        return shown[:-1] if not shown[-1] else shown
