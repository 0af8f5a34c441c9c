"""The command `dino-d2`, and code shared by the scripts in tools/. Imports only the standard library, so that `--help`
is fast: the package dino_d2, which imports torch and detectron2, is imported when needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# command: (script in tools/, arguments before the user's, description)
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": ("train_net", (), "train a detector, from a recipe or a folder of images"),
    "evaluate": ("train_net", ("--eval-only",), "measure AP of trained weights"),
    "predict": ("demo", (), "detect objects in images and draw them"),
    "check": ("check_dataset", (), "check a dataset before training"),
    "convert": ("convert_checkpoint", (), "convert weights from other DINO implementations, and back"),
    "export": ("export", (), "export a model to ONNX or torch.export"),
    "analyze": ("analyze", (), "count parameters and FLOPs"),
    "report": ("report", (), "make a page that shows where a detector fails, or which of two is better"),
    "robustness": ("robustness", (), "measure AP on corrupted images and at other sizes"),
    "plot": ("plot_run", (), "plot the curves of training runs"),
    "zoo": ("zoo", (), "list published weights"),
    "app": ("app", (), "start a local web page that detects objects in your images"),
    "doctor": ("doctor", (), "check the installation"),
    "install-detectron2": ("install_detectron2", (), "install detectron2, which is not on PyPI"),
}
USER_ERROR = 2  # exit code, as argparse's


class CommandParser(argparse.ArgumentParser):
    """A parser whose help starts with examples, and whose errors are one line.

    Args:
        examples: command lines without the name of the command.
        description: paragraphs.
    """

    def __init__(self, examples: Sequence[str], description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._examples = examples

    def format_help(self) -> str:
        examples = "".join(f"    {self.prog} {example}\n" for example in self._examples)
        return f"Examples:\n{examples}\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (--help explains)\n")


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors in user input (files, settings, weights) as a single message and exit with code 2."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """`dino-d2 COMMAND …` (None: the process's own arguments)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"dino-d2: {command} is not a command; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    script, first, _ = COMMANDS[command]
    sys.argv = [f"dino-d2 {command}", *rest]  # name in usage and errors
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # detectron2 imports deprecated parts
    return load_script(script)([*first, *rest])


def load_script(name: str) -> Callable[[Sequence[str] | None], int | None]:
    """`main` of tools/NAME.py, without importing the package that it is installed in."""
    path = shipped("tools") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"dino_d2_cli.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def shipped(name: str) -> Path:
    """The folder "configs" or "tools": inside the package if installed, beside it in a checkout."""
    (package,) = importlib.util.find_spec("dino_d2").submodule_search_locations
    return next(folder for folder in (Path(package, name), Path(package).parent / name) if folder.is_dir())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"    {name:<{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    return (
        "DINO object detection with detectron2.\n\n"
        "    dino-d2 predict --weights dino_r50_4scale_12ep --input street.jpg --output found\n"
        "    dino-d2 train --data my_photographs --weights dino_r50_4scale_12ep --epochs 24 --output output/mine\n\n"
        "Commands:\n" + "\n".join(lines) + "\n\nRun dino-d2 COMMAND --help for details."
    )


if __name__ == "__main__":
    sys.exit(main())
