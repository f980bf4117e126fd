"""From a stream of token ids to a stream of text, with the characters that each token covers.

Decoding everything again for each token costs a quadratic number of token decodes, and decoding each token alone is
wrong: a character may be spread over several tokens, and some tokenizers drop or add a space at the start of every
decode. So a short window is decoded: the newest tokens, after enough context to replace everything before.

Decisions
- A window begins where the text so far ended in a whole character, and it begins with tokens that were already read,
  so whatever a tokenizer does at the start of a decode happens to both texts that are compared.
- An incomplete character shows as U+FFFD at the end, so up to three of them there are held back (UTF-8 needs at most
  three bytes before the last; byte-fallback decoders write one U+FFFD for each). They are returned as soon as anything
  else follows or `flush` is called, so a real U+FFFD is late by a token and never lost.
- A token that carries a part of a character covers the whole character. A token without text of its own (a special
  token that the decoder skips) covers nothing.
- Text that was returned is never taken back, even if a decoder changes it (byte-fallback decoders do so next to a real
  U+FFFD, which they also write for each pending byte; byte-level ones, such as Qwen's, never do).
"""

from collections.abc import Callable

__all__ = ["Detokenizer"]

_UNREADABLE = "\ufffd"
_HELD_MOST = 3
_WINDOW = 8  # tokens: a longer one makes each decode dearer, a shorter one adds decodes of the context
_WINDOW_MOST = 64  # tokens without a whole character at their end before the window is cut by force


class Detokenizer:
    """Reads tokens one by one; the pieces of text that it returns add up to the decoding of all of them.

    Args:
        decode: token ids -> text. Called with a few ids at a time.

    Attributes:
        spans: for each token the characters [start, end) that it covers, counted from the first token on. Those of
            tokens in an incomplete character are provisional until it is complete.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self.spans: list[tuple[int, int]] = []
        self._window: list[int] = []
        self._base = 0  # characters before the window's text
        self._text = ""  # the window's text, with what is held back
        self._returned = ""  # the part of it that has been returned
        self._whole = (0, 0)  # tokens and characters of the window up to the last whole character ..
        self._whole_before = (0, 0)  # .. and up to the one before

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that it makes readable, often its own, sometimes none."""
        self._window.append(token_id)
        text = self._decode(self._window[:])
        self._cover(text)
        held = min(len(text) - len(text.rstrip(_UNREADABLE)), _HELD_MOST)
        self._text = text
        delta = ""
        if not held or text.startswith(self._returned):
            delta = self._give(len(text) - held)
        if not held:
            self._whole_before, self._whole = self._whole, (len(self._window), len(text))
            if len(self._window) > _WINDOW:
                self._shorten()
        if len(self._window) > _WINDOW_MOST:
            delta += self._cut()
        return delta

    def flush(self) -> str:
        """Return the text that is still held back: the tokens ended within a character, or in real U+FFFD."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        """Return the window's text up to `end`, without the part that has been returned."""
        delta = self._text[len(self._returned) : end]
        if delta:
            self._returned = self._text[:end]
        return delta

    def _cover(self, text: str) -> None:
        """Record which characters the newest token covers, now that the window's text is `text`."""
        before, after = len(self._text), len(text)
        start = before
        if self._text.endswith(_UNREADABLE):
            if after < before:  # one U+FFFD a byte has become one character: it belongs to all of its tokens
                start = min(self._whole[1], after)
                pending = len(self._window) - 1 - self._whole[0]
                for back in range(1, min(pending, len(self.spans)) + 1):
                    self.spans[-back] = (self._base + start, self._base + after)
            elif after == before or text[before - 1] != _UNREADABLE:
                start = before - 1
        self.spans.append((self._base + min(start, after), self._base + after))

    def _shorten(self) -> None:
        """Drop the tokens up to the last but one whole character, unless the rest decodes to no text."""
        tokens, _ = self._whole_before
        context = self._decode(self._window[tokens:])
        if context:
            self._restart(tokens, context)

    def _cut(self) -> str:
        """Shorten a window that never ends in a whole character, where that leaves the text as it is."""
        size = len(self._window)
        for tokens in range(size - 8, size - 4):
            head, rest = self._decode(self._window[:tokens]), self._decode(self._window[tokens:])
            if head + rest == self._text:
                break
        else:
            head = self._text[: len(self._text) - len(rest)]
        delta = self._give(len(head))
        surplus = len(self._returned) - len(head)
        self._restart(tokens, rest)
        self._returned = rest[:surplus]
        return delta

    def _restart(self, tokens: int, text: str) -> None:
        """Let the window begin at one of its tokens; `text` is what the rest decodes to, all of it returned."""
        self._base += len(self._text) - len(text)
        del self._window[:tokens]
        self._text = self._returned = text
        self._whole_before, self._whole = (0, 0), (len(self._window), len(text))
