# SPDX-License-Identifier: Apache-2.0
"""The chunk store behind the loopback Hub: blocks of compressed chunks, and of which runs of chunks each file is made.

Blocks and shards are read as the client of Xet sends them. Hashes are in hexadecimal, as addresses have them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any


RECORD = 48  # bytes; a shard is a row of records
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
END_OF_FILES = b"\xff" * 32


@dataclass(frozen=True)
class Block:
    """Chunks as they were sent, each with its header, and what is in them."""

    packed: list[bytes]
    chunks: list[bytes]

    def bytes_of(self, start: int, stop: int) -> tuple[int, int]:
        """The first and the last byte of these chunks in the block."""
        ends = [0, *accumulate(map(len, self.packed))]
        return ends[start], ends[stop] - 1


@dataclass(frozen=True)
class Run:
    """Chunks `start` to `stop` of a block, which are a part of a file."""

    block: str
    start: int
    stop: int


@dataclass
class XetStore:
    """All blocks, and the files made of them: the runs of each by its Xet hash, which `names` has by its SHA-256."""

    blocks: dict[str, Block] = field(default_factory=dict)
    files: dict[str, list[Run]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add_block(self, name: str, body: bytes) -> None:
        self.blocks[name] = unpacked(body)

    def add_files(self, shard: bytes) -> None:
        """Registers the files of a shard; `KeyError` for a block that was not sent, `ValueError` for a wrong SHA-256."""
        position = RECORD  # behind the shard's own header
        while (record := shard[position:])[:32] != END_OF_FILES:
            name, (flags, count) = hexadecimal(record[:32]), struct.unpack("<II", record[32:40])
            entries = [record[RECORD * i : RECORD * (i + 1)] for i in range(1, count + 1)]
            runs = [Run(hexadecimal(entry[:32]), *struct.unpack("<II", entry[40:48])) for entry in entries]
            behind = RECORD * (1 + count * (2 if flags & HAS_VERIFICATION else 1))
            if flags & HAS_SHA256:
                oid = hexadecimal(record[behind : behind + 32])
                if hashlib.sha256(self._joined(runs)).hexdigest() != oid:
                    raise ValueError(f"The chunks of {name} do not have the SHA-256 {oid}")
                self.names[oid] = name
                behind += RECORD
            self.files[name] = runs
            position += behind

    def content(self, oid: str) -> bytes | None:
        """The file with this SHA-256, if it is here."""
        return self._joined(self.files[self.names[oid]]) if oid in self.names else None

    def reconstruction(self, name: str, url: str) -> dict[str, Any]:
        """How a client puts a file together from parts of the blocks, which are at `url`."""
        terms: list[dict[str, Any]] = []
        fetches: dict[str, list[dict[str, Any]]] = {}
        for run in self.files[name]:
            block, chunks = self.blocks[run.block], {"start": run.start, "end": run.stop}
            first, last = block.bytes_of(run.start, run.stop)
            length = sum(map(len, block.chunks[run.start : run.stop]))
            terms.append({"hash": run.block, "unpacked_length": length, "range": chunks})
            part = {"chunks": chunks, "bytes": {"start": first, "end": last}}
            fetches.setdefault(run.block, []).append({"url": f"{url}/{run.block}", "ranges": [part]})
        return {"offset_into_first_range": 0, "terms": terms, "xorbs": fetches}

    def _joined(self, runs: list[Run]) -> bytes:
        return b"".join(chunk for run in runs for chunk in self.blocks[run.block].chunks[run.start : run.stop])


def hexadecimal(digest: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits, each with its lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def unpacked(block: bytes) -> Block:
    """The chunks of a block: each has 8 bytes of header (version, length in the block, compression, length) before it."""
    import pyarrow

    found = Block([], [])
    while block:
        length, kind, whole = int.from_bytes(block[1:4], "little"), block[4], int.from_bytes(block[5:8], "little")
        packed, block = block[: 8 + length], block[8 + length :]
        chunk = packed[8:]
        if kind > 2:
            raise ValueError(f"This store cannot read chunks of compression {kind}")
        if kind:
            chunk = pyarrow.decompress(chunk, whole, "lz4").to_pybytes()
        found.packed.append(packed)
        found.chunks.append(interleaved(chunk) if kind == 2 else chunk)
    return found


def interleaved(grouped: bytes) -> bytes:
    """Bytes that stand in four groups, every fourth one in each, in their own order."""
    mixed, start = bytearray(len(grouped)), 0
    for group in range(4):
        count = len(range(group, len(grouped), 4))
        mixed[group::4] = grouped[start : start + count]
        start += count
    return bytes(mixed)
