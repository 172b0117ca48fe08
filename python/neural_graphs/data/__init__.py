"""Sets of networks: generated from real pictures without any download, or read from the public file layouts."""

from .digits import DigitConfig, digit_inrs, digit_splits, load_digit_pictures
from .formats import export_mnist_layout, read_collection, read_network, read_networks, read_nfn, read_splits
from .inr_set import InrSet, concat, pack, split_by_image, unpack
from .picture import PictureConfig, load_picture, picture_inr
from .siren import SirenConfig, fit_sirens, init_siren, pixel_grid, psnr, siren_forward
from .storage import DataError, default_cache
from .transforms import (
    Normalisation,
    PictureMotion,
    canonical_signs,
    flatten,
    move_picture,
    permute_hidden,
    random_orders,
    sorted_orders,
)

__all__ = [
    "DataError",
    "DigitConfig",
    "InrSet",
    "Normalisation",
    "PictureConfig",
    "PictureMotion",
    "SirenConfig",
    "canonical_signs",
    "concat",
    "default_cache",
    "digit_inrs",
    "digit_splits",
    "export_mnist_layout",
    "fit_sirens",
    "flatten",
    "init_siren",
    "load_digit_pictures",
    "load_picture",
    "move_picture",
    "pack",
    "permute_hidden",
    "picture_inr",
    "pixel_grid",
    "psnr",
    "random_orders",
    "read_collection",
    "read_network",
    "read_networks",
    "read_nfn",
    "read_splits",
    "siren_forward",
    "sorted_orders",
    "split_by_image",
    "unpack",
]
