"""The stages of ranking, each by itself."""

from __future__ import annotations

import random

from app.feed.ranking.candidates import Candidate, Shape, Source
from app.feed.ranking.rankers import FEATURES, LinearRanker, features_of
from app.feed.ranking.stages import first_pass, ranked, trust_of, varied, with_ads

HOUR = 3600.0


def photo(number: int, **known: object) -> Candidate:
    values: dict[str, object] = {"source": Source.FOLLOWING, "age": HOUR * number} | known
    return Candidate(number, **values)  # type: ignore[arg-type]


def test_the_first_pass_keeps_a_hundred_of_all_and_prefers_who_is_followed() -> None:
    many = [photo(n) for n in range(1, 501)]
    others = [photo(1000 + n, source=Source.EXPLORE, age=HOUR * n) for n in range(1, 61)]
    kept = first_pass([*others, *many])
    assert len(kept) == 100
    assert kept[0].id == 1
    assert 0 < sum(each.source is Source.EXPLORE for each in kept) < 50
    assert first_pass(list(reversed([*others, *many]))) == kept, "whatever came first"


def test_the_final_order_is_by_value_times_trust() -> None:
    liked, plain = photo(1, likes=50), photo(2, likes=0)
    assert ranked([plain, liked], LinearRanker()) == [liked, plain]
    spam = photo(1, likes=50, trust=0.3)
    assert ranked([spam, plain], LinearRanker()) == [plain, spam]
    fresh = LinearRanker({"freshness": 1.0})
    assert [c.id for c in ranked([photo(3), photo(1), photo(2)], fresh)] == [1, 2, 3]
    assert len(features_of(plain)) == len(FEATURES)


def test_what_looks_like_spam_is_trusted_less() -> None:
    old = 30 * 86_400.0
    assert trust_of("a quiet evening #lake", old) == 1.0
    assert trust_of("see www.example.org", old) == 0.7
    assert trust_of(" ".join(f"#t{n}" for n in range(9)), old) == 0.6
    assert trust_of("see https://example.org", 60.0) == 0.35
    assert trust_of("hello, I am new", 60.0) == 1.0


def test_authors_and_formats_are_mixed_and_nothing_is_lost() -> None:
    rng = random.Random(1)
    for _ in range(50):
        some = [
            photo(n, owner_id=rng.randrange(6), width=rng.choice([1, 2, 3]), height=2)
            for n in range(1, 40)
        ]
        found = varied(some)
        assert sorted(c.id for c in found) == sorted(c.id for c in some)
        for at in range(2, 30):
            three, left = found[at - 2 : at + 1], found[at:]
            if len({c.owner_id for c in left}) >= 3:
                assert len({c.owner_id for c in three}) == 3
    tall = [photo(n, owner_id=n, width=1, height=2) for n in range(1, 6)]
    wide = photo(9, owner_id=9, width=2, height=1)
    assert [c.shape for c in varied([*tall, wide])][3] is Shape.WIDE
    one_author = [photo(n, owner_id=1) for n in range(3)]
    assert varied(one_author) == one_author


def test_ads_have_their_places() -> None:
    photos = [photo(n) for n in range(1, 21)]
    ads = [photo(n, source=Source.AD) for n in (5, 101, 102, 103, 104)]
    found = with_ads(photos, ads)
    places = [n for n, each in enumerate(found) if each.source is Source.AD]
    assert places == [3, 12, 21]
    assert [each.id for each in found if each.source is Source.AD] == [101, 102, 103]
    assert with_ads([], ads) == []
    assert with_ads(photos[:3], ads) == photos[:3]
