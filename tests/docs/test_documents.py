"""The documents: their examples run, their links lead somewhere, their reference is complete.

Comments in a document steer its examples, on lines of their own above a block:

    <!-- setup: CODE -->         runs first: what a reader has already
    <!-- not run: REASON -->     leaves the block out
    <!-- other output: REASON -->  the text below the block is not its output here
    <!-- slow -->                the page runs with the slow tests
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mesa_train
from mesa_train.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = [
    ROOT / "README.md",
    DOCS / "index.md",
    DOCS / "getting-started.md",
    *sorted((DOCS / "guides").glob("*.md")),
]
BLOCK = re.compile(
    r"(?P<comments>(?:^<!--[^\n]*-->\n)*)^```python\n(?P<code>.*?)^```\n"
    r"(?P<output>\n```text\n(?P<text>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!-- (setup|not run|other output|slow)(?:: (.*?))? -->")
MOST_NOT_RUN = 3


def sources(*endings: str) -> list[Path]:
    """The repository's files with these endings, without what a run or a build leaves."""
    folders = ("docs", "mesa_train", "recipes", "scripts", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(p for p in [*ROOT.iterdir(), *files] if p.suffix in endings and p.is_file())


def blocks(path: Path) -> list[tuple[dict[str, str], str, str | None]]:
    """(comments, code, the output that is shown) of each Python block of a document."""
    text = path.read_text(encoding="utf-8")
    matches = list(BLOCK.finditer(text))
    assert len(matches) == text.count("\n```python\n"), f"{path.name}: a block of another form"
    return [(dict(COMMENT.findall(b["comments"])), b["code"], b["text"]) for b in matches]


def pages() -> list[object]:
    parameters = []
    for path in EXAMPLES:
        comments = [options for options, _, _ in blocks(path)]
        if comments:
            slow = any("slow" in options for options in comments)
            marks = [pytest.mark.slow] if slow else []
            parameters.append(pytest.param(path, id=path.stem, marks=marks))
    return parameters


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", pages())
def test_the_examples_run_and_print_what_is_shown(path, tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the planner's timings
    monkeypatch.setattr(timm, "create_model", timm.create_model)  # a setup may replace it
    names: dict[str, object] = {"__name__": "example"}
    for setup, code, expected in blocks(path):
        if "not run" in setup:
            continue
        exec(compile(setup.get("setup", ""), f"{path.name}, setup", "exec"), names)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{path.name}: {code.splitlines()[0]}", "exec"), names)
        if expected is not None and "other output" not in setup:
            assert printed.getvalue() == expected


def test_few_examples_do_not_run_and_say_why():
    left_out = [
        (path.name, setup["not run"])
        for path in EXAMPLES
        for setup, _, _ in blocks(path)
        if "not run" in setup
    ]
    assert len(left_out) <= MOST_NOT_RUN, left_out
    assert all(len(reason.split()) >= 3 for _, reason in left_out), left_out


# --- links ---

LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def prose(path: Path) -> str:
    """A document without its blocks of code and code spans."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", lambda span: re.sub(r"[\[\]()]", "", span[0]), text)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings that are the same on GitHub and on the site."""
    names = set()
    for heading in HEADING.findall(prose(path)):
        plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        github, site = plain.replace(" ", "-"), re.sub(r"[- ]+", "-", plain)
        if github == site:
            names.add(site)
    return names


@pytest.mark.parametrize("path", sources(".md"), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    wrong = []
    for match in LINK.finditer(prose(path)):
        target, _, anchor = match["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = path if not target else (path.parent / target).resolve()
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            wrong.append(match["target"])
    assert not wrong, f"{path.relative_to(ROOT)}: {', '.join(wrong)}"


def walk(heading: str) -> list[tuple[Path, list[str]]]:
    """The stops of a walk in concepts.md: the file, and the names that the file must have."""
    section = (DOCS / "concepts.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    stops = []
    for line in section.partition("\n## ")[0].splitlines():
        link = re.match(r"\| \d \| \[[^]]+\]\(([^)]+)\) \| (.*) \|$", line)
        if link is not None:
            spans = [span.partition("(")[0] for span in re.findall(r"`([^`]+)`", link[2])]
            names = [span.rpartition(".")[2] for span in spans if span[0].isupper() or "." in span]
            stops.append(((DOCS / link[1]).resolve(), names))
    return stops


@pytest.mark.parametrize("heading", ["The walk of one tensor", "The walk of one model"])
def test_the_files_of_a_walk_have_the_names_that_concepts_gives(heading):
    stops = walk(heading)
    assert len(stops) == 5
    assert sum(len(names) for _, names in stops) >= 3
    for path, names in stops:
        text = path.read_text(encoding="utf-8")
        missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
        assert not missing, f"{path.name} has no {', '.join(missing)}"


def test_documents_that_the_code_names_are_there():
    missing = []
    for path in sources(".py", ".sh", ".toml", ".yaml", ".yml"):
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
            if not (ROOT / name).is_file():
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing, missing


def test_the_readme_is_short_and_has_the_commands_of_a_fresh_machine():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh", "--quick"):
        assert command in text


@pytest.mark.parametrize(
    "recipe", ["decoders", "distill", "evaluate", "lit", "litv2", "mocov3", "video", "vit22b"]
)
def test_a_recipe_is_one_page(recipe):
    text = (ROOT / "recipes" / recipe / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100


# --- reference ---


def reference(page: str) -> str:
    return (DOCS / "reference" / page).read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"\bmesa_train\.(\w+)", reference("api.md")))
    assert set(mesa_train.__all__) - listed == set()


def generator():
    path = DOCS / "_mkdocs/cli.py"
    spec = importlib.util.spec_from_file_location("documented_cli", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_renewed():
    assert reference("cli.md") == generator().markdown(), "run python docs/_mkdocs/cli.py"


@pytest.mark.parametrize("command", ["compare", "profile", "plan", "estimate"])
def test_every_option_is_in_the_reference(command):
    """By the command's own help, which the page's generator does not read."""
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert help_text.exit_code == 0
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", help_text.stdout)) - {"--help"}
    assert len(options) > 8
    section = reference("cli.md").partition(f"## mesa-train {command}\n")[2].partition("\n## ")[0]
    missing = {option for option in options if f"`{option}`" not in section}
    assert not missing


def test_every_command_is_in_the_reference():
    listed = re.findall(r"^## mesa-train (\w+)$", reference("cli.md"), re.MULTILINE)
    assert set(generator().commands()) == set(listed)


def test_every_environment_variable_is_in_the_reference():
    used = set()
    for path in sources(".py", ".sh"):
        used |= set(re.findall(r"\bMESA_TRAIN_[A-Z]+(?:_[A-Z]+)*\b", path.read_text("utf-8")))
    assert len(used) > 4
    listed = set(re.findall(r"`(MESA_TRAIN_[A-Z_]+)`", reference("environment.md")))
    assert used == listed


def test_every_error_is_in_the_reference():
    errors = set()
    for path in (ROOT / "mesa_train").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        errors |= set(re.findall(r"^class ([A-Z]\w*)\((?:\w*Error|Exception)\):", text, re.M))
    assert "OverBudget" in errors
    missing = {name for name in errors if name not in reference("errors.md")}
    assert not missing
