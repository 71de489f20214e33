"""Pages have the holders that they should, are found by their tokens, and never get lost."""

import random

import pytest

from dsjax.inference.pages import ROOT, Known, PagePool

SIZE = 2


class Shelf:
    """A tier that keeps what it is given."""

    def __init__(self):
        self.kept = {}

    def save(self, known, page, *, wait):
        self.kept.setdefault(known, page)

    def flush(self):
        pass

    def has(self, known):
        return known in self.kept

    def load(self, known, page):
        return known in self.kept


def pool(pages=6, most_idle=100, tier=None):
    return PagePool(pages, SIZE, most_idle=most_idle, tier=tier)


def fill(pages, tokens):
    """Take and register pages for tokens, as a request does; return the pages."""
    held, digests = pages.match(tokens)
    for start in range(len(held) * SIZE, len(tokens) // SIZE * SIZE, SIZE):
        page = pages.take()
        held.append(page)
        digests.append(pages.register(page, digests[-1], tokens[start : start + SIZE]))
    return held


def test_pages_are_found_by_all_tokens_up_to_theirs():
    pages = pool()
    held = fill(pages, [1, 2, 3, 4])
    assert pages.match([1, 2, 3, 4, 5])[0] == held
    assert pages.match([1, 2, 3, 4])[0] == held[:1]  # one token is left to be read
    assert pages.match([1, 2, 9, 4, 5])[0] == held[:1]
    assert pages.match([9, 2, 3, 4, 5])[0] == pages.match([3, 4, 5])[0] == []


def test_the_page_unused_for_longest_goes_first_and_ends_before_beginnings():
    pages = pool(pages=6)  # five are usable
    old, new = fill(pages, [1, 2, 3, 4]), fill(pages, [5, 6, 7, 8])
    pages.release(old)
    pages.release(new)
    assert (pages.held, pages.idle, pages.available) == (0, 4, 5)
    assert pages.take() not in old + new
    assert [pages.take() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert pages.take() is None
    assert pages.match([1, 2, 3])[0] == []


def test_use_makes_young():
    pages = pool(pages=4)
    first, second = fill(pages, [1, 2]), fill(pages, [3, 4])
    pages.release(first)
    pages.release(second)
    pages.release(pages.match([1, 2, 0])[0])
    pages.take()
    assert pages.take() == second[0]


def test_a_page_of_two_is_kept_for_the_second():
    pages = pool(pages=3)
    held = fill(pages, [1, 2])
    assert pages.match([1, 2, 3])[0] == held
    pages.release(held)
    assert pages.take() not in held
    assert pages.take() is None
    pages.release(held)
    assert pages.take() == held[0]
    with pytest.raises(AssertionError):
        pages.release([2, 2, 2])


def test_a_budget_for_what_nobody_holds():
    pages = pool(pages=8, most_idle=2)
    held = fill(pages, [1, 2, 3, 4, 5, 6])
    pages.release(held)
    assert (pages.idle, pages.available) == (2, 7)
    assert pages.match([1, 2, 3, 4, 5, 6, 7])[0] == held[:2]
    none = pool(most_idle=0)
    none.release(fill(none, [1, 2, 3, 4]))
    assert none.match([1, 2, 3])[0] == []
    assert none.idle == 0


def test_two_texts_of_one_digest_are_not_taken_for_each_other(monkeypatch):
    real = Known.of
    monkeypatch.setattr(Known, "of", lambda parent, tokens: real(parent, tokens)._replace(digest=b"same"))
    pages = pool()
    fill(pages, [1, 2])
    assert pages.match([3, 4, 5])[0] == []
    assert len(pages.match([1, 2, 5])[0]) == 1


def test_what_there_is_no_room_for_goes_to_the_tier_and_comes_back():
    shelf = Shelf()
    pages = pool(pages=3, tier=shelf)
    pages.release(fill(pages, [1, 2, 3, 4]))
    assert list(shelf.kept.values()) == [1, 2]  # as soon as they are full
    shelf.kept.popitem()  # as when there was too much to do
    taken = [pages.take(), pages.take()]
    assert len(shelf.kept) == 2
    pages.release(taken)
    assert len(pages.match([1, 2, 3, 4, 5])[0]) == 2
    assert pages.counts.found_in_tier == 4
    assert pages.held == 2


def test_a_second_reader_of_the_same_keeps_its_own_page():
    pages = pool()
    one, two = pages.take(), pages.take()
    assert pages.register(one, ROOT, [1, 2]) == pages.register(two, ROOT, [1, 2])
    pages.release([two])
    assert pages.idle == 0
    assert pages.match([1, 2, 3])[0] == [one]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_held_twice(seed):
    """Random requests come and go; in the end every page is free or idle, and none is both."""
    draw = random.Random(seed)
    pages, requests = pool(pages=12, most_idle=draw.choice([0, 3, 100])), []
    for _ in range(300):
        if requests and draw.random() < 0.5:
            pages.release(requests.pop(draw.randrange(len(requests))))
            continue
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 9))]
        if pages.available >= len(tokens) // SIZE:
            requests.append(fill(pages, tokens))
        assert pages.held == len({page for request in requests for page in request})
        assert 0 not in {page for request in requests for page in request}
    for request in requests:
        pages.release(request)
    assert (pages.held, pages.available) == (0, 11)
    assert sorted(pages.take() for _ in range(11)) == list(range(1, 12))
