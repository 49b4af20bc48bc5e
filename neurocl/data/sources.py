"""The sets that can be fetched or imported: addresses, sizes, digests, licences, signs of presence.

Sizes and sha256 digests are those that tensorflow-datasets 4.9.10 registers, md5 digests those of torchvision
0.29.2 and tonic 1.7.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neurocl.data.idx import IDX_STEMS
from neurocl.data.locate import find_file
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

_DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class RemoteFile:
    """One file as it is published.

    Attributes:
        name: the name it gets on disk.
        urls: its address, then mirrors; empty for files that can only be imported.
        num_bytes: its exact size, None where no source publishes it.
        digest: ``"sha256:..."`` or ``"md5:..."`` of the file.
        content_md5: md5 of the uncompressed content, for copies that were compressed again.
        unpack: whether it is an archive to be unpacked.
    """

    name: str
    urls: tuple[str, ...]
    num_bytes: int | None
    digest: str
    content_md5: str | None = None
    unpack: Literal["none", "tar", "zip"] = "none"


@dataclass(frozen=True)
class Source:
    """One data set as it is published.

    Attributes:
        name: what the user types, also the name of its folder.
        version: the folder below, raised when the published files change.
        files: what is fetched.
        disk_bytes: room that archives and unpacked files take together (an estimate for archives).
        num_classes: number of classes.
        licence: the terms of the data.
        citation: whom to cite.
        folders: names that a folder with the set may have.
        signs: files or folders whose presence shows that the set is there, best first.
        extra: places outside the data folders that may hold the set.
    """

    name: str
    version: str
    files: tuple[RemoteFile, ...]
    disk_bytes: int
    num_classes: int
    licence: str
    citation: str
    folders: tuple[str, ...]
    signs: tuple[str, ...]
    extra: tuple[Path, ...] = ()

    @property
    def downloadable(self) -> bool:
        return all(file.urls for file in self.files)


def find_source(name: str) -> Source:
    """The source of that name; a benchmark's name (``seq-mnist``) stands for its data.

    Raises:
        UserError: unknown name.
    """
    if name in SOURCES:
        return SOURCES[name]
    if name.removeprefix("seq-") in SOURCES:
        return SOURCES[name.removeprefix("seq-")]
    raise UserError(f"no data set {name!r} to fetch{did_you_mean(name, SOURCES)} (choose from {', '.join(SOURCES)})")


def locate_source(name: str, data_dir: Path | None = None) -> Path | None:
    """The file or folder that shows the set is on this machine, or None."""
    source = SOURCES[name]
    return find_file(source.folders, source.signs, data_dir, source.extra)


def _idx_files(bases: tuple[str, ...], rows: tuple[tuple[int, str, str | None], ...]) -> tuple[RemoteFile, ...]:
    names = [f"{stem}.gz" for stem in IDX_STEMS.values()]
    return tuple(
        RemoteFile(name, tuple(base + name for base in bases), num_bytes, f"sha256:{sha256}", content_md5)
        for name, (num_bytes, sha256, content_md5) in zip(names, rows, strict=True)
    )


# the last of the four files: a folder with the images only is not taken for the set
_IDX_SIGNS = (f"{IDX_STEMS['test', 'labels']}.gz", IDX_STEMS["test", "labels"])

_MNIST = Source(
    name="mnist",
    version="1",
    files=_idx_files(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        (
            (
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "6bbc9ace898e44ae57da46a324031adb",
            ),
            (
                28_881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "a25bea736e30d166cdddb491f175f624",
            ),
            (
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "2646ac647ad5339dbf082846283269ea",
            ),
            (
                4_542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                "27ae3e4e09519cfbb04c329615203637",
            ),
        ),
    ),
    disk_bytes=11_594_722,
    num_classes=10,
    licence="CC BY-SA 3.0",
    citation="LeCun, Cortes, Burges, The MNIST database of handwritten digits",
    folders=("mnist",),
    signs=_IDX_SIGNS,
)

_FASHION_MNIST = Source(
    name="fashion-mnist",
    version="1",
    files=_idx_files(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            (
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            ),
            (
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "9018921c3c673c538a1fc5bad174d6f9",
            ),
            (
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "8181f5470baa50b63fa0f6fddb340f0a",
            ),
            (
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                "15d484375f8d13e6eb1aabb0c3f46965",
            ),
        ),
    ),
    disk_bytes=30_878_645,
    num_classes=10,
    licence="MIT",
    citation="Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017",
    folders=("fashion-mnist",),
    signs=_IDX_SIGNS,
    extra=(_DEBIAN_FASHION,),
)

_KMNIST = Source(
    name="kmnist",
    version="1",
    files=_idx_files(
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        (
            (18_165_135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4", None),
            (29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17", None),
            (3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5", None),
            (5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c", None),
        ),
    ),
    disk_bytes=21_240_888,
    num_classes=10,
    licence="CC BY-SA 4.0",
    citation="Clanuwat et al., Deep learning for classical Japanese literature, 2018",
    folders=("kmnist",),
    signs=_IDX_SIGNS,
)

_CIFAR10 = Source(
    name="cifar10",
    version="1",
    files=(
        RemoteFile(
            "cifar-10-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
            170_052_171,
            "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            unpack="tar",
        ),
    ),
    disk_bytes=354_432_171,
    num_classes=10,
    licence="none stated; free for research",
    citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    folders=("cifar10", "cifar-10-batches-bin"),
    signs=("cifar-10-batches-bin/test_batch.bin", "test_batch.bin", "cifar10.npz"),
)

_CIFAR100 = Source(
    name="cifar100",
    version="1",
    files=(
        RemoteFile(
            "cifar-100-binary.tar.gz",
            ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
            168_513_733,
            "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            unpack="tar",
        ),
    ),
    disk_bytes=352_953_733,
    num_classes=100,
    licence="none stated; free for research",
    citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    folders=("cifar100", "cifar-100-binary"),
    signs=("cifar-100-binary/test.bin", "test.bin"),
)

_MENDELEY_NMNIST = "https://data.mendeley.com/public-files/datasets/468j46mzdv/files/"

_NMNIST = Source(
    name="nmnist",
    version="1",
    files=(
        RemoteFile(
            "Train.zip",
            (_MENDELEY_NMNIST + "39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded",),
            None,
            "md5:20959b8e626244a1b502305a9e6e2031",
            unpack="zip",
        ),
        RemoteFile(
            "Test.zip",
            (_MENDELEY_NMNIST + "05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded",),
            None,
            "md5:69ca8762b2fe404d9b9bad1103e97832",
            unpack="zip",
        ),
    ),
    disk_bytes=3_000_000_000,
    num_classes=10,
    licence="CC BY-SA 4.0",
    citation="Orchard et al., Converting static image datasets to spiking neuromorphic datasets, 2015",
    folders=("nmnist", "nmnist-small"),
    signs=("Test", "nmnist.npz", "nmnist_small.npz"),
)

_EUROSAT = Source(
    name="eurosat",
    version="1",
    files=(
        RemoteFile(
            "eurosat64.npz",
            (),
            2_869_039,
            "sha256:6d40e46a86d37a4652e9685b84e84a595f8154751a9ce1380a942de69526ff9d",
        ),
    ),
    disk_bytes=2_869_039,
    num_classes=10,
    licence="MIT",
    citation="Helber et al., EuroSAT, 2019",
    folders=("eurosat",),
    signs=("eurosat64.npz",),
)

_TINY_IMAGENET_100 = Source(
    name="tiny-imagenet-100",
    version="1",
    files=(
        RemoteFile(
            "tiny_imagenet_100.npz",
            (),
            16_071_165,
            "sha256:57db79c86010ef3954927b4b7499eeacb406d446d9e8d98a3c9bf6eb2739c6b1",
        ),
    ),
    disk_bytes=16_071_165,
    num_classes=100,
    licence="ImageNet terms (non-commercial research and education)",
    citation="Le, Yang, Tiny ImageNet visual recognition challenge, 2015",
    folders=("tiny-imagenet-100",),
    signs=("tiny_imagenet_100.npz",),
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        _MNIST,
        _FASHION_MNIST,
        _KMNIST,
        _CIFAR10,
        _CIFAR100,
        _NMNIST,
        _EUROSAT,
        _TINY_IMAGENET_100,
    )
}
