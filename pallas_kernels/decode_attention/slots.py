"""The slots of cached positions: in a contiguous cache, or in the pages that a table lists for each row."""

from pallas_kernels.decode_attention.lane_context import LaneContext, Refs, Shape
from pallas_kernels.lanes.instructions import Instructions, Value


def load_page(
    isa: Instructions, shape: Shape, refs: Refs, context: LaneContext, position: Value
) -> list[Value]:
    """Loads the page of a position, one register; none for a contiguous cache.

    Positions beyond the table get the page of its last entry, which no caller uses.
    """
    if shape.page_size is None:
        return []
    pages_per_row = shape.capacity // shape.page_size
    entry = position // shape.page_size
    entry = isa.select(entry < pages_per_row, entry, isa.constant(pages_per_row - 1))
    address = isa.global_address(refs.pages) + isa.widen((context.batch * pages_per_row + entry) * 4)
    return isa.load_global(address, ordered=True)


def cached_slot(
    isa: Instructions,
    shape: Shape,
    context: LaneContext,
    position: Value,
    limit: Value,
    page: list[Value],
    first_page: list[Value],
) -> Value:
    """Returns the slot of a position, or that of position 0 from ``limit`` on.

    Args:
      isa: The instructions.
      shape: Static sizes.
      context: Indices of the lane.
      position: Position in the row.
      limit: Number of cached positions of the row.
      page, first_page: Pages of the position and of position 0, as ``load_page`` returns them.
    """
    if shape.page_size is None:
        return context.batch * shape.capacity + isa.select(position < limit, position, isa.constant(0))
    (page_number,), (first,) = page, first_page
    # An empty row may have no page. It attends to no cached position, but loads one.
    first = isa.select(first < shape.num_pages, first, isa.constant(0))
    slot = page_number * shape.page_size + position % shape.page_size
    return isa.select(position < limit, slot, first * shape.page_size)


def new_slot(shape: Shape, context: LaneContext, length: Value, page: list[Value]) -> Value:
    """Returns the slot of the new token's key and value; ``page`` is that of the position ``length``."""
    if shape.page_size is None:
        return context.batch * shape.capacity + length
    return page[0] * shape.page_size + length % shape.page_size


def has_new_slot(shape: Shape, length: Value, page: list[Value]) -> Value:
    """Returns whether the row has the slot that ``new_slot`` returns."""
    fits = length < shape.capacity
    return fits if shape.page_size is None else fits & (page[0] < shape.num_pages)
