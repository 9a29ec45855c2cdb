"""The journal: the record file that is the registry's only truth. This page is the specification of its format.

Folder
======

```
LOCK                                 flock(LOCK_EX) for the life of the owner; its text (pid, host) is information only
MANIFEST                             names the files that count, in order; replaced only as a whole
base-<number, 10 digits>.jsonl       at most one: the records of compacted segments that are still needed
base-<number>.idx                    derived from it; may be deleted at any time
seg-<first sequence, 20 digits>.jsonl   segments: sealed ones, then exactly one active one
seg-....jsonl.<offset>[.<n>].torn    bytes cut from the end of a segment at a boot; kept for people, never read
RESERVE                              room to be given up when the disk is full; its bytes mean nothing
aside/                               files a boot found here and did not know; never read
damaged-<time>/                      all files as they were before a repair; never read
*.tmp                                a file that was being published; removed by the next boot
```

Line
====

One record is one line, and one line is one complete JSON object in UTF-8 with exactly these members in this order, no
blanks between tokens, ended by one newline (0x0A, which cannot occur inside):

```
{"v":1,"seq":123,"b":120,"t":1790000000000,"op":"put","rec":{...},"crc":"1a2b3c4d"}
```

`v`    format version, 1. A reader refuses any other.
`seq`  the record's sequence: 1 for the first line of a journal, then one more for each line, over all segments and for
       every kind of line, without a gap.
`b`    sequence of the first line of the batch this line was written in. A batch is written and made durable as a
       whole, and the next one is written only after that. So a line with `b` > k proves that line k had been durable.
`t`    unix time in milliseconds when the batch was written. Information only: clocks jump.
`op`   what the record does. `open`, `seal` and `mark` belong to the journal; all others are business records.
`rec`  the record, a JSON object.
`crc`  8 lower-case hex digits: zlib's CRC-32 of all bytes of the line before `,"crc":"`, started from the `crc` of the
       line before (0 before the first line of the journal). The last 19 bytes of a line, `,"crc":"xxxxxxxx"}` and the
       newline, are compared as bytes: a parser of numbers would take `A` for `a`.

The chain of `crc` runs on from segment to segment. A line, with its newline, has at most 1,048,576 bytes. A batch has
at most 512 lines and is closed by the line that takes it past 1 MiB.

Lines of the journal itself; each is a batch of its own
=======================================================

`open`  the first line of a segment. `rec`: `format`, 1; `registryId`, 32 hex digits made when the journal was; `epoch`,
        at the time of writing; `previous`, null or `{"name", "crc"}`: the segment before and its last line's `crc`.
        The number in the segment's name is the sequence of this line.
`seal`  the last line of a sealed segment. `rec`: `lines` before this one, and `sha256` (hex) of the bytes before it.
`mark`  nothing but a later batch: it proves the batch before it durable. Written on a clean shutdown and after a second
        without records. `rec` is empty.

A base
======

Compaction writes one in place of the base and the sealed segments before it. It is sealed from the start, and has lines
like theirs, in a chain of `crc` of its own that starts from 0:

- first an `open` line with `seq` and `b` 0. `rec`: `format`, `registryId`, `epoch`, `previous` (null), `replaces`
  (`{"sequence", "name", "crc"}`: the last line it stands for, the file that line was in, and its `crc`), `changesFrom`:
  a reader of the changes that has not seen this sequence would miss what was taken away since (0: nothing);
- the kept lines, byte for byte but for their `crc`: `seq` ascends with gaps, and `seq`, `b` and `t` are what they were;
- last a `seal` line with `seq` and `b` equal to `replaces.sequence`.

The segment behind it goes on from `replaces`: its name has that sequence and one, and its first line is chained to
`replaces.crc` and names `replaces.name` as the file before. Which records are needed is the catalog's to say
(`worker/catalog/retention.py`); the others leave no trace, so a fold ignores a record about what is not there.

Steps, each of which may be the last one before a crash: rotate; another process writes the base and its index under
their names and `.tmp`, fsynced; the owner reads every byte of both again; it renames them and fsyncs the folder; it
publishes MANIFEST, which is the commit; it removes the files the base stands for. What an earlier step leaves is
removed by the next boot: `*.tmp`, any base that MANIFEST does not name, segments up to `replaces.sequence`.

The index (`worker/journal/base_index.py`) has the places of the base's lines and what a replay made of them. A boot
takes it in place of parsing the base, whose whole `crc32` it checks all the same. One that is missing, does not check
or is of another version costs time, nothing else.

MANIFEST
========

One JSON object on one line, closed as a line is (`,"crc":"xxxxxxxx"}` and a newline, the CRC-32 started from 0):

```
{"v":1,"registryId":"...","epoch":1,"generation":7,"files":[{"name","size","lines","crc32","sha256"},...,{"name"}],"crc":"..."}
```

`generation` grows by one with each replacement. All files but the last are sealed: `size` in bytes, number of `lines`,
`crc32` (8 hex digits, started from 0) and `sha256` of the whole file. A base comes first. The last file is active and
has a name only. Like
every file here it is published: written under `<name>.tmp`, fsynced, renamed, and the folder fsynced.

Promises of the writer
======================

I1 nothing is acknowledged before the fdatasync of its batch returned 0. I2 durable bytes never change. I3 at any
instant MANIFEST names a complete set. I4 a file named by MANIFEST is removed only after a later MANIFEST without it is
durable. I5 damage to a durable record is reported and refuses the boot; it is never cut. I6 after an fsync error this
process acknowledges nothing more.

Rotation, once the active segment has 64 MiB: write the `seal` line and fsync; publish the next segment with its `open`
line; publish MANIFEST. Records go into the new segment only after that. A crash between these steps leaves an active
segment that ends in `seal`; the next owner goes on from there.

No room (ENOSPC, EFBIG, EDQUOT) before the fdatasync: the segment is cut back to its durable end, the batch fails, the
journal goes on. If even that fails, or any fsync does, the journal stops.

RESERVE has 32 MiB, really allocated; it is made after the boot, and never synced, since no promise rests on it. With
ENOSPC and EDQUOT the disk is full: an eighth of RESERVE is cut off, and only records that free room are taken
(`worker/catalog/retention.py` knows which). For them, for a rotation that compaction asks for, for the base and for its
MANIFEST more of it is given up, an eighth at a time, at last the file itself. Once a second the owner looks: when what
is free and what is left of RESERVE are 64 MiB, RESERVE is made whole, and the disk is not full any more. A boot finds
the disk full if RESERVE is not whole and that room is not there; one with hardly any room cuts off an eighth first.

Reading at boot
===============

1. LOCK is taken or the boot is refused. MANIFEST must check.
2. A sealed file must have its size and crc32; then its lines are parsed without checking each one.
3. The active file is checked line by line. Its `open` line was durable before MANIFEST named it, so it must check. At
   the first line k that does not check, the rest of the file is judged:
   - a later line checks against the `crc` stored in the line before it, and has `b` > k: damage, refuse;
   - else, if the part of the rest that lies in one 512-byte sector of the file is all NUL: a torn write, which lost
     that sector;
   - else, if the rest ends in a newline, or would be a complete line if its last byte were one: damage, refuse;
   - else: a torn write.
   The bytes of a torn write, which nobody was promised, are copied to a `.torn` file and cut off.
4. The last batch that is kept is written again, the same bytes, and fsynced, with the folder: after a failed fsync the
   page cache may show bytes the disk does not have.
5. A segment that MANIFEST does not name, with a higher number than the active one, is the leftover of a rotation if the
   active one ends in `seal` and this one holds its `open` line only; else MANIFEST is not the newest one: refuse.
   Every other file that is not named above is moved to `aside/`.

A large file is read in chunks, in several processes: the lines that begin in a range of its bytes can be found, and
checked against the `crc` in front of the first one, without those before. A line is good if all before it are.

What a cut cannot tell: the loss of exactly the last batch after it was acknowledged looks like a torn write. The `mark`
line narrows that to one second after a batch.

Repair (`worker/journal/repair.py`) is asked for by hand, where a boot refuses. What still checks becomes a base, under
the next epoch, that stands for all sequences that may have been given, with `changesFrom` there too; behind it comes a
fresh segment.

A reader beside a running writer takes no lock. It takes lines while they check; lines of the last batch may still be
cut off, so it acts on line k only when a later line has `b` > k. At `seal` it goes on with the next file of MANIFEST.
"""

from __future__ import annotations

from worker.journal.blocks import Block
from worker.journal.compaction import Base
from worker.journal.failures import JournalDamaged, JournalFailed, JournalLocked, disk_full
from worker.journal.files import Files
from worker.journal.format import CONTROL_OPS, Entry, Line, check_record
from worker.journal.inspection import VerifyReport, dump, verify
from worker.journal.journal import SEGMENT_BYTES, Durable, Journal, JournalStats
from worker.journal.manifest import SealedFile, base_name
from worker.journal.observer import JournalObserver
from worker.journal.reconstruction import PointUnreachable, Reconstructed, Reconstruction, Until
from worker.journal.replay import EachEntry, Help, Replay
from worker.journal.segment import RecordCold
from worker.journal.staging import FolderTaken, Staging

__all__ = [
    "CONTROL_OPS",
    "SEGMENT_BYTES",
    "Base",
    "Block",
    "Durable",
    "EachEntry",
    "Entry",
    "Files",
    "FolderTaken",
    "Help",
    "Journal",
    "JournalDamaged",
    "JournalFailed",
    "JournalLocked",
    "JournalObserver",
    "JournalStats",
    "Line",
    "PointUnreachable",
    "Reconstructed",
    "Reconstruction",
    "RecordCold",
    "Replay",
    "SealedFile",
    "Staging",
    "Until",
    "VerifyReport",
    "base_name",
    "check_record",
    "disk_full",
    "dump",
    "verify",
]
