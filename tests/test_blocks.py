"""The block pool: a model of what it must do, driven at random, and its rules one by one."""

from __future__ import annotations

import random

import pytest

from gulliver.runtime.batching.cache import START, BlockPool, next_key


def test_blocks_are_dealt_out_once_and_come_back() -> None:
    pool = BlockPool(3, 3)
    taken = [pool.take() for _ in range(3)]
    assert sorted(block for block in taken if block is not None) == [0, 1, 2]
    assert pool.take() is None and pool.free == 0 and pool.used == 3
    pool.release([1])
    assert pool.take() == 1


def test_a_published_block_is_shared_and_survives_its_users() -> None:
    pool = BlockPool(2, 2)
    block = pool.take()
    assert block is not None
    key = next_key(START, range(16))
    assert pool.adopt(key) is None
    pool.publish(block, key)
    assert pool.adopt(key) == block
    pool.release([block])
    pool.release([block])
    assert pool.free == 2
    assert pool.adopt(key) == block
    pool.release([block])


def test_of_two_blocks_with_the_same_tokens_the_first_is_found() -> None:
    pool = BlockPool(3, 3)
    first, second = pool.take(), pool.take()
    assert first is not None and second is not None
    key = next_key(START, [1])
    pool.publish(first, key)
    pool.publish(second, key)
    assert pool.adopt(key) == first
    pool.release([first, second])
    pool.release([first])
    assert {pool.take(), pool.take(), pool.take()} == {0, 1, 2}
    assert pool.adopt(key) is None


def test_the_block_unused_for_longest_goes_first_and_the_end_of_a_sequence_before_its_beginning() -> None:
    pool = BlockPool(4, 4)
    keys = [next_key(START, [number]) for number in range(4)]
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for block, key in zip(first + second, keys, strict=True):
        pool.publish(block, key)  # type: ignore[arg-type]
    pool.release(first)  # type: ignore[arg-type]
    pool.release(second)  # type: ignore[arg-type]
    assert [pool.take() for _ in range(4)] == [first[1], first[0], second[1], second[0]]
    assert all(pool.adopt(key) is None for key in keys)


def test_the_key_stands_for_everything_before() -> None:
    one, other = next_key(START, [1, 2]), next_key(START, [1, 3])
    assert next_key(one, [5, 6]) != next_key(other, [5, 6])
    assert next_key(one, [5, 6]) == next_key(next_key(START, [1, 2]), [5, 6])
    assert next_key(START, [1, 2, 3]) != next_key(one, [3])


def test_forgotten_blocks_are_not_found_but_stay_with_their_users() -> None:
    pool = BlockPool(2, 2)
    used, unused = pool.take(), pool.take()
    assert used is not None and unused is not None
    pool.publish(used, next_key(START, [1]))
    pool.publish(unused, next_key(START, [2]))
    pool.release([unused])
    pool.forget()
    assert pool.adopt(next_key(START, [1])) is None and pool.adopt(next_key(START, [2])) is None
    assert pool.free == 1
    pool.release([used])
    assert {pool.take(), pool.take()} == {0, 1}


def test_no_more_are_kept_than_said_and_written_blocks_come_before_fresh_ones() -> None:
    pool = BlockPool(10, 2)
    blocks = [pool.take() for _ in range(4)]
    assert blocks == [0, 1, 2, 3]
    for block in blocks:
        pool.publish(block, next_key(START, [block]))  # type: ignore[arg-type, list-item]
    pool.release(blocks)  # type: ignore[arg-type]
    assert [pool.adopt(next_key(START, [block])) for block in range(4)] == [0, 1, None, None]
    assert {pool.take(), pool.take()} == {2, 3}
    assert pool.take() == 4


def test_once_as_many_were_written_as_may_be_kept_these_make_room_before_a_fresh_one_is_written() -> None:
    pool = BlockPool(10, 3)
    for start in (0, 3):  # what is kept first fills memory, then makes room
        blocks = [pool.take() for _ in range(3)]
        assert set(blocks) == {0, 1, 2}
        for block in blocks:
            pool.publish(block, next_key(START, [start + block]))  # type: ignore[operator]
        pool.release(blocks)  # type: ignore[arg-type]
    assert {pool.take() for _ in range(3)} == {0, 1, 2}
    assert [pool.take(), pool.take()] == [3, 4]
    assert pool.free == 5


def test_a_block_released_twice_is_a_bug() -> None:
    pool = BlockPool(1, 1)
    pool.take()
    pool.release([0])
    with pytest.raises(AssertionError, match="released"):
        pool.release([0])


@pytest.mark.parametrize("seed", range(5))
def test_no_block_is_ever_given_to_two_writers(seed: int) -> None:
    choose, pool = random.Random(seed), BlockPool(8, 8)
    held: list[int] = []
    published: dict[bytes, int] = {}
    number = 0
    for _ in range(2000):
        action = choose.randrange(4)
        if action == 0 and (block := pool.take()) is not None:
            assert block not in held
            held.append(block)
            published = {key: other for key, other in published.items() if other != block}
        elif action == 1 and held:
            number += 1
            block, key = choose.choice(held), next_key(START, [number])
            if block not in published.values():
                published[key] = block
                pool.publish(block, key)
        elif action == 2 and published:
            key = choose.choice(list(published))
            block = pool.adopt(key)
            assert block == published[key]
            held.append(block)
        elif action == 3 and held:
            pool.release([held.pop(choose.randrange(len(held)))])
        assert pool.used == len(set(held))
