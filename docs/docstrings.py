"""For the API page: a docstring's columns of names and explanations, as lists.

    name   explanation,            becomes      - `name`: explanation, and more of it
           and more of it

`make docs` runs this inside mkdocstrings; it needs nothing of dq.
"""

import re

import griffe

ITEM = re.compile(r"(?P<name>\w[\w.=]*(?:, \w+)*) {2,}(?P<text>\S.*)")


def as_lists(text: str) -> str:
    """The docstring with every run of `name   text` lines as a Markdown list; lines further in belong to the last."""
    lines, inside = [], False
    for line in text.splitlines():
        item = ITEM.fullmatch(line)
        if item:
            lines += [] if inside else [""]
            lines.append(f"- `{item['name']}`: {item['text'].replace('  ', ' ')}")
        elif inside and line.startswith("  ") and line.strip():
            lines.append(f"    {line.strip()}")
        else:
            lines += ["", line] if inside and line.strip() else [line]
        inside = bool(item) or (inside and line.startswith("  "))
    return "\n".join(lines)


class Columns(griffe.Extension):
    """Rewrites the docstrings that are shown."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Called for everything griffe reads."""
        if obj.docstring:
            obj.docstring.value = as_lists(obj.docstring.value)
