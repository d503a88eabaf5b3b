"""What retrieval asks for and refuses, whatever a server offers."""

import io
import json
import sys

import pytest
import retrieval_server
from PIL import Image
from retrieval_server import RetrievalServer
from tiny import make_pictures

import retrieve
from custom_diffusion.class_folder import CAPTIONS, PATHS, URLS, read_class_folder
from custom_diffusion.retrieval import pictures
from custom_diffusion.retrieval.pictures import Rejected, to_class_image
from custom_diffusion.tools.merge import regularisation_captions

# Whatever str.splitlines cuts at.
SEPARATORS = [chr(c) for c in range(sys.maxunicode + 1) if len(f"a{chr(c)}b".splitlines()) > 1]


class Handler(retrieval_server.Handler):
    """Keeps the queries that it is asked."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.queries.append(json.loads(content))
        self.rfile, connection = io.BytesIO(content), self.rfile
        super().do_POST()
        self.rfile = connection


@pytest.fixture
def server():
    with RetrievalServer(num_rows=30) as server:
        server.RequestHandlerClass, server.queries = Handler, []
        yield server


def fill(server, folder, count):
    flags = {"client_url": server.url, "class_prompt": "cat", "class_data_dir": folder, "num_class_images": count}
    status = retrieve.main([f"--{name}={value}" for name, value in flags.items()])
    assert status == 0


def test_the_backend_is_asked_to_leave_out_duplicates_and_unsafe_images(server, tmp_path):
    fill(server, tmp_path / "class", 4)
    assert server.queries
    for query in server.queries:
        assert query["deduplicate"] is True
        assert query["use_safety_model"] is True
        assert query["use_violence_detector"] is True
        assert (query["text"], query["modality"], query["indice_name"]) == ("cat", "image", "laion_400m")


def test_a_caption_stays_one_line_with_any_separator_in_it(server, tmp_path):
    assert "\u2028" in SEPARATORS and "\u2029" in SEPARATORS
    for row, separator in zip(server.rows, SEPARATORS, strict=False):
        row["caption"] = f"a cat{separator}on a mat"
    fill(server, tmp_path / "class", len(server.rows))
    lists = [(tmp_path / "class" / name).read_text(encoding="utf-8").splitlines() for name in (PATHS, CAPTIONS, URLS)]
    assert [len(lines) for lines in lists] == [len(server.rows)] * 3
    captions = [caption for _, caption in read_class_folder(tmp_path / "class")]
    assert captions == lists[1]
    assert captions.count("a cat on a mat") == len(SEPARATORS) < len(server.rows)


OF_ONE_LINE = [separator for separator in SEPARATORS if separator not in "\r\n"]


def test_a_caption_of_a_users_own_folder_may_have_separators_in_it(tmp_path):
    captions = [f"a cat{separator}on a mat" for separator in OF_ONE_LINE]
    assert {"\u2028", "\u2029", "\x0b", "\x0c", "\x85"} < set(OF_ONE_LINE)
    make_pictures(tmp_path / "images", len(captions))
    (tmp_path / PATHS).write_text("".join(f"images/{number}.jpg\n" for number in range(len(captions))))
    (tmp_path / CAPTIONS).write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    assert [caption for _, caption in read_class_folder(tmp_path)] == captions
    assert regularisation_captions([], [tmp_path], max_captions=100) == captions


def encoded(width, height):
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # which Pillow leaves at a warning
def test_an_image_of_too_many_pixels_is_not_decoded():
    with pytest.raises(Rejected, match="more pixels than allowed"):
        to_class_image(encoded(12_500, 8_001), min_size=1)


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 64 * 48)
    to_class_image(encoded(64, 48), min_size=1)
    for size in ((65, 48), (64, 49)):
        with pytest.raises(Rejected, match="more pixels than allowed"):
            to_class_image(encoded(*size), min_size=1)
