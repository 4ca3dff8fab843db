"""One check that every module of this folder needs."""


def check_positive(**counts: int) -> None:
    """Refuse a count that is not a positive whole number, by its name.

    Args:
        counts: the arguments to check, by name.

    Raises:
        ValueError: if a count is below 1 or not whole.

    Examples:
        >>> check_positive(ways=5, shots=0)
        Traceback (most recent call last):
        ...
        ValueError: Invalid shots: 0 (give a whole number, 1 or more)
    """
    for name, count in counts.items():
        if count < 1 or count != int(count):
            raise ValueError(f"Invalid {name}: {count} (give a whole number, 1 or more)")
