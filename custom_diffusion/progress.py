"""Progress bars that can be read on a terminal and in a log."""

import os
import sys

from tqdm.auto import tqdm

LOG_SECONDS = 10  # between two lines of a log; the environment's TQDM_MININTERVAL overrides it


class ProgressBar(tqdm):
    """tqdm's bar on a terminal; elsewhere a line now and then, without carriage returns. Arguments as tqdm's."""

    def __init__(self, *args, **kwargs):
        if not sys.stderr.isatty():
            seconds = float(os.environ.get("TQDM_MININTERVAL", LOG_SECONDS))
            kwargs = {"mininterval": seconds, "maxinterval": max(seconds, LOG_SECONDS), "ncols": 120} | kwargs
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        counts = [""]  # said last

        def print_line(text):
            count = text.partition("[")[0]  # closing a bar shows it once more, with other times
            if count.strip() and count != counts[0]:
                file.write(text.rstrip() + "\n")
                file.flush()
            counts[0] = count

        return print_line
