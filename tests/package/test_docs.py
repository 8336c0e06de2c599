"""README and docs: their code runs, their links resolve, and their command lines name every flag."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from checkpoints_tools.baselines import __main__ as baselines
from checkpoints_tools.convert import command as convert
from checkpoints_tools.export import __main__ as export
from checkpoints_tools.migrate import __main__ as migrate
from checkpoints_tools.pareto import flags as pareto
from checkpoints_tools.publish import command as publish
from grinqh_jax.__main__ import VERBS
from grinqh_jax.cli import bench_serve, benchmark, chat, evaluate, generate, inspect, perplexity, plan, serve

pytestmark = pytest.mark.usefixtures("optimized_programs")

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks/notes").glob("*.md")),
]
PARSERS = {
    "generate": generate.parser,
    "chat": chat.parser,
    "perplexity": perplexity.parser,
    "evaluate": evaluate.parser,
    "benchmark": benchmark.parser,
    "inspect": inspect.parser,
    "plan": plan.parser,
    "serve": serve.parser,
    "bench-serve": bench_serve.parser,
    "convert": convert.parser,
    "baselines": baselines.parser,
    "pareto": pareto.parser,
    "publish": publish.parser,
    "migrate": migrate.parser,
    "export": export.parser,
}
"""Sections of docs/command-line.md and the parser that each describes."""

README_LINES = 150


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(README, id="README"),
        pytest.param(ROOT / "docs/integration.md", id="integration", marks=pytest.mark.slow),
    ],
)
def test_python_blocks_run(page):
    code = blocks(page, "python")
    assert code, f"{page.name} has no block of Python"
    session = {"__name__": "session"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in code:
            exec(compile(block, page.name, "exec"), session)
    assert printed.getvalue().strip()


def test_every_relative_link_resolves():
    broken, found = [], 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            found += 1
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert found > 100
    assert broken == []


def test_the_readme_takes_five_minutes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def sections(page: Path) -> dict[str, str]:
    """The text under each second-level heading."""
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("command", PARSERS)
def test_the_command_line_page_names_every_flag_and_no_other(command):
    parser = PARSERS[command]()
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    table = [line.split(" | ")[0] for line in sections(ROOT / "docs/command-line.md")[command].splitlines()]
    named = re.findall(r"`(-[-\w]+)", "\n".join(line for line in table if line.startswith("| `-")))
    assert sorted(named) == sorted(flags)


def test_the_command_line_page_names_every_verb():
    assert sections(ROOT / "docs/command-line.md").keys() >= VERBS.keys()


def test_quoted_messages_are_in_the_code():
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("grinqh_jax", "checkpoints_tools", "pallas_kernels")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # Joins adjacent string literals.
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) > 20
    assert [message for message in rows if message not in source] == []


def test_quoted_python_commands_run(capsys):
    commands = re.findall(r'`python -c "([^"]+)"`', (ROOT / "docs/troubleshooting.md").read_text())
    assert commands
    for command in commands:
        exec(command, {})
        assert capsys.readouterr().out.strip()


def test_the_first_command_of_the_readme_gives_the_answer_that_it_shows(capsys):
    commands, shown = blocks(README, "sh"), blocks(README, "text")
    arguments = shlex.split(commands[0].partition("python -m grinqh_jax.generate")[2])
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out.strip() == shown[0].strip()
    assert "#### 156" in shown[0]  # 48 + 36 + 2 * 36
