"""Numbers of panels, as people write them."""


def select_panels(text: str, count: int) -> list[int] | None:
    """Indices of panels from their numbers, such as "2, 4-6"; None for an empty text.

    Raises:
        ValueError: not of this form, or a number outside 1..count.
    """
    chosen = set()
    for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
        first, _, last = part.partition("-")
        numbers = [first.strip(), (last or first).strip()]
        if not all(number.isdecimal() for number in numbers):
            raise ValueError(f"panels is {text!r}: {part!r} is not a number. Write numbers such as '2, 4-6'.")
        low, high = map(int, numbers)
        if not 1 <= low <= high <= count:
            raise ValueError(f"panels is {text!r}, but the story has panels 1 to {count}. Choose from those.")
        chosen.update(range(low - 1, high))
    return sorted(chosen) or None
