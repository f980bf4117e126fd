"""A checkpoint's tokenizer and chat template: text to ids and back, and a conversation to text.

The `tokenizers` library runs `tokenizer.json`. Jinja runs the chat template in a sandbox, configured as in transformers
(blocks trimmed, `tojson` without HTML escapes, `raise_exception`, `strftime_now`); so transformers, which would only be
needed for this, is not imported.

Special tokens, such as `<|im_end|>`, are control characters in the form of text. A user's text must not become one, so
`encode` takes the span that must be read literally: inside it they are encoded like any other text. Tokens that are
added but not special (`<think>` in Qwen3) are words of the vocabulary and are matched anywhere.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mlxvr.errors import CheckpointError

__all__ = ["ChatTokenizer"]

Message = Mapping[str, Any]


class ChatTokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(
        self,
        path: Path,
        *,
        chat_template: str | None = None,
        eos_ids: Iterable[int] = (),
        special_texts: Mapping[str, str] | None = None,
    ):
        """Read a tokenizer.

        Args:
            path: the file `tokenizer.json`.
            chat_template: Jinja source; None: there is none, and `render` raises.
            eos_ids: tokens that end a turn.
            special_texts: variables for templates, such as {"eos_token": "<|im_end|>"}.

        Raises `CheckpointError` when the file cannot be read.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for everything
            raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}): download it again") from error
        self._tokenizer.encode_special_tokens = True  # `encode` recognises them itself, where they are allowed
        self._path = path
        self._template_source = chat_template
        self._special_texts = dict(special_texts or {})
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: index for index, token in added.items() if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.eos_ids = frozenset(eos_ids)

    @property
    def special_ids(self) -> dict[str, int]:
        """Text -> id of every special token."""
        return dict(self._special_ids)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids that have a text, added tokens included; the network's embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token(self, index: int) -> str | None:
        """The text of a token as the vocabulary spells it; None: there is no such id."""
        text: str | None = self._tokenizer.id_to_token(index)
        return text

    def encode(self, text: str, *, literal: tuple[int, int] = (0, 0)) -> list[int]:
        """Text to ids; special tokens are recognised outside the span `literal` (characters, end excluded)."""
        ids: list[int] = []
        done = search_from = 0
        while match := self._special_pattern.search(text, search_from):
            start, end = match.span()
            if start < literal[1] and end > literal[0]:  # overlaps the user's text
                search_from = start + 1
                continue
            ids += self._encode_plain(text[done:start])
            ids.append(self._special_ids[match.group()])
            done = search_from = end
        return ids + self._encode_plain(text[done:])

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Ids to text; bytes that are not (yet) valid UTF-8 give U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Render a conversation with the checkpoint's chat template.

        Args:
            messages: {"role", "content"}; content is a text or a list of {"type": "text" | "image" | "video", ..}.
            add_generation_prompt: whether to begin the assistant's turn.
            variables: further names for the template.

        Raises `CheckpointError` when there is no template or it cannot be rendered.
        """
        import jinja2

        values = {**self._special_texts, "tools": None, "documents": None, **variables}
        try:
            text = self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the chat template beside {self._path} cannot be rendered: {error}") from error
        return str(text)

    @cached_property
    def _template(self) -> Any:
        import jinja2

        if self._template_source is None:
            raise CheckpointError(
                f"{self._path.parent} has no chat template: copy chat_template.jinja from the checkpoint that the "
                "model comes from"
            )
        try:
            return _template_environment().from_string(self._template_source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template beside {self._path} is not valid Jinja: {error}") from error

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []


def _template_environment() -> Any:
    """Jinja, configured as in transformers for chat templates; sandboxed, since templates are downloaded."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}..{% endgeneration %}` marks an assistant's text for training; only its body is used."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

        def parse(self, parser: Any) -> Any:
            """Drop the tag and keep its body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
