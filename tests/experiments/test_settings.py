"""`kanlm settings`: everything is there, and says what it means."""

import json
import re
from pathlib import Path

import pytest

from kanlm.config.documentation import REQUIRED
from kanlm.data.sources import SOURCES
from kanlm.errors import UserError
from kanlm.experiments.settings import _sections, settings_text
from kanlm.kan import BASES
from kanlm.model.feed_forward import FEED_FORWARDS

PAGE = Path(__file__).parents[2] / "configs" / "settings.md"


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text() == settings_text(), "run `kanlm settings > configs/settings.md`"


def test_every_setting_says_what_it_means():
    silent = [
        f"{section.name}: {name}"
        for section in _sections()
        for name, setting in section.settings.items()
        if not setting.meaning
    ]
    assert silent == []


def test_every_type_and_default_is_in_the_words_of_yaml():
    limit = r"( [≥>] [^ ,]+)?(,? ?[≤<] [^ ,]+)?"
    one = rf"(`[^`]*`|null|text|mapping|(whole )?number{limit})"
    kind = re.compile(rf"(list of )?{one}|\[{one}(, {one})*\]")
    for section in _sections():
        for name, setting in section.settings.items():
            for alternative in setting.type.split(" or "):
                assert kind.fullmatch(alternative), (section.name, name, setting.type)
            if setting.default is not REQUIRED:
                json.dumps(setting.default)


def test_every_kind_basis_and_source_has_a_meaning_and_its_options():
    assert [section.name for section in _sections() if not section.meaning] == []
    text = settings_text()
    assert all(f"### `{name}`" in text for name in (*FEED_FORWARDS, *BASES, *SOURCES))
    assert "- `grid_size` (whole number; default `6`)" in settings_text("bspline")
    assert "- `optimizer.learning_rate`" in settings_text("optimizer")


def test_one_setting_is_found_by_its_dotted_and_its_bare_name():
    assert settings_text("optimizer.betas") == settings_text("betas")
    # Several sections have it.
    assert settings_text("kind").count("\n- ") == 3


def test_a_wrong_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'optimizer\.betas'"):
        settings_text("optimizer.beta")
    with pytest.raises(UserError, match="expected one of: top, data,"):
        settings_text("qqqq")
