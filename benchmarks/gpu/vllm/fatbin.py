"""CUDA extensions with machine code of one GPU only, so that they pack small.

Offsets and sizes stay: a fat binary's payloads for other architectures, and its PTX, become zeros,
and the file loads as before. Containers have the magic number and header of NVIDIA's fatbinary.h.
"""

from __future__ import annotations

import struct

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
MACHINE_CODE = 2
_CONTAINER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")
_ARCHITECTURE_AT = 28


def keep_architecture(image: bytes, keep: int) -> tuple[bytes, int]:
    """Zero what an ELF file holds for other GPUs.

    Args:
        image: a 64-bit little-endian ELF file.
        keep: architecture that stays, for instance 90.

    Returns:
        The file, of the same length, and how many bytes became zeros.

    Raises:
        ValueError: it has no section of fat binaries, or none for that architecture.
    """
    data = bytearray(image)
    zeroed = kept = 0
    for start, size in _sections(image):
        position, end = start, start + size
        while position + _CONTAINER.size <= end:
            magic, _, header, length = _CONTAINER.unpack_from(data, position)
            if magic != MAGIC:
                position += 8
                continue
            stop = position + header + length
            entry = position + header
            while entry < stop:
                kind, _, entry_header, payload = _ENTRY.unpack_from(data, entry)
                (architecture,) = struct.unpack_from("<I", data, entry + _ARCHITECTURE_AT)
                first = entry + entry_header
                if kind == MACHINE_CODE and architecture == keep:
                    kept += payload
                else:
                    data[first : first + payload] = bytes(payload)
                    zeroed += payload
                entry = first + payload
            position = (stop + 7) // 8 * 8
    if not kept:
        raise ValueError(f"no machine code for sm_{keep}")
    return bytes(data), zeroed


def _sections(image: bytes) -> list[tuple[int, int]]:
    """Offset and size of each section of fat binaries."""
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]
    strings = headers[names][4]
    found = []
    for name, _, _, _, offset, length in headers:
        at = strings + name
        if image[at : image.index(b"\0", at)] == SECTION:
            found.append((offset, length))
    if not found:
        raise ValueError(f"no section {SECTION.decode()}")
    return found
