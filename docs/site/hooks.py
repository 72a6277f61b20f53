"""What the site does otherwise than the folder: links out of it, and the reference with types and sources.

Documents are written to be read where they lie, in a repository. A link that leads out of `docs` goes to the repository
where FPE_PROJECT_URL names it, and is its words alone elsewhere; so the site of a checkout has no broken link.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from docs.reference import pages

__all__ = ["on_page_content", "on_page_markdown"]

_DOCS = Path(__file__).resolve().parents[1]
_URL = os.environ.get("FPE_PROJECT_URL", "").rstrip("/")
#: Code, which is left as it is, or a link to a file.
_LINK = re.compile(r"```.*?```|`[^`\n]*`|(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)]*)?\)", re.DOTALL)
_ROLE = re.compile(r":\w+:<code>~?\.?([^<]+)</code>")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page's text as the site has it."""
    path = page.file.src_uri
    packages = {f"reference/{package.__name__}.md": package for package in pages.PACKAGES}
    if path in packages:
        return _reference(packages[path])
    return _LINK.sub(lambda link: _led(link, posixpath.dirname(path)), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Names in docstrings are written with roles of reStructuredText."""
    return _ROLE.sub(lambda role: f"<code>{role[1].rpartition('.')[2]}</code>", html)


def _reference(package: Any) -> str:
    """A package's public names, each from where it is defined: it is re-exported on first use, which cannot be read."""
    lines = [f"# `{package.__name__}`", ""]
    for name, found in pages.public()[package.__name__]:
        lines += [f"## `{name}`", "", f"::: {found.__module__}.{found.__qualname__}", ""]
    return "\n".join(lines)


def _led(link: re.Match[str], folder: str) -> str:
    if link[2] is None:
        return link[0]
    words, target, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
    outside, lies = target.startswith(".."), _DOCS / target
    if not outside and lies.is_file() and lies.suffix != ".py":
        return link[0]
    if not _URL:
        return words
    inside = posixpath.normpath(posixpath.join("docs", target))
    return f"[{words}]({_URL}/blob/main/{inside}{anchor})"
