"""A published set on this machine: downloaded, imported, verified, and never half there."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from neurocl.data import install
from neurocl.data.sources import SOURCES, Source
from neurocl.errors import RunError, UserError

if TYPE_CHECKING:
    from tests.data.conftest import Site

Register = Callable[..., Source]


def tar_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, body in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return stream.getvalue()


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


def serve(site: Site, register: Register, body: bytes, name: str = "toy.bin", **options: object) -> None:
    site.files[f"/{name}"] = body
    register(site.register_file(body, name, **options))


def test_a_download_ends_with_data_manifest_and_record(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, b"pixels")
    folder = install.download("toy", data_dir=tmp_path)
    base = tmp_path / "toy" / "1"
    assert folder == base / "data"
    assert (folder / "toy.bin").read_bytes() == b"pixels"
    digest = hashlib.sha256(b"pixels").hexdigest()
    assert (base / "MANIFEST.sha256").read_text() == f"{digest}  data/toy.bin\n"
    record = json.loads((base / "COMPLETE.json").read_text())
    assert record["files"][0]["digest"] == f"sha256:{digest}"
    assert record["files"][0]["urls"] == [f"{site.url}/toy.bin"]
    assert not (base / "archives").exists()


def test_a_second_download_contacts_nobody(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, b"pixels")
    install.download("toy", data_dir=tmp_path)
    install.download("toy", data_dir=tmp_path)
    assert len(site.requests) == 1


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_archives_are_unpacked_and_kept_on_request(
    site: Site, register: Register, tmp_path: Path, pack: Callable[..., bytes]
) -> None:
    kind = "tar" if pack is tar_of else "zip"
    serve(site, register, pack(**{"batch/one.bin": b"1", "two.bin": b"22"}), unpack=kind)
    folder = install.download("toy", data_dir=tmp_path, keep_archives=True)
    assert (folder / "batch" / "one.bin").read_bytes() == b"1"
    assert (folder / "two.bin").read_bytes() == b"22"
    assert (tmp_path / "toy" / "1" / "archives" / "toy.bin").is_file()


def evil_link() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("shortcut")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return stream.getvalue()


def evil_zip_link() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entry = zipfile.ZipInfo("shortcut")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return stream.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        tar_of(**{"good.txt": b"1", "../escaped.txt": b"2"}),
        tar_of(**{"/tmp/escaped.txt": b"2"}),
        zip_of(**{"good.txt": b"1", "/tmp/escaped.txt": b"2"}),
        zip_of(**{"a/../../escaped.txt": b"2"}),
        zip_of(**{"C:\\escaped.txt": b"2"}),
        evil_link(),
        evil_zip_link(),
    ],
    ids=["tar ..", "tar absolute", "zip absolute", "zip ..", "zip drive", "tar link", "zip link"],
)
def test_an_archive_that_reaches_outside_its_folder_is_refused_as_a_whole(
    site: Site, register: Register, tmp_path: Path, archive: bytes
) -> None:
    serve(site, register, archive, unpack="tar")
    with pytest.raises(RunError, match="nothing was unpacked"):
        install.download("toy", data_dir=tmp_path / "root")
    left = {path.name for path in (tmp_path / "root" / "toy" / "1").iterdir()}
    assert left <= {"archives", ".lock"}
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_damaged_archive_is_refused(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, tar_of(a=b"x" * 5000)[:-30], unpack="tar")
    with pytest.raises(RunError, match="damaged archive"):
        install.download("toy", data_dir=tmp_path)
    assert not (tmp_path / "toy" / "1" / "data").exists()


def test_a_wrong_body_never_becomes_a_data_set(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, b"pixels")
    site.files["/toy.bin"] = b"pixelz"
    with pytest.raises(RunError, match="not the registered file"):
        install.download("toy", data_dir=tmp_path)
    assert install.state("toy", data_dir=tmp_path)[0] == "partial"
    site.files["/toy.bin"] = b"pixels"
    assert (install.download("toy", data_dir=tmp_path) / "toy.bin").read_bytes() == b"pixels"


def test_two_processes_download_once(site: Site, register: Register, tmp_path: Path) -> None:
    body = b"x" * 200_000
    serve(site, register, body)
    digest = hashlib.sha256(body).hexdigest()
    script = f"""
from neurocl.data import install
from neurocl.data.sources import SOURCES, RemoteFile, Source
file = RemoteFile("toy.bin", ("{site.url}/toy.bin",), {len(body)}, "sha256:{digest}")
SOURCES["toy"] = Source("toy", "1", (file,), 1000, 10, "", "", ("toy",), ("toy.bin",))
print(install.download("toy", data_dir={str(tmp_path)!r}))
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert answers == {str(tmp_path / "toy" / "1" / "data")}
    assert len(site.requests) == 1


def test_a_full_disk_is_reported_before_the_first_byte(
    site: Site, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/toy.bin"] = b"pixels"
    register(site.register_file(b"pixels"), disk_bytes=1_000_000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 600_000, 600_000))
    with pytest.raises(RunError, match="600,000 bytes free, toy needs 1,100,000: 500,000 are missing"):
        install.download("toy", data_dir=tmp_path)
    assert site.requests == []


def test_a_plan_opens_no_socket_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    files = install.plan("seq-mnist", data_dir=tmp_path, mirror=1)
    assert sum(file.num_bytes or 0 for file in files) == 11_594_722
    assert all(file.url.startswith("https://storage.googleapis.com/cvdf-datasets/mnist/") for file in files)
    assert list(tmp_path.iterdir()) == []


def test_verify_finds_a_flipped_bit_and_a_lost_file(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, zip_of(a=b"pixels", b=b"labels"), unpack="zip")
    folder = install.download("toy", data_dir=tmp_path)
    assert install.verify("toy", data_dir=tmp_path) == 2
    (folder / "a").write_bytes(b"pixelr")
    with pytest.raises(RunError, match=r"data/a: its sha256 is no longer"):
        install.verify("toy", data_dir=tmp_path)
    (folder / "a").unlink()
    with pytest.raises(RunError, match=r"data/a: missing"):
        install.verify("toy", data_dir=tmp_path)


def test_verify_needs_an_installed_set(site: Site, register: Register, tmp_path: Path) -> None:
    serve(site, register, b"pixels")
    with pytest.raises(UserError, match="type: neurocl data download toy"):
        install.verify("toy", data_dir=tmp_path)


def test_import_accepts_a_folder_and_an_archive_under_any_name(site: Site, register: Register, tmp_path: Path) -> None:
    body = zip_of(a=b"pixels")
    register(site.register_file(body, "toy.zip", unpack="zip"))
    given = tmp_path / "given"
    given.mkdir()
    (given / "toy.zip").write_bytes(body)
    folder = install.import_files("toy", given, data_dir=tmp_path / "one")
    assert (folder / "a").read_bytes() == b"pixels"
    renamed = given / "downloads (3)"
    renamed.write_bytes(body)
    assert (install.import_files("toy", renamed, data_dir=tmp_path / "two") / "a").read_bytes() == b"pixels"
    assert renamed.read_bytes() == body
    assert site.requests == []


def test_import_refuses_a_file_with_another_digest(site: Site, register: Register, tmp_path: Path) -> None:
    register(site.register_file(b"pixels"))
    (tmp_path / "toy.bin").write_bytes(b"pixelz")
    for given in (tmp_path, tmp_path / "toy.bin"):
        with pytest.raises(UserError, match=hashlib.sha256(b"pixels").hexdigest()):
            install.import_files("toy", given, data_dir=tmp_path / "root")
    assert install.state("toy", data_dir=tmp_path / "root") == ("absent", None)


def test_import_takes_several_files_one_after_the_other(site: Site, register: Register, tmp_path: Path) -> None:
    register(site.register_file(b"one", "one.bin"), site.register_file(b"two", "two.bin"))
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(UserError, match=r"not complete yet, import also: two\.bin"):
        install.import_files("toy", tmp_path / "one", data_dir=tmp_path)
    folder = install.import_files("toy", tmp_path / "two", data_dir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["one.bin", "two.bin"]


def test_import_accepts_content_that_was_compressed_again(site: Site, register: Register, tmp_path: Path) -> None:
    content = b"pixels" * 100
    md5 = hashlib.md5(content).hexdigest()
    register(site.register_file(gzip.compress(content, 9, mtime=0), "toy.gz", content_md5=md5))
    (tmp_path / "toy.gz").write_bytes(gzip.compress(content, 1, mtime=0))
    folder = install.import_files("toy", tmp_path / "toy.gz", data_dir=tmp_path / "one")
    assert gzip.decompress((folder / "toy.gz").read_bytes()) == content
    (tmp_path / "toy").write_bytes(content)
    folder = install.import_files("toy", tmp_path / "toy", data_dir=tmp_path / "two")
    assert (folder / "toy").read_bytes() == content


def test_the_real_mnist_files_are_recognised_by_their_content(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = install.import_files("mnist", real_data("mnist"), data_dir=tmp_path)
    assert install.state("mnist", data_dir=tmp_path) == ("complete", folder)
    assert install.verify("mnist", data_dir=tmp_path) == 4


def test_every_registered_address_has_a_digest_and_every_http_one_too() -> None:
    lengths = {"sha256": 64, "md5": 32}
    for source in SOURCES.values():
        for file in source.files:
            algorithm, _, value = file.digest.partition(":")
            assert len(value) == lengths[algorithm]
            assert int(value, 16) > 0


def test_a_set_without_a_public_address_asks_for_an_import(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neurocl data import eurosat PATH"):
        install.download("eurosat", data_dir=tmp_path)


def test_a_mirror_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mirror must be 0 to 1 for mnist, got 2"):
        install.download("mnist", data_dir=tmp_path, mirror=2)


def test_a_name_is_looked_up_with_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'kmnist'"):
        install.plan("kmnis")
