"""Work that arms share: what honest clients sent is kept by what it was made from, and linked where it comes again.

What an honest client sends depends on what it received, its examples, the settings, the seed and the round. Arms of one
run have all but the first in common, so that from the same bytes it sends the same bytes. Clients that are trained side
by side are one piece of work: their results depend, in the last bits, on who else is in the group.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedllm_sec.federation.run_folder import client_name
from fedllm_sec.updates.files import PARTIAL, write_json

SHARED = "shared"  # in a run's or a seed's folder: what honest clients sent, by what it was made from
NOTE = "shared.json"  # in a round's folder: how many of its trainings were done, and whose were linked


@dataclass(frozen=True)
class SharedWork:
    """The work of one round of one arm, and where other arms' is found.

    Attributes:
        folder: of the cache, one for all arms of a run; None: nothing is shared.
        received: the global model that the clients received.
        index: the round's.
        linked: clients whose work was found; filled as they are.
    """

    folder: Path | None
    received: Path
    index: int
    linked: list[int] = field(default_factory=list)

    @cached_property
    def origin(self) -> str:
        """A digest of every byte of the model that the clients received."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.received.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.received)}|{path.stat().st_size}|".encode())
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def place(self, clients: Sequence[int]) -> Path:
        """Where what these clients sent, trained together in this order, is kept."""
        assert self.folder is not None
        return self.folder / hashlib.sha256(f"{self.origin}|{self.index}|{list(clients)}".encode()).hexdigest()

    def take(self, clients: Sequence[int], name: Callable[[str], Path]) -> bool:
        """Link what these clients sent in another arm.

        Args:
            clients: trained together, in this order, all of them honest.
            name: gives the path of a file by its name in the cache.

        Returns:
            Whether it was there; if not, train them.
        """
        if self.folder is None or not (found := self.place(clients)).is_dir():
            return False
        for path in found.iterdir():
            target = name(path.name)
            target.parent.mkdir(exist_ok=True)
            link(path, target)
        self.linked.extend(clients)
        return True

    def keep(self, clients: Sequence[int], files: Iterable[tuple[str, Path]]) -> None:
        """Keep what these clients have sent: files with their names in the cache; the first arm to come is kept."""
        if self.folder is None or (target := self.place(clients)).is_dir():
            return
        partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, path in files:
            link(path, partial / name)
        try:
            partial.rename(target)
        except OSError:  # another process was faster, with the same bytes
            shutil.rmtree(partial)

    def note(self, linked: Sequence[int], clients: int, out: Path) -> None:
        """Write into a folder which of so many clients were linked, by all processes, and how many were trained."""
        if self.folder is not None:
            names = [client_name(client) for client in sorted(linked)]
            write_json(out / NOTE, {"trained": clients - len(names), "linked": names})


def link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(path, target)
