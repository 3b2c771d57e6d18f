from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.accounts.usernames import canonical
from app.demo import plan
from app.demo.scenes import SCENES, svg_of
from app.settings import Settings


def test_arguments_win_over_the_environment() -> None:
    settings = Settings.read({"APP_PORT": "9000", "APP_HOST": "::1", "PORT": "1"}, port=None)
    assert (settings.port, settings.host) == (9000, "::1")
    assert Settings.read({"APP_PORT": "9000"}, port=7).port == 7


def test_pictures_live_beside_the_configuration() -> None:
    assert Settings(config=Path("x/shardkit.toml")).media_folder == Path("x/media")


@pytest.mark.parametrize(
    "wrong",
    [
        {"APP_PORT": "x"},
        {"APP_PORT": "70000"},
        {"APP_BODY_TIMEOUT": "0"},
        {"APP_DATABASE_TIMEOUT": "inf"},
    ],
)
def test_wrong_values_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings.read(wrong)


def test_the_demo_is_the_same_every_time_and_whole() -> None:
    wanted = plan.make(220, 7)
    assert wanted == plan.make(220, 7)
    assert wanted != plan.make(220, 8)
    names = [person.username for person in wanted.people]
    assert len(set(names)) == len(names) == 220
    assert {photo.owner for photo in wanted.photos} == set(range(220))
    assert len({photo.name for photo in wanted.photos}) == len(wanted.photos)
    assert all(a.age > b.age for a, b in zip(wanted.photos, wanted.photos[1:], strict=False))
    for person, followees in wanted.follows.items():
        assert person not in followees
        assert len(set(followees)) == len(followees) > 0
    assert any(wanted.likes.values())
    assert any(wanted.comments.values())


def test_names_of_the_demo_are_names_people_can_have() -> None:
    for person in plan.make(1000, 1).people:
        assert person.username == canonical(person.username)


@pytest.mark.parametrize("seed", range(len(SCENES)))
def test_drawings_repeat(seed: int) -> None:
    assert svg_of(seed) == svg_of(seed)
    assert svg_of(seed) != svg_of(seed + len(SCENES))
