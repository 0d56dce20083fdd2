"""How a published model wants a conversation written: its chat template, a program in the language of Jinja.

    template = load_chat_template("path/to/checkpoint")
    text = template.render([{"role": "user", "content": "Hello"}])       # ends where the model's answer begins

It runs in a sandbox, as `apply_chat_template` of transformers runs it, and gives the same text as there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from llm.hub.folder import TOKENIZER_CONFIG, check_not_a_pointer, is_hub_folder, read_json
from llm.hub.gguf import GGUFFile, find_gguf
from llm.hub.gguf_tokenizer import gguf_chat_templates, gguf_special_tokens
from llm.hub.sandbox import sandbox
from llm.hub.tables import PretrainedError

CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """A template and the special tokens that it may name. `where` is the file it came from, for errors.

    Raises PretrainedError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: Path):
        self.special_tokens, self.where = dict(special_tokens), where
        try:
            self.template = sandbox().from_string(source)
        except TemplateError as error:
            raise PretrainedError(f"the chat template of {where} cannot be read: {error}") from None

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The text of messages with `role` (system, user, assistant) and `content`, up to where an answer begins.

        Raises PretrainedError where the template refuses the messages, or reaches for what the sandbox forbids.
        """
        chat = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        try:
            return self.template.render(**self.special_tokens, **chat, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program, which can fail in any way
            raise PretrainedError(f"the chat template of {self.where} stops: {error or type(error).__name__}") from None


def load_chat_template(path: str | Path, name: str = "default") -> ChatTemplate:
    """The chat template of a hub folder or a GGUF file; `name` chooses where there are several.

    Raises PretrainedError where there is none, or none of that name.
    """
    path = Path(path)
    if file := find_gguf(path):
        stored = GGUFFile(file)
        templates, special_tokens, where = gguf_chat_templates(stored), gguf_special_tokens(stored), file
    else:
        settings = read_json(path / TOKENIZER_CONFIG, optional=True) if is_hub_folder(path) else {}
        templates, where = read_templates(path, settings), path
        special_tokens = read_special_tokens(path, settings)
    if not templates:
        raise PretrainedError(
            f"{path} has no chat template (in {TOKENIZER_CONFIG} or {CHAT_TEMPLATE}), so it was not trained to chat: "
            "name a model that was, often called Instruct or Chat, or leave out --chat and give it a --prompt"
        )
    if name not in templates:
        known = ", ".join(sorted(templates))
        raise PretrainedError(f"{path} has no chat template {name!r}: choose with --template from {known}")
    return ChatTemplate(templates[name], special_tokens, where)


def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a hub folder by name. Files of their own come before tokenizer_config.json, as in transformers.

    Raises PretrainedError where tokenizer_config.json has something else in their place.
    """
    files = {"default": folder / CHAT_TEMPLATE} if (folder / CHAT_TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    for file in files.values():
        check_not_a_pointer(file)
    found = settings.get("chat_template")
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        found = {each.get("name"): each.get("template") for each in found}
    elif found is not None:
        found = {"default": found}
    if not all(isinstance(text, str) for pair in (found or {}).items() for text in pair):
        raise PretrainedError(f"{folder / TOKENIZER_CONFIG}: chat_template is neither a text nor texts with names")
    return found or {}


def read_special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens that have a name, such as `bos_token`. Older folders have them in a file of their
    own."""
    older = {} if "added_tokens_decoder" in settings else read_json(folder / "special_tokens_map.json", optional=True)
    found = {name: value for name, value in {**settings, **older}.items() if name in SPECIAL_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
