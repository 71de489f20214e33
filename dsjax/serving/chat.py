"""Chat templates: from messages to the ids that a model is to continue.

A template is a program in Jinja that comes with a model; it writes the turns as one text, with special tokens between
them. What people have written must not be taken for such a token: where it spells one, the spelling is cut in two, and
the two parts are encoded apart.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsjax.data.tokenizer import Tokenizer

BUILT_IN = """{{ bos_token }}
{%- for message in messages if message['role'] == 'system' %}
    {{- '\\n\\n' if not loop.first }}
    {{- message['content'] }}
{%- endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' }}
{%- endif %}"""
"""The format of DeepSeek-V3 and R1: turns without line breaks between them, earlier answers without their thinking."""

_GIVEN = {"messages", "add_generation_prompt", "bos_token", "eos_token"}
"""Variables that every template has."""
THINKING_TAGS = ("<think>", "</think>")
"""Of an answer's thinking; templates look for them in earlier answers."""

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""


class ChatTemplate:
    """A model's template.

    Attributes:
        origin: where it is from, for people.
        end: id of the token that ends an answer.
        variables: that the template reads beside those that it always has.
    """

    def __init__(self, source: str, origin: str, tokenizer: Tokenizer, *, bos: str, eos: str):
        """Compiles a template.

        Args:
            source: in Jinja, as Hugging Face's libraries read it.
            origin: the file's name, for errors.
            tokenizer: of the model.
            bos: spelling of the token in front of a text.
            eos: of that behind an answer.

        Raises:
            ValueError: it is no Jinja, or `eos` no token.
        """
        # As Hugging Face's libraries do: templates are written for this.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda format: f"{datetime.now():{format}}"}
        try:
            self._template = environment.from_string(source)
            self.variables = find_undeclared_variables(environment.parse(source)) - _GIVEN
        except jinja2.TemplateError as error:
            raise ValueError(f"{origin}: the chat template is no Jinja: {error}") from error
        if eos not in tokenizer.added:
            raise ValueError(f"{origin}: eos_token = {eos!r}: must be a token of the tokenizer")
        self.origin, self.end = origin, tokenizer.added[eos]
        self._tokenizer, self._bos, self._eos = tokenizer, bos, eos
        self._spelled = _any_of(tokenizer.added)
        self._spelled_in_answers = _any_of(tokenizer.added.keys() - THINKING_TAGS)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, opening: int) -> "ChatTemplate":
        """Read a folder's `chat_template.jinja`, or the one in `tokenizer_config.json`; without any, `BUILT_IN`.

        Args:
            folder: of the model.
            tokenizer: of the model.
            opening: id of the token in front of a text, where no file names one.

        Raises:
            ValueError: a file that cannot be used.
        """
        file, described = folder / "tokenizer_config.json", {}
        if file.is_file():
            try:
                described = json.loads(file.read_bytes())
            except ValueError as error:
                raise ValueError(f"{file}: no JSON: {error}") from error
        bos = _spelling(described.get("bos_token")) or tokenizer.token(opening)
        eos = _spelling(described.get("eos_token")) or tokenizer.token(tokenizer.eos)
        source, origin = described.get("chat_template"), str(file)
        if isinstance(source, list):  # several, with names
            source = next((each["template"] for each in source if each["name"] == "default"), None)
        if (own := folder / "chat_template.jinja").is_file():
            source, origin = own.read_text(encoding="utf-8"), str(own)
        if not source:
            source, origin = BUILT_IN, "dsjax's own in DeepSeek-V3's format, as the model's folder has none"
        return cls(source, origin, tokenizer, bos=bos, eos=eos)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Args:
            messages: in their order.
            variables: more of them for the template.

        Raises:
            ValueError: the template does not take these messages.
        """
        given = {"messages": messages, "add_generation_prompt": True, "bos_token": self._bos, "eos_token": self._eos}
        try:
            return self._template.render({**(variables or {}), **given})
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error

    def encode(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> tuple[list[int], str]:
        """Return a conversation's ids, and the text behind the last turn's beginning that is already the answer's.

        Raises:
            ValueError: the template does not take these messages.
        """
        # Nobody can write what nobody can guess; the character is none that a text may have.
        cut = "\ufdd0" + secrets.token_hex(8)
        guarded = [{**message, "content": self._guarded(message, cut)} for message in messages]
        pieces = self.render(guarded, variables).split(cut)
        ids = [id for piece in self._tokenizer.encode(pieces, special=True) for id in piece]
        return ids, pieces[-1]

    def _guarded(self, message: Message, cut: str) -> str:
        """Mark where what a message spells is to be cut."""
        spelled = self._spelled_in_answers if message["role"] == "assistant" else self._spelled
        return spelled.sub(lambda found: found[0][0] + cut + found[0][1:], message["content"])


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match the longest of some tokens; letters and white space, which some tokenizers add, give nobody a voice."""
    spelled = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if token.strip()[1:]]
    return re.compile("|".join(spelled) or "(?!)")


def _spelling(token: Any) -> str:
    """A token in `tokenizer_config.json` is a text, or an object with it."""
    return token.get("content") or "" if isinstance(token, dict) else token or ""


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes what HTML would not like.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
