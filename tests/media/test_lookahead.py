from longvid.media.decoding.lookahead import Lookahead


def test_items_come_out_in_order_whether_they_were_looked_at_or_not():
    items = Lookahead(iter(range(5)))
    assert items.peek(2) == [0, 1]
    assert next(items) == 0
    assert items.peek(9) == [1, 2, 3, 4]
    assert list(items) == [1, 2, 3, 4]
    assert items.peek(1) == []


def test_looking_ahead_at_every_item_costs_no_depth():
    items, count = Lookahead(iter(range(100_000))), 0
    while items.peek(2):
        assert next(items) == count
        count += 1
    assert count == 100_000
