"""Features of pictures for FID, KID and frame consistency: one vector a picture, from a network by name or path.

    inception           Inception v3 as FID was defined with, 2048 features, from torch-fidelity through torchmetrics
    scene-recogniser    the project's own net for 64x64 scenes, 256 features: an offline stand-in, not Inception
    anything else       a folder or Hub id of a transformers model that has an image processor (CLIP, DINOv2, ...)

`python -m eval.features FOLDER OUT.npz [--network NAME]` keeps the statistics of a folder of pictures: `mu` (d,) and
`sigma` (d, d) as published files have them, with `count` and `network` beside.
"""

import argparse
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dq.disk import write
from dq.errors import DQError
from eval import reading
from pipelines import tiny

INCEPTION, RECOGNISER, TINY_CLIP = "inception", "scene-recogniser", "tiny-clip"
CLIP = "openai/clip-vit-large-patch14"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SCENES, SCENES_FROM = 1000, 1_900_000_000  # renders that stand for real pictures; no prompt or training scene is there
MOST_STATISTICS = 2**30  # bytes
CHUNK = 32  # pictures that go through a network at once


@dataclass(frozen=True)
class Network:
    """name: as figures are labelled; of: pictures (N, 3, height, width) in [0, 1] -> vectors (N, d)."""

    name: str
    of: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Vectors (N, d) of pictures, float64 on the CPU."""
        return torch.cat([self.of(part.float()).double().cpu() for part in images.split(CHUNK)])


@dataclass(frozen=True)
class Statistics:
    """mean (d,), unbiased covariance (d, d) of `count` vectors; count, network: None where a file does not say."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None
    network: str | None = None

    @classmethod
    def of(cls, features: torch.Tensor, network: str | None = None) -> "Statistics":
        """Statistics of features (N, d); DQError for fewer than two pictures."""
        if features.ndim != 2 or len(features) < 2:
            raise DQError(f"a covariance needs features (2 or more, d), got {tuple(features.shape)}")
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).reshape(2 * features.shape[1:]), len(features), network)

    def save(self, path: str | Path) -> None:
        """Write the file; DQError when that cannot be done."""
        given = {"count": self.count, "network": self.network}
        known = {key: np.asarray(value) for key, value in given.items() if value is not None}

        def save(fresh: Path) -> None:
            with fresh.open("wb") as file:
                np.savez(file, mu=self.mean.numpy(), sigma=self.covariance.numpy(), **known)

        write(Path(path), save)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Statistics of a file; DQError when it holds none."""
        try:
            data = _arrays(Path(path))
            mean, covariance = (torch.from_numpy(data[key].astype(np.float64)) for key in ("mu", "sigma"))
            count, network = (data[key].item() if key in data else None for key in ("count", "network"))
            count = None if count is None else int(count)
        except Exception as error:  # of whatever the bytes were taken for
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DQError(f"statistics {str(path)!r} cannot be read: {reason}; expected .npz with mu, sigma") from None
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
            raise DQError(f"statistics {str(path)!r}: mu and sigma are {shapes}, expected (d,) and (d, d)")
        if not (mean.isfinite().all() and covariance.isfinite().all()) or (count is not None and count < 2):
            raise DQError(f"statistics {str(path)!r} hold NaN, infinity or a count below 2; make them anew")
        return cls(mean, covariance, count, network)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; ValueError for one that would need more than MOST_STATISTICS bytes."""
    with zipfile.ZipFile(path) as file:
        size = sum(item.file_size for item in file.infolist())
        for item in file.infolist():
            with file.open(item) as head:
                version = np.lib.format.read_magic(head)
                read = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(head)
            size = max(size, math.prod(shape) * dtype.itemsize)
    if size > MOST_STATISTICS:
        raise ValueError(f"it says it holds {size} bytes, expected at most {MOST_STATISTICS}")
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@cache
def network(name: str, fetch: bool = True) -> Network:
    """The network of that name. fetch: whether a Hub id may be downloaded. DQError tells why it cannot be had."""
    if name == INCEPTION:
        return Network(name, _inception())
    if name == RECOGNISER:
        return Network(name, _recogniser())
    return Network(label(name), _pretrained_features(name, fetch))


@cache
def why_not(name: str, fetch: bool = True) -> str | None:
    """Why a network cannot be had on this machine, None when it can."""
    try:
        network(name, fetch)
    except DQError as error:
        return str(error)
    return None


def label(name: str) -> str:
    """A network's name in figures: of a folder its last part."""
    return Path(name).name if Path(name).is_dir() else name


def pretrained(kind, name: str, fetch: bool = True):
    """`kind.from_pretrained` in fp32: embedded, a folder or a Hub id, from this machine first; or DQError."""
    place = tiny.folder(name) if name in tiny.JUDGES else name
    more = {} if "Processor" in kind.__name__ else {"dtype": torch.float32}
    for local in (True, False)[: 1 + (fetch and not Path(place).exists())]:  # asking the Hub takes a while offline
        try:
            loaded = kind.from_pretrained(place, local_files_only=local, **more)
        except Exception as error:  # of whatever the files were taken for
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        else:
            return loaded.eval().requires_grad_(False).to(device()) if isinstance(loaded, torch.nn.Module) else loaded
    if not fetch:
        reason = "it is not on this machine; name it in the suite to have it fetched"
    raise DQError(f"{kind.__name__} {name!r} cannot be had: {reason}")


def as_bytes(images: torch.Tensor) -> list[np.ndarray]:
    """Pictures (N, 3, height, width) in [0, 1] as image processors take them: uint8 (height, width, 3) each."""
    return list((images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def as_pictures(images: Iterable[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size -> (N, 3, height, width) float32 in [0, 1]; ValueError when sizes differ."""
    arrays = [np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def of_folder(folder: str | Path, name: str) -> torch.Tensor:
    """Features (N, d) of every picture in a folder and below it. DQError for no folder or no picture."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise DQError(f"{str(folder)!r} holds no picture, expected a folder of {', '.join(ENDINGS)} files")
    net = network(name)
    return torch.cat([net.features(as_pictures(part)) for part in _alike(paths)])


@cache
def of_real(real: str, name: str, objects: int | None = None) -> torch.Tensor | Statistics:
    """Features of real pictures: a folder, a .npz file of statistics, or `scenes`, renders of the scene grammar.

    objects: how many each render shows, if fixed. DQError when they cannot be read or are of another network.
    """
    if real == "scenes":
        return network(name).features(_renders(objects))
    if not real.endswith(".npz"):
        return of_folder(real, name)
    found = Statistics.load(real)
    if found.network not in (None, label(name)):
        raise DQError(f"statistics {real!r} are of {found.network}, expected {label(name)}; set fid: features")
    return found


def _renders(objects: int | None) -> torch.Tensor:
    from pipelines.tiny import recogniser, scenes

    drawn = [scenes.sample(SCENES_FROM + i, scenes.HELD_OUT, objects)[0] for i in range(SCENES)]
    return recogniser.as_tensor(scenes.render(drawn))


def _alike(paths: list[Path]) -> Iterator[list[Image.Image]]:
    """Pictures in file order, at most CHUNK at once, each group of one size."""
    group: list[Image.Image] = []
    for path in paths:
        image = reading.picture(path, "remove it")
        if group and (len(group) == CHUNK or group[0].size != image.size):
            yield group
            group = []
        group.append(image)
    yield group


def device() -> torch.device:
    """Where networks run that look at pictures."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _inception() -> Callable[[torch.Tensor], torch.Tensor]:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        net = FrechetInceptionDistance(2048).inception.to(device())
    except ModuleNotFoundError:
        raise DQError("Inception v3 needs torch-fidelity, not installed here") from None
    except OSError as error:  # no connection, no space
        raise DQError(f"the weights of Inception v3 cannot be fetched: {error}") from None
    return lambda images: net((images.clamp(0, 1) * 255).round().byte().to(device()))


def _recogniser() -> Callable[[torch.Tensor], torch.Tensor]:
    net = tiny.load_recogniser().to(device())

    def of(images):
        if images.shape[2:] != (64, 64):
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        return net.features(images.to(device()))

    return of


def _pretrained_features(name: str, fetch: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoImageProcessor, AutoModel

    net, processor = pretrained(AutoModel, name, fetch), pretrained(AutoImageProcessor, name, fetch)
    call = getattr(net, "get_image_features", net)  # of a model that also reads text

    def of(images):
        found = call(pixel_values=processor(as_bytes(images), return_tensors="pt")["pixel_values"].to(net.device))
        return found if torch.is_tensor(found) else found.pooler_output

    return of


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the statistics of a folder of pictures for FID.")
    parser.add_argument("folder", help="pictures, also in folders below, or `scenes` for renders of the scene grammar")
    parser.add_argument("out", help=".npz file to write")
    parser.add_argument("--network", default=INCEPTION, help=f"{INCEPTION}, {RECOGNISER}, a folder or a Hub id")
    parser.error = lambda message: parser.exit(2, f"features: {message}\n")  # one line
    options = parser.parse_args()
    try:
        if not options.out.endswith(".npz"):
            raise DQError(f"file {options.out!r}: expected a name that ends in .npz")
        found = of_real(options.folder, options.network)
        if isinstance(found, Statistics):
            raise DQError(f"{options.folder!r} holds statistics already, expected a folder of pictures")
        found = Statistics.of(found, label(options.network))
        found.save(options.out)
    except DQError as error:
        parser.error(" ".join(str(error).split()))
    print(f"{options.out}: {found.count} pictures, {len(found.mean)} features of {found.network}")


if __name__ == "__main__":
    main()
