"""Where the chat templates of published models run.

A template comes with the weights, from whoever published them. In the sandbox it sees what it is given, cannot change
it, and reaches no other object of Python. Functions, filters and tags are those of transformers.
"""

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """The tag {% generation %}, which marks answers for training; the text within it is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore: such attributes lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any):
        self, *args = args
        for name in (attributes := dict(*args, **kwargs)):
            check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class MakeDict:
    """Python's `dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name!r} begins with an underscore, which no attribute of a namespace may")


def sandbox() -> ImmutableSandboxedEnvironment:
    """Where templates run: values cannot be changed, and nothing private of Python can be reached."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": MakeDict(),
        "namespace": PublicNamespace,
    }
    return environment


def raise_exception(message: str) -> None:
    """What a template calls for messages that it does not know, such as one of the system with Gemma."""
    raise TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
