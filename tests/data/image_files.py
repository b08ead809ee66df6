"""Write image files of all depths by hand, from numpy arrays."""

import io
import struct
import zlib

import numpy as np

SIGNED, FLOATING, DEFLATE = 2, 3, 8
_KINDS = {"H": 3, "I": 4, "f": 11, "d": 12}  # types of a TIFF's fields, by their struct formats


def tiff(
    values, order="<", photometric=None, packed=False, bits=None, extra=(), data=None, alpha=None
):
    """A TIFF of one strip from values [H, W] or [H, W, C]; ``extra`` are (tag, kind, values)."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    if data is None:
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if packed:
        data = zlib.compress(data)
    if photometric is None:
        photometric = 2 if channels > 2 else 1
    sample_format = {"u": 1, "i": SIGNED, "f": FLOATING}[values.dtype.kind]
    fields = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [bits or 8 * values.itemsize] * channels),
        (259, "H", [DEFLATE if packed else 1]),
        (262, "H", [photometric]),
        (273, "I", [0]),
        (277, "H", [channels]),
        (278, "H", [height]),
        (279, "I", [len(data)]),
        (339, "H", [sample_format] * channels),
        *([(338, "H", [alpha])] if alpha is not None else []),
        *extra,
    ]
    contents = {tag: struct.pack(f"{order}{len(v)}{kind}", *v) for tag, kind, v in fields}
    place = 8 + 2 + 12 * len(fields) + 4  # of what is too long for the table
    start = place + sum(len(content) for content in contents.values() if len(content) > 4)
    contents[273] = struct.pack(f"{order}I", start)
    table, tail = struct.pack(f"{order}H", len(fields)), b""
    for tag, kind, numbers in sorted(fields):
        content = contents[tag]
        if len(content) > 4:
            content, tail = struct.pack(f"{order}I", place + len(tail)), tail + content
        table += struct.pack(f"{order}HHI", tag, _KINDS[kind], len(numbers)) + content.ljust(
            4, b"\0"
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + table + bytes(4) + tail + data


def netpbm(values, most, plain=False):
    """A PGM or PPM whose largest value may be ``most``."""
    height, width = values.shape[:2]
    magic = (2 if plain else 5) + (values.ndim == 3)
    head = f"P{magic}\n{width} {height}\n{most}\n".encode()
    if plain:
        return head + " ".join(map(str, values.ravel().tolist())).encode() + b"\n"
    return head + values.astype(">u2" if most > 255 else "u1").tobytes()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, depth=8, before=(), after=()):
    """A PNG of values [H, W] or [H, W, 2 to 4] of 1 to 16 bits, with more chunks."""
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    rows = values.reshape(height, -1)
    if depth < 8:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    rows = rows.astype(">u2" if depth == 16 else "u1")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    for name, data in (
        (b"IHDR", header),
        *before,
        (b"IDAT", zlib.compress(body)),
        *after,
        (b"IEND", b""),
    ):
        file.write(png_chunk(name, data))
    return file.getvalue()
