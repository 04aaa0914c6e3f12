"""A file too large for one transfer, brought to a machine in pieces, one a call, and joined there.

    python -m bench.gpu.pieces split FILE FOLDER [--parts 2]    FOLDER/1, FOLDER/2, ...: one piece each, with the sums
    python -m bench.gpu.pieces keep FOLDER CACHE                on that machine, once a call: the pieces that are in
                                                                FOLDER go to CACHE; the last one joins them

`keep` checks every piece by its sha256, says which are still missing, and puts the whole file into CACHE. Of the model
`smollm2-135m` that is where lorapar looks for it (LORAPAR_CACHE=CACHE), so no network is needed there. This file and
its pieces are no step of a program. Exit status: 0 kept or joined, 1 a piece or the whole is not what its sum says.
"""

import argparse
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

BLOCK = 1 << 20
SUMS = ".sha256"


class Refused(Exception):
    pass


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split(file: Path, folder: Path, parts: int) -> list[Path]:
    """FOLDER/N/NAME.partNofPARTS and, beside each, NAME.sha256: a line each for the pieces and the whole."""
    if not 1 <= parts <= max(file.stat().st_size, 1):
        raise Refused(f"--parts: got {parts}, expected 1 to {file.stat().st_size}")
    size, pieces = -(-file.stat().st_size // parts), []
    with file.open("rb") as whole:
        for number in range(1, parts + 1):
            place = folder / str(number)
            # A piece of an earlier, other split would travel too.
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            piece = place / f"{file.name}.part{number}of{parts}"
            with piece.open("wb") as out:
                left = size
                while left and (block := whole.read(min(left, BLOCK))):
                    out.write(block)
                    left -= len(block)
            pieces.append(piece)
    sums = [f"{digest_of(path)}  {path.name}\n" for path in (*pieces, file)]
    for piece in pieces:
        (piece.parent / f"{file.name}{SUMS}").write_text("".join(sums))
    return pieces


def keep(folder: Path, cache: Path) -> list[str]:
    """Copy FOLDER's pieces to CACHE and join what is whole; the names of the pieces still missing.

    Raises Refused for a piece that is not what its sum says, which is not kept, and for no piece at all.
    """
    found = sorted(folder.rglob(f"*{SUMS}"))
    if not found:
        raise Refused(f"{folder}: no *{SUMS} file, so no piece")
    cache.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, str]] = {}
    for sums in found:
        of = known.setdefault(sums.name.removesuffix(SUMS), {})
        of |= {line.split()[1]: line.split()[0] for line in sums.read_text().splitlines()}
        for piece in of:
            there = sums.parent / piece
            if piece + SUMS != sums.name and there.is_file():
                if digest_of(there) != of[piece]:
                    raise Refused(f"{there}: not what its sha256 says")
                shutil.copyfile(there, cache / f"{piece}.tmp")
                os.replace(cache / f"{piece}.tmp", cache / piece)
    missing: list[str] = []
    for name, of in known.items():
        names = sorted((piece for piece in of if piece != name), key=place_of)
        lacking = [piece for piece in names if not (cache / piece).is_file()]
        if not lacking:
            join(name, [cache / piece for piece in names], of[name], cache)
        missing += lacking
    return missing


def join(name: str, pieces: list[Path], digest: str, cache: Path) -> None:
    temporary = cache / f"{name}.tmp"
    with temporary.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole, BLOCK)
    found = digest_of(temporary)
    for expected, of in ((digest, f"{name}{SUMS}"), (known_digest(name), "lorapar")):
        if expected is not None and found != expected:
            temporary.unlink()
            raise Refused(f"{cache / name}: joined, it has sha256 {found}, and {of} says {expected}")
    os.replace(temporary, cache / name)
    for piece in pieces:
        piece.unlink()


def known_digest(name: str) -> str | None:
    """What lorapar itself holds against a file of that name."""
    from lorapar.model.locate import ALIAS_MEMBER, ALIAS_SHA256

    return ALIAS_SHA256 if name == Path(ALIAS_MEMBER).name else None


def place_of(piece: str) -> int:
    found = re.search(r"\.part(\d+)of\d+$", piece)
    if not found:
        raise Refused(f"{piece}: not the name of a piece")
    return int(found[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.pieces", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    splits = verbs.add_parser("split")
    splits.add_argument("file", type=Path)
    splits.add_argument("folder", type=Path)
    splits.add_argument("--parts", type=int, default=2)
    keeps = verbs.add_parser("keep")
    keeps.add_argument("folder", type=Path)
    keeps.add_argument("cache", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "split":
            for piece in split(options.file, options.folder, options.parts):
                print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")
        else:
            missing = keep(options.folder, options.cache)
            print(f"still missing: {', '.join(missing)}" if missing else f"whole: {options.cache}")
    except (Refused, OSError) as error:
        print(f"pieces: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
