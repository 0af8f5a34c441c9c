"""What the documents say exists: links, commands and their options, recipes, weights, config keys, names in Python."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import dino_d2_cli
from dino_d2 import load_config, model_zoo
from dino_d2.config import find_config_file, flat, recipe_files

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
RECIPE = "dino_r50_4scale_12ep"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
KEY = re.compile(r"\b(?:DATALOADER|DATASETS|INPUT|MODEL|SOLVER|TEST)(?:\.[A-Z][A-Z0-9_]*)+")
NAME = re.compile(r"(?:\w+/)*dino_(?:convnext|mobilenet|r\d|swin|vitdet)\w*")
PATH = re.compile(r"(?<![\w./-])(?:configs|dev|dino_d2|docs|examples|ops|tests|tools)/[\w./-]*\w")
REFERENCE = re.compile(r"^::: ([\w.]+)\n(?:    options:\n      members: \[(.*)\]\n)?", re.M)
SCRIPT = re.compile(r"(?:dev|tools|tests)/\w+\.(?:py|sh)")


class _ParserMade(Exception):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@cache
def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@cache
def _parser(path: Path) -> argparse.ArgumentParser:
    """The parser that `main` of a script makes."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _ParserMade(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(sys, "argv", [path.name])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop)
        try:
            _module(path).main()
        except _ParserMade as made:
            return made.parser
    raise AssertionError(f"{path} parses no arguments")


def _parse(path: Path, arguments: Sequence[str]) -> argparse.Namespace:
    """
    Raises:
        ValueError: it does not take these arguments.
    """
    parser, said = _parser(path), io.StringIO()
    parse = getattr(_module(path), "parse", parser.parse_args)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(arguments)
    except SystemExit as end:
        if end.code:
            raise ValueError(said.getvalue().strip()) from end
        return argparse.Namespace()  # --help


@cache
def _anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def _keys() -> set[str]:
    keys = flat(load_config(RECIPE))
    return {".".join(key.split(".")[:count]) for key in keys for count in range(1, key.count(".") + 2)}


def commands(script: str) -> Iterator[list[str]]:
    """The commands of a shell script that are ours, with its variables put in."""
    variables: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] in ("torchrun", "srun"):
            words = words[next(place for place, word in enumerate(words) if SCRIPT.fullmatch(word)) :]
        if words and is_ours(words):
            yield from _alternatives(words)


def is_ours(words: Sequence[str]) -> bool:
    return words[0] in ("dino-d2", "make") or bool(SCRIPT.fullmatch(words[0])) or words[:2] == ["python", "-m"]


def _alternatives(words: Sequence[str]) -> Iterator[list[str]]:
    """{a,b} is each of them; [optional] is there; … is a value after an option, else nothing."""
    ways = [word[1:-1].split(",") if re.fullmatch(r"{.*}", word) else [word.strip("[]")] for word in words]
    for chosen in itertools.product(*ways):
        shown = list(chosen)
        for place, word in enumerate(shown):
            if word == "…" and shown[place - 1].startswith("--"):
                shown[place] = "CONFIG"
        yield [word for word in shown if word not in ("…", "...")]


def faults_of_command(words: Sequence[str], whole: bool = True) -> Iterator[str]:
    """
    Args:
        whole: it can be run as it stands; otherwise it is a mention, whose options are looked up.
    """
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        yield from (f"make has no target {word}" for word in words[1:] if "=" not in word and word not in targets)
        return
    if words[:2] == ["python", "-m"]:
        if importlib.util.find_spec(words[2]) is None:
            yield f"there is no module {words[2]}"
        return
    first: tuple[str, ...] = ()
    if words[0] == "dino-d2":
        if len(words) == 1 or words[1].isupper():
            return
        if words[1] not in dino_d2_cli.COMMANDS:
            yield f"dino-d2 has no command {words[1]}"
            return
        script, first, _ = dino_d2_cli.COMMANDS[words[1]]
        path, rest = ROOT / "tools" / f"{script}.py", words[2:]
    else:
        path, rest = ROOT / words[0], words[1:]
    if path.stem.isupper():
        return
    if not path.is_file():
        yield f"there is no {path.relative_to(ROOT)}"
    elif path.suffix == ".py" and path.parent.name != "tests":
        yield from _faults_of_arguments(path, [*first, *rest], whole)


def _faults_of_arguments(path: Path, arguments: Sequence[str], whole: bool) -> Iterator[str]:
    if not whole:
        known = re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", _parser(path).format_help())
        options = [word for word in arguments if re.match(r"--?[a-zA-Z]", word)]
        yield from (f"{path.name} has no option {option}" for option in options if option not in known)
        return
    try:
        args = _parse(path, arguments)
    except ValueError as error:
        yield str(error)
        return
    config = getattr(args, "config_file", None)
    if config and not config.isupper() and not config.startswith("output/"):
        try:
            find_config_file(config)
        except FileNotFoundError as error:
            yield str(error)
    weights = getattr(args, "weights", None) or getattr(args, "download", None)
    if weights and not weights.isupper() and not re.search(r"[./]", weights) and weights not in model_zoo.entries():
        yield f"{weights} is not in the zoo"
    values = [word for word in getattr(args, "opts", []) if word not in ("KEY", "VALUE")]
    try:
        load_config(RECIPE, values)
    except (ValueError, KeyError, AssertionError) as error:
        yield f"{' '.join(values)}: {error}"


def faults_of_python(code: str) -> Iterator[str]:
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        yield f"{error.text}: {error.msg}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dino_d2"):
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names if alias.name.startswith("dino_d2")]
        else:
            continue
        for module, name in names:
            try:
                found = importlib.import_module(module)
            except ImportError as error:
                yield str(error)
                continue
            if name and not hasattr(found, name) and not importlib.util.find_spec(f"{module}.{name}"):
                yield f"{module} has no {name}"


def faults_of_span(text: str) -> Iterator[str]:
    """Of what stands between backquotes in a sentence."""
    text = " ".join(text.split())
    yield from (f"there is no config key {key}" for key in KEY.findall(text) if key not in _keys())
    if not re.search(r"\.\w+$", text):
        known = {*recipe_files(), *model_zoo.entries()}
        names = [name for name in NAME.findall(text) if not name.startswith(("configs/", "output/"))]
        yield from (f"{name} is neither a recipe nor in the zoo" for name in names if name not in known)
    paths = [path for path in PATH.findall(text) if not Path(path).stem.isupper() and not text.startswith("output")]
    yield from (f"there is no {path}" for path in paths if not list(ROOT.glob(f"{path}*")))
    words = text.split()
    if is_ours(words):
        for alternative in _alternatives(words):
            yield from faults_of_command(alternative, whole=False)


def faults_of_links(text: str, path: Path) -> Iterator[str]:
    for groups in LINK.findall(text):
        target, _, anchor = next(filter(None, groups)).partition("#")
        if "://" in target:
            continue
        leads_to = (path.parent / target).resolve() if target else path
        if not leads_to.exists():
            yield f"there is no {target}"
        elif anchor and anchor not in _anchors(leads_to):
            yield f"{target} has no heading {anchor}"


def faults_of_references(text: str) -> Iterator[str]:
    """Of what MkDocs puts in from docstrings."""
    for name, members in REFERENCE.findall(text):
        module, _, last = re.sub(r"^ops\b", "dino_d2.ops", name).rpartition(".")
        try:
            found = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError) as error:
            yield f"::: {name}: {error}"
            continue
        yield from (
            f"{name} has no {member}" for member in filter(None, members.split(", ")) if not hasattr(found, member)
        )


def faults(text: str, path: Path) -> Iterator[str]:
    """
    Args:
        text: a document in Markdown.
        path: which its links are relative to.
    """
    for language, block in FENCE.findall(text):
        if language == "bash":
            for words in commands(block):
                yield from (f"{shlex.join(words)}: {fault}" for fault in faults_of_command(words))
        elif language == "python":
            yield from faults_of_python(block)
    sentences = FENCE.sub("", text)
    yield from faults_of_links(sentences, path)
    yield from faults_of_references(sentences)
    for span in SPAN.findall(sentences):
        yield from faults_of_span(span)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_documents_name_exists(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert list(faults(path.read_text(), path)) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[page](docs/nothing.md)", "there is no docs/nothing.md"),
        ("[page](docs/op.md#nothing)", "docs/op.md has no heading nothing"),
        ('<img src="docs/images/nothing.jpg">', "there is no docs/images/nothing.jpg"),
        ("```bash\ndino-d2 fit\n```", "no command fit"),
        ("```bash\ndino-d2 predict --weights x.pth --picture a.jpg\n```", "the following arguments are required"),
        ("```bash\ndino-d2 train --weights dino_r49\n```", "dino_r49 is not in the zoo"),
        ("```bash\ndino-d2 train --config-file dino_r49\n```", "dino_r49 is neither a config file nor"),
        ("```bash\ndino-d2 train \\\n    --config-file CONFIG SOLVER.NOTHING 1\n```", "SOLVER.NOTHING"),
        ("```bash\ndino-d2 train --config-file CONFIG SOLVER.MAX_ITER many\n```", "Type mismatch"),
        ("```bash\nFORCE_CUDA=0 torchrun --nproc-per-node 2 tools/train_net.py --nothing\n```", "--nothing"),
        ("```bash\ndino-d2 convert --source {auto,nobody} IN OUT --config-file CONFIG\n```", "nobody"),
        ("```bash\nb='dev/benchmark.py --config-file CONFIG'\n$b --fast\n```", "--fast"),
        ("```bash\ndev/nothing.py\n```", "there is no dev/nothing.py"),
        ("```bash\nmake nothing\n```", "make has no target nothing"),
        ("```bash\npython -m dino_d2.nothing\n```", "there is no module dino_d2.nothing"),
        ("```python\nfrom dino_d2 import Nothing\n```", "dino_d2 has no Nothing"),
        ("```python\nimport dino_d2.nothing\n```", "No module named 'dino_d2.nothing'"),
        ("```python\nx = = 1\n```", "invalid syntax"),
        ("Set `MODEL.DINO.NOTHING: 1`.", "there is no config key MODEL.DINO.NOTHING"),
        ("Take `dino_r50_9scale`.", "dino_r50_9scale is neither"),
        ("See `dino_d2/nothing.py`.", "there is no dino_d2/nothing.py"),
        ("Say `dino-d2 predict --nothing`.", "demo.py has no option --nothing"),
        ("Say `make nothing`.", "make has no target nothing"),
        ("::: dino_d2.detector.Nothing\n", "has no attribute 'Nothing'"),
        ("::: dino_d2.model_zoo\n    options:\n      members: [get, nothing]\n", "dino_d2.model_zoo has no nothing"),
    ],
)
def test_faults_are_found(text: str, fault: str) -> None:
    assert any(fault in found for found in faults(text, ROOT / "README.md")), list(faults(text, ROOT / "README.md"))


def test_index_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"]({path.name})" not in index] == ["README.md"]


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs MkDocs: pip install 'dino-d2[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "from_pretrained" in (tmp_path / "api" / "index.html").read_text()


def test_weights_in_the_readme_are_as_published() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| ([\d.]+) \| (\w+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 5
    for name, backbone, ap, publisher in rows:
        entry = model_zoo.find(name)
        assert (entry.backbone, f"{entry.ap:.1f}", entry.publisher) == (backbone, ap, publisher)


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{citation["version"]}"\n' in project
    assert f'\nlicense = {{ text = "{citation["license"]}" }}\n' in project
