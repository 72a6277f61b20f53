"""Docstrings as pages and tests need them: words, sections, and the entries of a section."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["SECTIONS", "Docstring", "parsed"]

SECTIONS = ("Args", "Returns", "Yields", "Raises", "Reference")
_HEAD = re.compile(rf"^({'|'.join(SECTIONS)}):[ \t]*(.*)$")
_ENTRY = re.compile(r"^([*\w][\w.*, ]*?):\s+(.*)$")


@dataclass
class Docstring:
    """What a docstring says.

    Args:
        words: everything that is in no section.
        sections: by name, the lines of a section without their indentation.
    """

    words: str = ""
    sections: dict[str, str] = field(default_factory=dict)

    def entries(self, section: str) -> list[tuple[str, str]]:
        """(names, words) of each entry; the names of an entry of several are as they stand, joined by commas."""
        found: list[tuple[str, str]] = []
        for line in self.sections.get(section, "").splitlines():
            match = None if line.startswith(" ") else _ENTRY.match(line)
            if match:
                found.append((match[1], match[2]))
            elif found and line.strip():
                names, words = found[-1]
                found[-1] = names, f"{words} {line.strip()}"
        return found


def parsed(text: str) -> Docstring:
    """A docstring whose common indentation has been taken away (:func:`inspect.getdoc`)."""
    said, words, section = Docstring(), [], ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            section = head[1]
            said.sections[section] = head[2]
        elif section and (line.startswith("    ") or not line.strip()):
            said.sections[section] += f"\n{line[4:]}"
        elif section == "Reference" and line.strip():
            said.sections[section] += f" {line.strip()}"
        else:
            section = ""
            words.append(line)
    said.words = "\n".join(words).strip()
    said.sections = {name: lines.strip("\n") for name, lines in said.sections.items()}
    return said
