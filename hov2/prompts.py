"""Every word that a model reads: the policy's prompts and the judge's rubrics.

The words are in prompts.json beside this file; SFT, GRPO and evaluation build the same prompt of them with
`Prompts.chat` and `render`. Any word can be replaced from a JSON file of the same shape that names just what it changes
(the config's `prompts`), for instance to evaluate a released checkpoint under the words that it was trained with. A
text may be given as a list of its lines.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hov2.config import fault_of_text


def _read(path: str | Path) -> Any:
    """What a prompts file says, each list of lines as one text."""
    text = Path(path).read_text(encoding="utf-8-sig")
    return json.loads(text, object_hook=_with_joined_lines)


def _with_joined_lines(words: dict) -> dict:
    joined = {}
    for key, value in words.items():
        if isinstance(value, list):
            value = "\n".join(str(line) for line in value)
        joined[key] = value
    return joined


DEFAULTS = _read(Path(__file__).with_name("prompts.json"))
CHOICE_TYPES = ("multiple choice", "emer_ov_mc")  # these need options
_ITEMS = {
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
}
_VIDEO_WITH_AUDIO = "<|vision_bos|><|audio_bos|><|VIDEO|><|audio_eos|><|vision_eos|>"
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")  # the form of Qwen's special tokens
_PARENTHESES = str.maketrans("[]［］【】", "()()()")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class PromptsError(ValueError):
    """A prompts file that can't be used; the message names the file and the key and says what would be right."""


@dataclass(frozen=True)
class Prompts:
    """All words, `DEFAULTS` with replacements, and the messages made of them."""

    words: dict

    def chat(self, sample: Any) -> list[dict]:
        """Return the prompt of a Sample: a system and a user message, each content a list of items.

        The user's items are the media, in the order of `sample.media_kinds` ("image", "video", "audio"), then one text:
        the line that names the media, `sample.problem`, for the choice types `sample.options` one a line, and the
        instruction of `sample.problem_type`. Empty texts leave no line.
        """
        lines = [self._media_line(sample.media_kinds), sample.problem]
        if sample.options and sample.problem_type in CHOICE_TYPES:
            lines.append(fill(self.words["options"], options="\n".join(sample.options)))
        lines.append(self.words["instructions"][sample.problem_type])
        text = "\n".join(line for line in lines if line)
        media = [{"type": kind} for kind in sample.media_kinds]
        return [
            {"role": "system", "content": [{"type": "text", "text": self.words["system"]}]},
            {"role": "user", "content": [*media, {"type": "text", "text": text}]},
        ]

    def judge_messages(self, kind: str, **fields: object) -> list[dict]:
        """Return what the judge is asked, as one OpenAI chat message of the user's: some models know no system role.

        `kind` and its `fields`: "context" (reference, candidate), "logic" (context, think), "consistency" (reference,
        answer), "synonyms" (first, second, most). In the fields brackets become parentheses, and "<" is followed by a
        space, so that no text can end its block or hold a control token of the judge's chat template.
        """
        words = self.words["judge"]
        harmless = {name: _without_marks(str(value)) for name, value in fields.items()}
        text = f"{words['system']}\n\n{fill(words[kind], **harmless)}".lstrip()
        return [{"role": "user", "content": text}]

    def _media_line(self, kinds: Iterable[str]) -> str:
        """The line that names the media; "" without any."""
        words = self.words["media"]
        kinds = list(kinds)
        if not kinds:
            return ""
        if kinds == ["video", "audio"]:
            names = words["video+audio"]
        else:
            names = words["and"].join(words[kind] for kind in kinds)
        return fill(words["line"], media=names)


def load_prompts(path: str | Path | None = None) -> Prompts:
    """Return `DEFAULTS` with the replacements of the JSON file at `path`, if one is given.

    Raises PromptsError for a file that can't be read as JSON, an unknown key, a value that is not text, a text with a
    special token, or one without the placeholders, like {options}, of the text it replaces.
    """
    try:
        replacements = {} if path is None else _read(path)
    except (OSError, ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise PromptsError(f"{path}: can't be read as JSON: {error}") from None
    return Prompts(_replaced(DEFAULTS, replacements, str(path)))


def fill(template: str, **fields: object) -> str:
    """Return `template` with each {name} of `fields` replaced once; other braces, and those in the values, stay."""

    def value_of(placeholder: re.Match) -> str:
        return str(fields.get(placeholder[1], placeholder[0]))

    return _PLACEHOLDER.sub(value_of, template)


def render(messages: list[dict], interleave_audio: bool = False) -> str:
    """Write messages in Qwen2.5-Omni's ChatML, one placeholder token a medium, up to where the assistant's turn begins.

    A system message without text is left out. `interleave_audio`: a video followed by an audio item is one item, the
    video with its sound inside. Raises ValueError for a text that holds a control token, which would end its turn or
    pass for a medium.
    """
    text = ""
    for message in messages:
        body = _body(message["content"], interleave_audio)
        if body or message["role"] != "system":
            text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def _body(content: list[dict], interleave_audio: bool) -> str:
    """The items of a message as text."""
    parts = []
    for item in content:
        if item["type"] == "text":
            control = SPECIAL_TOKEN.search(item["text"])
            if control:
                raise ValueError(f"the text {item['text'][:60]!r} holds the control token {control[0]}")
            parts.append(item["text"])
        elif interleave_audio and item["type"] == "audio" and parts and parts[-1] == _ITEMS["video"]:
            parts[-1] = _VIDEO_WITH_AUDIO
        else:
            parts.append(_ITEMS[item["type"]])
    return "".join(parts)


def _without_marks(text: str) -> str:
    """`text` without what marks the parts of a conversation: [End of candidate], [INST], <|im_end|>, </s>."""
    text = text.translate(_PARENTHESES)
    return re.sub(r"([<＜])(?=\S)", r"\1 ", text)


def _replaced(words: dict, replacements: Any, where: str) -> dict:
    """A copy of `words` with the `replacements`; `where` is how an error begins."""
    if not isinstance(replacements, dict):
        raise PromptsError(f"{where}: expected an object, got {type(replacements).__name__}")
    words = dict(words)
    for key, value in replacements.items():
        if key not in words:
            raise PromptsError(f"{where}: unknown key {key!r}; known keys: {', '.join(words)}")
        if isinstance(words[key], dict):
            words[key] = _replaced(words[key], value, f"{where}: {key}")
        else:
            _check_text(value, words[key], f"{where}: {key}")
            words[key] = value
    return words


def _check_text(text: Any, default: str, where: str) -> None:
    """Raise PromptsError if `text` can't take the place of the `default`."""
    if not isinstance(text, str):
        raise PromptsError(f"{where}: expected text, got {type(text).__name__}")
    missing = set(_PLACEHOLDER.findall(default)) - set(_PLACEHOLDER.findall(text))
    if missing:
        raise PromptsError(f"{where}: the placeholder {{{min(missing)}}} is missing")
    if fault_of_text(text):
        raise PromptsError(f"{where}: {fault_of_text(text)}")
    special = SPECIAL_TOKEN.search(text)
    if special:
        raise PromptsError(f"{where}: {special[0]} has the form of a special token")
