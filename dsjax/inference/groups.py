"""The groups of a unit: the slots and the pages of each, and which of them a request goes to."""

from collections import Counter
from functools import partial
from pathlib import Path

from dsjax.inference.disk import DiskTier, PageFiles
from dsjax.inference.fingerprint import fingerprint
from dsjax.inference.load import Model
from dsjax.inference.pages import PagePool, PrefixCounts
from dsjax.inference.passes import Passes
from dsjax.inference.settings import EngineSettings


class Groups:
    """Slots and pages of all groups.

    Attributes:
        pools: the pages of each.
        slots: those of each that no request has.
        prefix: counts of the prefix cache of all.
    """

    def __init__(self, model: Model, passes: Passes, settings: EngineSettings):
        """All slots and pages are free.

        Args:
            model: that pages on disk belong to.
            passes: which read and write pages.
            settings: of the engine.
        """
        self.prefix, self.slots = PrefixCounts(), [list(range(passes.slots)) for _ in range(passes.groups)]
        files, idle = None, passes.pages
        if settings.prefix_bytes is not None:
            idle = settings.prefix_bytes // passes.page_bytes
        if settings.disk:
            folder = Path(settings.disk) / fingerprint(model, settings.page_size, settings.cache_format)
            files = PageFiles(folder, settings.disk_bytes)

        def pool(group: int) -> PagePool:
            page = partial(passes.read_page, group), partial(passes.write_page, group)
            tier = None if files is None else DiskTier(files, *page)
            return PagePool(passes.pages, settings.page_size, most_idle=idle, tier=tier, counts=self.prefix)

        self.pools = [pool(group) for group in range(passes.groups)]

    @property
    def usable(self) -> int:
        """Pages that requests can have."""
        return sum(pool.usable for pool in self.pools)

    @property
    def held(self) -> int:
        """Pages that requests have."""
        return sum(pool.held for pool in self.pools)

    @property
    def idle(self) -> int:
        """Pages that are kept for nobody in particular."""
        return sum(pool.idle for pool in self.pools)

    @property
    def room(self) -> int:
        """Tokens that a request which is alone has room for."""
        return self.pools[0].usable * self.pools[0].page_size

    def find(self, ids: list[int], busy: Counter[int]) -> tuple[int, list[int], list[bytes]] | None:
        """Return a group that has room for tokens, the pages that it has of them, which are now held, and `ROOT` and
        their digests: the group that knows most, or has the fewest requests. None if none has room.

        Args:
            busy: how many requests each group has.
        """
        free = [group for group, slots in enumerate(self.slots) if slots]
        if len(free) > 1:
            free.sort(key=lambda group: (-self.pools[group].known(ids), busy[group]))
        for group in free:
            pool = self.pools[group]
            pages, digests = pool.match(ids)
            # Room for a page of each of the others, or somebody would soon have to give theirs up.
            if pool.available >= pool.needed(ids) - len(pages) + busy[group]:
                return group, pages, digests
            pool.release(pages)
        return None
