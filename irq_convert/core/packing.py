"""Packed codes: each row of codes of 2 to 4 bits as one little-endian stream of bits.

Bit `j` of code `c` is bit `c * bits + j` of its row and every row begins on a byte
(formats/irq-v1.md, section 5). Eight codes fill exactly `bits` bytes, so both directions work on
groups of eight, in torch operations that run on any device.
"""

from __future__ import annotations

import torch

from irq_convert.errors import IrqError, UsageError

GROUP = 8
"""Codes that fill a whole number of bytes whatever their width."""


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes`, uint8 `[rows, cols]`, to uint8 `[rows, ceil(cols * bits / 8)]`.

    Unused bits at the end of a row are 0. Raises `UsageError` when a code needs more than `bits`
    bits.
    """
    rows, cols = codes.shape
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise UsageError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    groups = -(-cols // GROUP)
    if cols % GROUP:
        codes = torch.nn.functional.pad(codes, (0, groups * GROUP - cols))
    grouped = codes.reshape(rows, groups, GROUP)
    packed = torch.zeros(rows, groups, bits, dtype=torch.uint8, device=codes.device)
    for code, byte, shift in _overlaps(bits):
        part = grouped[:, :, code]
        packed[:, :, byte] |= part << shift if shift >= 0 else part >> -shift
    return packed.reshape(rows, groups * bits)[:, : -(-cols * bits // 8)].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Unpack `packed`, uint8 `[rows, ceil(cols * bits / 8)]`, to uint8 codes `[rows, cols]`.

    Raises `IrqError` when a row is not as long as `cols` codes need.
    """
    rows, row_bytes = packed.shape
    if row_bytes != -(-cols * bits // 8):
        raise IrqError(
            f"packed rows have {row_bytes} bytes, but {cols} codes of {bits} bits need "
            f"{-(-cols * bits // 8)}"
        )
    groups = -(-cols // GROUP)
    if row_bytes != groups * bits:
        packed = torch.nn.functional.pad(packed, (0, groups * bits - row_bytes))
    grouped = packed.reshape(rows, groups, bits)
    codes = torch.zeros(rows, groups, GROUP, dtype=torch.uint8, device=packed.device)
    for code, byte, shift in _overlaps(bits):
        part = grouped[:, :, byte]
        codes[:, :, code] |= part >> shift if shift >= 0 else part << -shift
    codes &= (1 << bits) - 1
    return codes.reshape(rows, groups * GROUP)[:, :cols].contiguous()


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """`(code, byte, shift)` for each byte of a group that holds bits of a code.

    `shift` is where the code's bit 0 lies in the byte; negative when it lies in the one before.
    """
    return [
        (code, byte, code * bits - 8 * byte)
        for code in range(GROUP)
        for byte in range(bits)
        if code * bits < 8 * (byte + 1) and (code + 1) * bits > 8 * byte
    ]
