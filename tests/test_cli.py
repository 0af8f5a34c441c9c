"""The command dino-d2."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dino_d2_cli

QUICK = """
import sys
import dino_d2_cli
try:
    dino_d2_cli.main([{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {{"dino_d2", "torch", "detectron2", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", dino_d2_cli.COMMANDS)
def test_help_begins_with_an_example_and_imports_nothing_that_takes_long(command: str) -> None:
    script = [sys.executable, "-c", QUICK.format(command=command)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Examples:\n    dino-d2 {command}")


def test_help_of_evaluate_is_about_evaluation(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the program that trains, whose other options are refused."""
    texts = {}
    for command in ("train", "evaluate"):
        monkeypatch.setattr(sys, "argv", [])  # is set for the command
        with pytest.raises(SystemExit):
            dino_d2_cli.main([command, "--help"])
        texts[command] = capsys.readouterr().out
    for option in ("--epochs", "--minutes", "--batch-size", "--resume-from", "--train-json", "--eval-only"):
        assert option in texts["train"]
        assert option not in texts["evaluate"]
    for option in ("--data", "--weights", "--val-json", "--output", "--num-gpus", "--resume"):
        assert option in texts["evaluate"]
    examples, rest = texts["evaluate"].split("\n\n", 1)
    assert "dino-d2 evaluate --weights dino_r50_4scale_12ep" in examples
    assert "train a detector" not in rest.lower()
    assert "trains" not in rest.lower()


def test_overview_shows_all_commands_in_a_screen(capsys: pytest.CaptureFixture) -> None:
    assert dino_d2_cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert all(any(line.startswith(f"    {command} ") for line in lines) for command in dino_d2_cli.COMMANDS)


def test_unknown_command_is_named(capsys: pytest.CaptureFixture) -> None:
    assert dino_d2_cli.main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("dino-d2: fit is not a command; choose from train, evaluate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--config-file"),
        (["train", "--config-file", "nothing"], "nothing is neither a config file nor the name"),
        (["evaluate", "--config-file", "dino_r50_4scale_12ep", "SOLVER.NOTHING", "1"], "SOLVER.NOTHING in the overr"),
        (["predict", "--weights", "dino_r50", "--input", "nothing.jpg", "--output", "x"], "not found: nothing.jpg"),
        (
            ["predict", "--weights", "dino_r50", "--input", "README.md", "--output", "x"],
            "weights dino_",
        ),
        (["analyze", "--config-file", "dino_r50_4scale_12ep", "--size", "0", "1"], "--size 0 1"),
        (["analyze", "--config-file", "dino_r50_4scale_12ep", "MODEL.DINO.CLASS_NAMES", "['a']"], "has 1 names"),
        (["plot", "nowhere"], "nowhere: metrics.json not found"),
        (["zoo", "--download", "dino_r49"], "no weights are published under the name dino_r49"),
    ],
)
def test_errors_of_users_are_a_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [])  # is set for the command
    with pytest.raises(SystemExit) as end:
        dino_d2_cli.main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dino-d2 {arguments[0]}: ")
    assert message in line


def test_module_is_the_command_and_shows_no_trace() -> None:
    command = [sys.executable, "-m", "dino_d2", "train", "--config-file", "nothing"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("dino-d2 train: nothing is neither a config file")
    assert "Traceback" not in result.stderr
