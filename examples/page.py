"""Writes docs/clients.md from the files beside this one; `--check` says whether it is in step with them.

    .venv/bin/python examples/page.py [--check]

A file begins with what it is: a title, and what a user has to know. The rest is shown as it is.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "clients.md"
LANGUAGES = {".py": "python", ".mjs": "javascript", ".sh": "sh"}
ORDER = ("openai", "anthropic", "langchain", "llamaindex", "llm", "codex", "claude", "opencode", "aider")

INTRO = """# Clients

How to reach the fleet from common libraries and tools. Each section is a file of `examples/`, which
`make test-fronts` runs through the gateway with a key. There libraries ask the real model. Agents ask simulated
replicas, because their instructions are longer than the small model's context.

All read these from the environment. `make key ARGS='create alice'` makes a key. If the gateway asks for none, any
text will do.

```sh
export OPENAI_BASE_URL=http://localhost/v1 OPENAI_API_KEY=sk-fleet-...
export ANTHROPIC_BASE_URL=http://localhost ANTHROPIC_API_KEY=sk-fleet-...
export MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
```

`MODEL` is the default without a GPU; otherwise put in a name from `/v1/models`. Use another shell than for `make up`,
which would take `MODEL` for its own setting.

Python files name their own packages: `uv run examples/openai_chat.py`. Node files need
`npm install openai @anthropic-ai/sdk` first: `node examples/openai_chat.mjs`. Shell files fetch their
tool with `npx` or `uvx`: `sh examples/llm.sh`.

"""


def parts(path: Path) -> tuple[str, str, str]:
    """A file's title, what is said of it, and its code."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        found = re.fullmatch(r'# /// script\n(?:#.*\n)+?# ///\n"""(.*?)\n\n(.*?)"""\n\n(.*)', text, re.DOTALL)
        if not found:
            raise SystemExit(f"{path.name} must begin with its packages and a docstring of a title and a paragraph")
        title, words, code = found.groups()
    else:
        mark = "//" if path.suffix == ".mjs" else "#"
        lines = text.splitlines()[1:]
        head = lines[: next(i for i, line in enumerate(lines) if not line.startswith(mark))]
        title, _, words = "\n".join(line.removeprefix(mark).strip() for line in head).partition("\n\n")
        code = "\n".join(lines[len(head) :]).lstrip("\n")
    return title.rstrip("."), words.strip(), code.strip()


def page() -> str:
    """The whole page."""
    paths = [path for path in HERE.iterdir() if path.suffix in LANGUAGES and path != Path(__file__)]

    def place(path: Path) -> tuple[int, str]:
        return next(i for i, word in enumerate(ORDER) if path.name.startswith(word)), path.name

    text = INTRO
    for path in sorted(paths, key=place):
        title, words, code = parts(path)
        text += f"## {title}\n\n{words}\n\n`examples/{path.name}`\n\n```{LANGUAGES[path.suffix]}\n{code}\n```\n\n"
    return text.rstrip() + "\n"


def main() -> int:
    """Writes or checks the page; 1 where it is out of step."""
    if "--check" not in sys.argv:
        PAGE.write_text(page(), "utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text("utf-8") == page():
        return 0
    print("docs/clients.md is out of step with examples/: run examples/page.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
