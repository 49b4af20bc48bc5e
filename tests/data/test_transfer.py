"""One file over http: resume, restart, retry, mirrors, and refusal of what is not the registered file."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from neurocl.data.transfer import fetch
from neurocl.errors import RunError

if TYPE_CHECKING:
    from tests.data.conftest import Site

BODY = np.random.default_rng(0).bytes(700_000)


def test_a_whole_file_arrives_with_its_digest_and_leaves_nothing_else(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"] = BODY
    seen: list[tuple[int, int | None]] = []
    path = fetch(site.register_file(BODY), tmp_path, source="toy", progress=lambda *counts: seen.append(counts))
    assert path.read_bytes() == BODY
    assert [entry.name for entry in tmp_path.iterdir()] == ["toy.bin"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert site.requests[0][1]["Accept-Encoding"] == "identity"


def test_a_cut_download_resumes_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"], site.cuts = BODY, [400_000]
    path = fetch(site.register_file(BODY), tmp_path, source="toy")
    assert path.read_bytes() == BODY
    first, second = (headers for _, headers in site.requests)
    assert "Range" not in first
    assert second["If-Range"] == '"one"'
    assert 0 < int(second["Range"].removeprefix("bytes=").removesuffix("-")) <= 400_000


def test_a_second_call_resumes_what_the_first_had_to_give_up(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"], site.cuts = BODY, [300_000, 1, 1, 1, 1, 1]
    with pytest.raises(RunError, match=r"toy\.bin could not be fetched.*neurocl data import toy PATH"):
        fetch(site.register_file(BODY), tmp_path, source="toy")
    assert len(site.requests) == 6
    kept = (tmp_path / "toy.bin.part").read_bytes()
    assert kept
    assert BODY.startswith(kept)
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY
    assert site.requests[-1][1]["Range"] == f"bytes={len(kept)}-"


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"], site.cuts, site.ranges = BODY, [400_000], False
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY


def test_a_file_that_changed_between_calls_starts_over(site: Site, tmp_path: Path) -> None:
    file = site.register_file(BODY)
    (tmp_path / "toy.bin.part").write_bytes(b"old" * 1000)
    (tmp_path / "toy.bin.part.etag").write_text('"zero"')
    site.files["/toy.bin"] = BODY
    assert fetch(file, tmp_path, source="toy").read_bytes() == BODY
    assert site.requests[0][1]["If-Range"] == '"zero"'


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.files["/toy.bin"], site.cuts, site.etag = BODY, [400_000], etag
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY
    assert all("Range" not in headers for _, headers in site.requests)


def test_a_complete_part_goes_on_to_verification_without_a_request(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.bin.part").write_bytes(BODY)
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY
    assert site.requests == []


def test_a_complete_part_of_unregistered_size_is_told_by_416(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"] = BODY
    (tmp_path / "toy.bin.part").write_bytes(BODY)
    (tmp_path / "toy.bin.part.etag").write_text('"one"')
    assert fetch(site.register_file(BODY, num_bytes=None), tmp_path, source="toy").read_bytes() == BODY
    assert len(site.requests) == 1


def test_a_part_longer_than_the_file_is_thrown_away(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"] = BODY
    (tmp_path / "toy.bin.part").write_bytes(BODY + b"more")
    (tmp_path / "toy.bin.part.etag").write_text('"one"')
    assert fetch(site.register_file(BODY, num_bytes=None), tmp_path, source="toy").read_bytes() == BODY


def test_a_wrong_body_of_the_right_size_is_kept_as_bad_and_never_replaces_a_file(site: Site, tmp_path: Path) -> None:
    old = b"what was there before"
    (tmp_path / "toy.bin").write_bytes(old)
    site.files["/toy.bin"] = bytes(len(BODY))
    with pytest.raises(RunError, match=r"sha256 of its 700,000 bytes is \w+, expected \w+; kept as .*bad"):
        fetch(site.register_file(BODY), tmp_path, source="toy")
    assert (tmp_path / "toy.bin").read_bytes() == old
    assert (tmp_path / "toy.bin.bad").read_bytes() == bytes(len(BODY))
    assert not (tmp_path / "toy.bin.part").exists()


def test_a_good_file_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "toy.bin").write_bytes(BODY)
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY
    assert site.requests == []


def test_an_md5_verifies_where_no_sha256_is_published(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"] = b"abc"
    file = site.register_file(b"abc", digest="md5:900150983cd24fb0d6963f7d28e17f72")
    assert fetch(file, tmp_path, source="toy").read_bytes() == b"abc"


def test_an_address_that_offers_another_size_is_left_before_a_byte_is_written(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"] = BODY + b"!"
    with pytest.raises(RunError, match="offers 700,001 bytes, 700,000 are registered"):
        fetch(site.register_file(BODY), tmp_path, source="toy")
    assert not (tmp_path / "toy.bin.part").exists()


def test_404_goes_to_the_mirror_at_once(site: Site, tmp_path: Path) -> None:
    site.files["/mirror/toy.bin"] = BODY
    file = site.register_file(BODY, urls=(f"{site.url}/gone.bin", f"{site.url}/mirror/toy.bin"))
    assert fetch(file, tmp_path, source="toy").read_bytes() == BODY
    assert [path for path, _ in site.requests] == ["/gone.bin", "/mirror/toy.bin"]


def test_the_chosen_mirror_is_asked_first(site: Site, tmp_path: Path) -> None:
    site.files["/b"] = BODY
    fetch(site.register_file(BODY, urls=(f"{site.url}/a", f"{site.url}/b")), tmp_path, source="toy", mirror=1)
    assert [path for path, _ in site.requests] == ["/b"]


def test_503_is_retried_until_it_ends(site: Site, tmp_path: Path) -> None:
    site.files["/toy.bin"], site.statuses = BODY, [503, 503]
    assert fetch(site.register_file(BODY), tmp_path, source="toy").read_bytes() == BODY
    assert len(site.requests) == 3


def test_an_unreachable_host_is_named_with_the_import_command(tmp_path: Path, site: Site) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    file = site.register_file(BODY, urls=(f"http://127.0.0.1:{port}/toy.bin",))
    with pytest.raises(RunError, match=rf"127\.0\.0\.1:{port}: connection failed.*700,000 bytes, sha256:"):
        fetch(file, tmp_path, source="toy")
