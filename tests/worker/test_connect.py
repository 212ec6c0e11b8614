"""What a URL of Sentinels says; tests/deploy/test_sentinel.py has real ones."""

import pytest
from redis.exceptions import ConnectionError

from worker.connect import Sentinels, connect


def test_a_url_of_sentinels_says_where_they_are_and_what_they_call_the_primary() -> None:
    assert Sentinels.parse("redis+sentinel://10.0.0.1:26380,redis-2,[::1]:7/mymaster/3") == Sentinels(
        (("10.0.0.1", 26380), ("redis-2", 26379), ("::1", 7)), "mymaster", 3
    )
    assert Sentinels.parse("redis+sentinel://a/mymaster") == Sentinels((("a", 26379),), "mymaster")


def test_a_password_is_unquoted_and_shown_to_nobody() -> None:
    said = Sentinels.parse("redis+sentinel://dit:p%40ss%2F@a,b/mymaster")
    assert (said.username, said.password, said.addresses) == ("dit", "p@ss/", (("a", 26379), ("b", 26379)))
    assert "p@ss" not in repr(said)


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("redis+sentinel://:secret@a:26379", "goes on with the primary's name"),
        ("redis+sentinel://:secret@a/mymaster/first", "got '/mymaster/first'"),
        ("redis+sentinel://:secret@a/mymaster?db=1", r"got '/mymaster\?db=1'"),
        ("redis+sentinel://:secret@a:many/mymaster", "'a:many' is no address of a Sentinel"),
        ("redis+sentinel://:secret@a,,b/mymaster", "'' is no address of a Sentinel"),
        ("sentinel://:secret@a/mymaster", "Redis URL must specify"),
    ],
)
def test_what_is_no_such_url_is_refused_without_telling_its_password(url: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong) as refused:
        connect(url)
    assert "secret" not in str(refused.value)


def test_sentinels_that_do_not_answer_are_told_in_one_line() -> None:
    with connect("redis+sentinel://:secret@127.0.0.1:1,127.0.0.1:2/mymaster") as client, pytest.raises(ConnectionError) as away:
        client.ping()
    assert str(away.value).startswith("the Sentinels 127.0.0.1:1, 127.0.0.1:2 know of no primary 'mymaster' that is up")
    assert "secret" not in str(away.value)
