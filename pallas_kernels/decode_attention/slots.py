"""The slots of cached positions: in a contiguous cache, or in the pages that a table lists for each row."""

from pallas_kernels.decode_attention.lane_context import LaneContext, Refs, Shape
from pallas_kernels.lanes.instructions import Instructions
from pallas_kernels.lanes.registers import Value


def load_page(isa: Instructions, shape: Shape, refs: Refs, batch: Value, position: Value) -> list[Value]:
    """Loads the page of a position, one register; none for a contiguous cache.

    Positions beyond the table get the page of its last entry, which no caller uses.
    """
    if shape.page_size is None:
        return []
    pages_per_row = shape.capacity // shape.page_size
    entry = position // shape.page_size
    entry = isa.select(entry < pages_per_row, entry, isa.constant(pages_per_row - 1))
    address = isa.global_address(refs.pages) + isa.widen((batch * pages_per_row + entry) * 4)
    return isa.load_global(address, ordered=True)


def cached_slot(
    isa: Instructions,
    shape: Shape,
    context: LaneContext,
    position: Value,
    limit: Value,
    page: list[Value],
    first: Value | None,
    first_page: list[Value],
) -> Value:
    """Returns the slot of a position, or that of ``first`` if the position is outside of ``first .. limit``.

    Args:
      isa: The instructions.
      shape: Static sizes.
      context: Indices of the lane.
      position: Position in the row.
      limit: Position after the last one that is loaded.
      page: Page of the position, as ``load_page`` returns it.
      first: First position that is loaded; None for 0.
      first_page: Page of ``first``.
    """

    def is_loaded() -> Value:
        return position < limit if first is None else (position < limit) & (position >= first)

    if shape.page_size is None:
        offset = context.batch * shape.capacity
        return offset + isa.select(is_loaded(), position, isa.constant(0) if first is None else first)
    (page_number,), (other,) = page, first_page
    # An empty row may have no page. It attends to no cached position, but loads one.
    other = isa.select(other < shape.num_pages, other, isa.constant(0))
    slot = page_number * shape.page_size + position % shape.page_size
    loaded = is_loaded()
    if shape.tokens > 1:  # A row may lack pages for the last of its new tokens.
        loaded = loaded & (page_number < shape.num_pages)
    other = other * shape.page_size
    return isa.select(loaded, slot, other if first is None else other + first % shape.page_size)


def new_slot(shape: Shape, batch: Value, position: Value, page: list[Value]) -> Value:
    """Returns the slot of a new token's key and value; ``page`` is that of its position."""
    if shape.page_size is None:
        return batch * shape.capacity + position
    return page[0] * shape.page_size + position % shape.page_size


def has_new_slot(shape: Shape, position: Value, page: list[Value]) -> Value:
    """Returns whether the row has the slot that ``new_slot`` returns."""
    fits = position < shape.capacity
    return fits if shape.page_size is None else fits & (page[0] < shape.num_pages)
