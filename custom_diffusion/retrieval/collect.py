"""Turn a source's candidates into class images until there are enough."""

import asyncio
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from custom_diffusion.retrieval.candidates import Candidate, is_web_url
from custom_diffusion.retrieval.download import Downloader
from custom_diffusion.retrieval.pictures import Rejected, to_class_image
from custom_diffusion.retrieval.writer import ClassFolder

PROGRESS_SECONDS = 0.2
SPARE_DOWNLOADS = 4  # beyond two for each picture still missing, so that slow hosts do not hold up the last ones


class Collector:
    """Fills one class folder from one source after another.

    Args:
        folder: an open class folder.
        num_class_images: when to stop.
        min_size: least shorter side, pixels.
        num_workers: downloads at a time.
        timeout: seconds for one download.
        allow_private: whether addresses on private networks may be asked.
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

    def run(self, candidates: Iterator[Candidate], description: str, progress: Callable[[], dict]):
        """Take candidates until nothing is missing or none are left.

        Args:
            candidates: of the source.
            description: of the progress bar.
            progress: called a few times a second, never while an image is being kept; what more the bar is to show.
        Raises:
            SourceError: the source failed on the way; what was found before is kept.
        """
        with tqdm(total=self.num_class_images, initial=len(self.folder.rows), desc=description, unit="image") as bar:
            asyncio.run(self._run(candidates, bar, progress))
            self._show(bar, progress)

    def _show(self, bar, progress):
        bar.n = len(self.folder.rows)
        bar.set_postfix(progress() | {"tried": self.num_tried, "kept": bar.n}, refresh=True)

    async def _keep_showing(self, bar, progress):
        while True:
            self._show(bar, progress)
            await asyncio.sleep(PROGRESS_SECONDS)

    async def _run(self, candidates, bar, progress):
        queue = _CandidateQueue(filter(self._is_new, candidates), size=2 * self.num_workers)
        pool = ThreadPoolExecutor(os.cpu_count() or 1)  # Pillow lets go of the interpreter lock while it decodes
        running, number = set(), 0
        self._turn = asyncio.Lock()  # one for each event loop
        showing = asyncio.ensure_future(self._keep_showing(bar, progress))
        try:
            async with Downloader(self.timeout, self.num_workers) as downloader:
                while self.num_missing:
                    limit = min(self.num_workers, 2 * self.num_missing + SPARE_DOWNLOADS)
                    while len(running) < limit and (candidate := await queue.get(wait=not running)) is not None:
                        number += 1
                        running.add(asyncio.ensure_future(self._attempt(number, candidate, downloader, pool)))
                    if not running:
                        break
                    done, running = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                    for _, candidate, outcome in sorted((task.result() for task in done), key=lambda result: result[0]):
                        self._take(candidate, outcome)
                if self.num_missing and queue.error is not None:
                    raise queue.error
        finally:
            running.add(showing)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            pool.shutdown(wait=False, cancel_futures=True)
            queue.stop()

    def _is_new(self, candidate):
        if candidate.url in self.folder.tried or candidate.url in self._attempted:
            return False
        self._attempted.add(candidate.url)
        return candidate.picture is not None or is_web_url(candidate.url)

    async def _attempt(self, number, candidate, downloader, pool):
        """(number, candidate, (JPEG, fingerprints) or Rejected)."""
        try:
            if candidate.picture is None:
                return number, candidate, await self._decode(await downloader.fetch(candidate.url), pool)
            # Without a network there is no reason for the result to depend on timing: one after another.
            async with self._turn:
                return number, candidate, await self._decode(candidate.picture, pool)
        except Rejected as rejected:
            return number, candidate, rejected

    async def _decode(self, encoded, pool):
        """(JPEG, fingerprints of file and pixels)."""
        file_hash = hashlib.sha256(encoded).hexdigest()
        if file_hash in self.folder.fingerprints:
            raise Rejected("duplicate")
        jpeg, pixels = await asyncio.get_running_loop().run_in_executor(pool, to_class_image, encoded, self.min_size)
        return jpeg, (file_hash, pixels)

    def _take(self, candidate, outcome):
        """Keep a finished candidate or turn it down."""
        self.num_tried += 1
        if not isinstance(outcome, Rejected) and not self.num_missing:
            return
        if not isinstance(outcome, Rejected) and not self.folder.fingerprints.isdisjoint(outcome[1]):
            outcome = Rejected("duplicate")  # of one that was in flight at the same time
        if isinstance(outcome, Rejected):
            self.reasons[str(outcome)] += 1
            if outcome.lasting:
                self.folder.turn_down(candidate.url, str(outcome))
            else:
                self.num_temporary += 1
        else:
            jpeg, fingerprints = outcome
            self.folder.add(jpeg, candidate.caption, candidate.url, fingerprints)


class _CandidateQueue:
    """Runs a blocking iterator in a thread, a few items ahead.

    A daemon thread and not an executor: a source that hangs must not hold up the end of the program.
    """

    def __init__(self, iterator, size):
        self.error = None
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue()
        self._room = threading.Semaphore(size)
        self._stopped = self._exhausted = False
        threading.Thread(target=self._fill, args=(iterator,), daemon=True).start()

    def _fill(self, iterator):
        try:
            for item in iterator:
                self._room.acquire()
                if self._stopped:
                    return
                self._put(item)
        except Exception as error:
            self.error = error
        self._put(None)

    def _put(self, item):
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: the run is over
            self._stopped = True

    async def get(self, wait: bool):
        """The next item; None at the end, or when none is ready and `wait` is False."""
        if self._exhausted:
            return None
        try:
            item = await self._queue.get() if wait else self._queue.get_nowait()
        except asyncio.QueueEmpty:
            return None
        self._room.release()
        self._exhausted = item is None
        return item

    def stop(self):
        """Let the thread end at its next item."""
        self._stopped = True
        self._room.release()
