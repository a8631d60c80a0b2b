"""What the documentation says of the code is true of the code."""

from __future__ import annotations

import re
from pathlib import Path

from meshd.cli.main import COMMANDS, commands
from meshd.config import known_keys
from meshd.runtime.child_events import state_diagram

ROOT = Path(__file__).parent.parent


def test_the_diagram_is_the_table() -> None:
    assert f"```mermaid\n{state_diagram()}```" in (ROOT / "docs" / "supervision.md").read_text()


def test_every_key_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        section = ""
        for key in re.findall(r"`([\w.]+)`", row):
            section = key.rpartition(".")[0] or section
            named.add(key if "." in key or not section else f"{section}.{key}")
    assert named == set(known_keys())


def test_links_between_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} -> {target}"


def test_every_command_can_be_imported_and_explains_itself() -> None:
    import click

    context = click.Context(commands)
    for name in COMMANDS:
        command = commands.get_command(context, name)
        assert command is not None
        assert command.help, name


def test_commands_of_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL))
    used = set(re.findall(r"^meshd (\w+)", blocks, flags=re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)
    targets = set(re.findall(r"^make (\w+)", blocks, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
