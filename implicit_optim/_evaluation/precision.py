"""Autocast: whether it is on, and off where a solve must not have it."""

import contextlib

import torch


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on there."""
    available = torch.amp.is_autocast_available(device.type)  # the meta device has none
    return available and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off: dot products in 16 bits would ruin a solve."""
    on = autocast_is_on(device)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
