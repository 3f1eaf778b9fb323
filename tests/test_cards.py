"""Cards are read without torch, and searched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.errors import UserError
from penstock.lab import cards


def test_every_card_is_whole() -> None:
    for card in cards.all_cards().values():
        assert card.claims, card.name
        assert card.wing in cards.WINGS
        assert len({claim.id for claim in card.claims}) == len(card.claims)
        for text in (card.idea, card.twin, card.advice, card.evidence, card.gate.what, card.gate.granularity):
            assert text.strip(), card.name


@pytest.mark.parametrize("command", [["list"], ["show", "gated_attention"], ["search", "attention sink"]])
def test_reading_commands_import_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from penstock.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules, 'torch was imported'; raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_search_finds_by_meaning_of_words() -> None:
    assert next(iter(cards.search("attention sinks in language models")))[0].name == "gated_attention"
    assert cards.search("zzzz") == []


def test_unknown_system_names_the_nearest() -> None:
    with pytest.raises(UserError, match="gated_attention"):
        cards.card("gated_atention")


def test_a_broken_card_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "wing" / "name" / "card.toml"
    path.parent.mkdir(parents=True)
    path.write_text('title = "x"\n')
    with pytest.raises(ValueError, match=r"card\.toml"):
        cards.read_card(path)
