"""Turn a source's candidates into class images until there are enough."""

import asyncio
import contextlib
import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from custom_diffusion.retrieval.addresses import host_and_port
from custom_diffusion.retrieval.candidates import Candidate
from custom_diffusion.retrieval.class_image import Rejected, to_class_image
from custom_diffusion.retrieval.client import NoAnswer
from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.hosts import Hosts
from custom_diffusion.retrieval.writer import ClassFolder

PROGRESS_SECONDS = 0.2
LOOK_AROUND_SECONDS = 0.2
SPARE_DOWNLOADS = 4  # beyond two for each image still missing, so that slow hosts do not hold up the last ones

LOOKUPS_PER_WORKER = 4  # of host names at a time: they only wait
MAX_WAITING = 1000  # candidates that wait for busy or silent hosts, before no more are read
MAX_BROUGHT = 8  # images that came with their rows and wait to be decoded: whole files


class Collector:
    """Fills one class folder from one source after another.

    Args:
        folder: an open class folder.
        num_class_images: when to stop.
        min_size: least shorter side, pixels.
        num_workers: downloads at a time.
        timeout: seconds for one download.
        allow_private: whether any address may be on a private network.
    Attributes:
        reasons: how many candidates were turned down for what, all sources together.
        num_temporary: those of them that may do on another day.
    """

    def __init__(
        self,
        folder: ClassFolder,
        num_class_images: int,
        min_size: int,
        num_workers: int,
        timeout: float,
        allow_private: bool,
    ):
        self.folder = folder
        self.num_class_images = num_class_images
        self.min_size = min_size
        self.num_workers = num_workers
        self.timeout = timeout
        self.allow_private = allow_private
        self.reasons = Counter()
        self.num_temporary = 0
        self.num_tried = 0
        self._attempted = set()

    @property
    def num_missing(self) -> int:
        return max(0, self.num_class_images - len(self.folder.rows))

    def run(
        self,
        candidates: Iterator[Candidate],
        description: str,
        progress: Callable[[], dict],
        rows_may_be_private: bool,
    ):
        """Take candidates until nothing is missing or none are left.

        Args:
            candidates: of the source.
            description: of the progress bar.
            progress: called a few times a second, never while an image is being kept; what more the bar is to show.
            rows_may_be_private: whether the source's addresses may be on private networks, as the user's own may.
        Raises:
            SourceError: the source failed on the way; what was found before is kept.
        """
        with tqdm(total=self.num_class_images, initial=len(self.folder.rows), desc=description, unit="image") as bar:
            asyncio.run(self._run(candidates, bar, progress, rows_may_be_private))
            self._show(bar, progress)

    async def _run(self, candidates, bar, progress, rows_may_be_private):
        # Pillow lets go of the interpreter lock while it decodes.
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        showing = asyncio.ensure_future(self._keep_showing(bar, progress))
        try:
            async with Downloader(self.timeout, self.allow_private, rows_may_be_private) as downloader:
                await _Pass(self, downloader, pool).work(filter(self._is_new, candidates))
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            pool.shutdown(wait=False, cancel_futures=True)

    def _show(self, bar, progress):
        bar.n = len(self.folder.rows)
        bar.set_postfix(progress() | {"tried": self.num_tried, "kept": bar.n}, refresh=True)

    async def _keep_showing(self, bar, progress):
        while True:
            self._show(bar, progress)
            await asyncio.sleep(PROGRESS_SECONDS)

    def _is_new(self, candidate):
        if candidate.url in self.folder.tried or candidate.url in self._attempted:
            return False
        self._attempted.add(candidate.url)
        return True

    def take(self, candidate: Candidate, outcome):
        """Keep a finished candidate or turn it down.

        Args:
            outcome: Rejected, or (JPEG, fingerprints, look).
        """
        self.num_tried += 1
        if not isinstance(outcome, Rejected):
            if not self.num_missing:
                return
            jpeg, fingerprints, look = outcome
            # Of what was kept before, or while this one was on its way.
            if not self.folder.fingerprints.isdisjoint(fingerprints):
                outcome = Rejected("duplicate")
            elif self.folder.looks.has_copy_of(look):
                outcome = Rejected("near-duplicate")
        if not isinstance(outcome, Rejected):
            self.folder.add(jpeg, candidate.caption, candidate.url, fingerprints, look)
            return
        self.reasons[str(outcome)] += 1
        if outcome.lasting:
            self.folder.turn_down(candidate.url, str(outcome))
        else:
            self.num_temporary += 1


class _Pass:
    """One source's candidates on their way: waiting for their hosts, being fetched and decoded, finished."""

    def __init__(self, collector, downloader, pool):
        self.collector = collector
        self.downloader = downloader
        self.pool = pool
        self.hosts = Hosts()
        self.tasks = set()  # of downloads, look-ups and the decoding of images that came with their rows
        self.num_fetching = self.num_looking_up = self.num_taken = 0
        self.brought = deque()  # (number, candidate): images that came with their rows
        self.is_decoding = False
        self.finished = []  # (number, candidate, outcome)
        self.wake = asyncio.Event()

    async def work(self, candidates):
        """Raises SourceError: the source failed, and more are needed than came before."""
        collector = self.collector
        feed = _Feed(candidates, 2 * collector.num_workers, self.wake)
        try:
            while collector.num_missing:
                self._admit(feed)
                self._start()
                if self.finished:
                    finished, self.finished = sorted(self.finished, key=lambda item: item[0]), []
                    for _, candidate, outcome in finished:
                        collector.take(candidate, outcome)
                    continue
                if feed.is_exhausted and not self.tasks:
                    break
                await self._wait()
            if collector.num_missing and feed.error is not None:
                raise feed.error
        finally:
            feed.stop()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _wait(self):
        # Without anything new after a while: a host from which images were expected may have been silent for too long.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.wake.wait(), LOOK_AROUND_SECONDS)
        self.wake.clear()

    @property
    def _limit(self):
        return min(self.collector.num_workers, 2 * self.collector.num_missing + SPARE_DOWNLOADS)

    def _admit(self, feed):
        """Take candidates from the source as long as too few are under way or likely to come."""
        enough = 2 * self.collector.num_missing + SPARE_DOWNLOADS
        while (
            self.hosts.num_free < self._limit
            and self.num_looking_up < LOOKUPS_PER_WORKER * self._limit
            and self.hosts.num_waiting < MAX_WAITING
            and len(self.brought) < MAX_BROUGHT
            and feed.has_ready
            # The first sum is never less, and costs nothing.
            and (
                self.num_fetching + self.hosts.num_waiting < enough
                or self.num_fetching + self.hosts.num_expected() < enough
            )
        ):
            candidate = feed.get()
            self.num_taken += 1
            if candidate.image is not None:
                self.brought.append((self.num_taken, candidate))
            else:
                self._let_wait(self.num_taken, candidate)

    def _let_wait(self, number, candidate):
        try:
            host, port = host_and_port(candidate.url)
        except Rejected as rejected:
            self.finished.append((number, candidate, rejected))
            return
        place = f"{host}:{port}"
        if self.hosts.add(place, number, candidate):
            self.num_looking_up += 1
            self._spawn(self._look_up(place, candidate.url))
        self._reject_given_up(place)

    def _start(self):
        """Start what there is room for."""
        while self.num_fetching < self._limit and (turn := self.hosts.next()) is not None:
            self.num_fetching += 1
            self._spawn(self._fetch(*turn))
        if self.brought and not self.is_decoding:
            # Without a network there is no reason for the result to depend on timing: one after another.
            self.is_decoding = True
            self._spawn(self._decode_brought(*self.brought.popleft()))

    def _spawn(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task):
        self.tasks.discard(task)
        self.wake.set()

    async def _look_up(self, place, url):
        try:
            await self.downloader.look_up(url)
            self.hosts.is_found(place)
        except Exception as error:  # nothing about one host ends a run
            self.hosts.give_up(place, str(_as_rejected(error)))
            self._reject_given_up(place)
        finally:
            self.num_looking_up -= 1

    async def _fetch(self, place, number, candidate):
        outcome = await self._outcome(candidate, self.downloader.fetch(candidate.url))
        self.num_fetching -= 1
        self.finished.append((number, candidate, outcome))
        self.hosts.ended(place, not isinstance(outcome, NoAnswer))
        self._reject_given_up(place)

    async def _decode_brought(self, number, candidate):
        outcome = await self._outcome(candidate, self._brought(candidate))
        self.finished.append((number, candidate, outcome))
        self.is_decoding = False

    async def _brought(self, candidate):
        return candidate.image

    async def _outcome(self, candidate, encoded):
        """(JPEG, fingerprints, look) or Rejected, whatever goes wrong.

        Args:
            encoded: coroutine of the file.
        """
        try:
            return await self._decode(await encoded)
        except Exception as error:  # nothing about one candidate ends a run
            return _as_rejected(error)

    async def _decode(self, encoded):
        file_hash = hashlib.sha256(encoded).hexdigest()
        if file_hash in self.collector.folder.fingerprints:
            raise Rejected("duplicate")
        jpeg, kept_hash, look = await asyncio.get_running_loop().run_in_executor(
            self.pool, to_class_image, encoded, self.collector.min_size
        )
        return jpeg, (file_hash, kept_hash), look

    def _reject_given_up(self, place):
        reason, rows = self.hosts.take_given_up(place)
        self.finished += [(number, candidate, Rejected(reason, lasting=False)) for number, candidate in rows]


def _as_rejected(error):
    """Whatever went wrong, as the reason of one candidate."""
    return error if isinstance(error, Rejected) else Rejected(f"failed ({type(error).__name__})", lasting=False)


class _Feed:
    """Runs a blocking iterator in a thread, a few items ahead.

    A daemon thread and not an executor: a source that hangs must not hold up the end of the program.
    """

    def __init__(self, iterator, size, wake):
        self.error = None
        self._loop = asyncio.get_running_loop()
        self._wake = wake
        self._items = deque()
        self._room = threading.Semaphore(size)
        self._room_for_brought = threading.Semaphore(MAX_BROUGHT)  # whole files
        self._is_stopped = self._is_read = False
        threading.Thread(target=self._fill, args=(iterator,), daemon=True).start()

    @property
    def has_ready(self) -> bool:
        return bool(self._items)

    @property
    def is_exhausted(self) -> bool:
        return self._is_read and not self._items

    def get(self) -> Candidate:
        """The next item; one must be ready."""
        item = self._items.popleft()
        self._room_of(item).release()
        return item

    def stop(self):
        """Let the thread end at its next item."""
        self._is_stopped = True
        self._room.release()
        self._room_for_brought.release()

    def _room_of(self, item):
        return self._room if item.image is None else self._room_for_brought

    def _fill(self, iterator):
        try:
            for item in iterator:
                self._room_of(item).acquire()
                if self._is_stopped:
                    return
                self._items.append(item)
                self._tell()
        except Exception as error:
            self.error = error
        self._is_read = True
        self._tell()

    def _tell(self):
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed: the run is over
            self._is_stopped = True
